"""Which tokens only one writing system can contain."""

from llmtuner.tokenizer.writing_systems import find_strings
from tests.tokenizers import JA


def test_find_strings_checks_every_position_but_not_quotations():
    texts = iter(["説明駅前的", "開，店", "山", "彼は駅前の店\n覚書"])
    expected = {"明駅", "駅前", "説明駅前", "開店", "駅山", "覚", "開"}
    assert find_strings(expected, texts, JA) == {"明駅", "駅前", "説明駅前", "覚", "開"}
    assert find_strings({"駅前"}, ["彼は駅前の店"], JA) == set()
