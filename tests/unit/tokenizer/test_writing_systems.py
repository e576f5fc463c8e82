"""Which tokens only one writing system can contain."""

import unicodedata

import pytest

from llmtuner.console import UserError
from llmtuner.tokenizer.writing_systems import (
    ALL_CHARACTERS,
    USED_ELSEWHERE,
    WRITING_SYSTEMS,
    find_strings,
    partial_bytes,
)
from tests.tokenizers import JA

SIGN = "digit, letter or sign"


def test_find_strings_checks_every_position_but_not_quotations():
    texts = iter(["説明駅前的", "開，店", "山", "彼は駅前の店\n覚書"])
    expected = {"明駅", "駅前", "説明駅前", "開店", "駅山", "覚", "開"}
    assert find_strings(expected, texts, JA) == {"明駅", "駅前", "説明駅前", "覚", "開"}
    assert find_strings({"駅前"}, ["彼は駅前の店"], JA) == set()


@pytest.mark.parametrize(
    ("name", "tokens", "foreign"),
    [
        ("korean", ["학교", "▁학교", " 학교", "다.", "ㅋㅋ"], ["학a", "2월", "漢字", "."]),
        ("thai", ["โรงเรียน", "ที่", "ๆ"], ["฿", "๑", "เ1", "ลาວ"]),
        ("khmer", ["ភាសា", "ខ្មែរ", "៖", "ក\u200b", "\u200bភាសា", "​ខ្"], ["២", "ក២", "\u200b", "ខa"]),
        ("devanagari", ["हिन्दी", "है।", "क्\u200dष"], ["।", "१", "কা", "क꠰"]),
        ("tibetan", ["བོད་", "་"], ["༡", "a་"]),
        ("ethiopic", ["አማርኛ", "ነው፡"], ["፩", "ነ1"]),
        ("Tai_Tham", ["ᨲᩫ᩠ᩅ"], ["᪑"]),
    ],
)
def test_a_script_by_its_name(name, tokens, foreign):
    script = WRITING_SYSTEMS[name]
    assert {token: script.rejection_reason(token) for token in tokens} == dict.fromkeys(tokens)
    assert {token: script.rejection_reason(token) for token in foreign} == dict.fromkeys(foreign, SIGN)
    assert script.rejection_reason(f"{tokens[0]} {tokens[0]}") == SIGN  # a space only at the start
    assert not script.shared_run_pattern.search(ALL_CHARACTERS)
    kinds = {"hangul" if name == "korean" else name.lower().replace("_", " ")}
    for character in script.exclusive_pattern.findall(ALL_CHARACTERS):
        if unicodedata.category(character).startswith("L"):  # unicodedata knows no newer characters
            named = unicodedata.name(character).lower().removeprefix("halfwidth ")
            assert any(named.startswith(kind) for kind in kinds)


@pytest.mark.parametrize(
    ("name", "tokens", "foreign"),
    [
        ("latin", ["đường", "▁đường", " ọ̀nà", "thanh"], ["2a", "ж", "a.", "naïve "]),
        ("cyrillic", ["їжак", "е́"], ["ѣa", "5", "א"]),
        ("arabic", ["می\u200cخواهم", "شَ"], ["۱", "،", "خa"]),
        ("han", ["唔係", "嘅"], ["がる", "五、"]),
        ("shared devanagari", ["आहे", "क्\u200dष"], ["आहे।", "१"]),
    ],
)
def test_a_shared_script_leaves_the_decision_to_texts(name, tokens, foreign):
    script = WRITING_SYSTEMS[name]
    assert {token: script.rejection_reason(token) for token in tokens} == dict.fromkeys(tokens)
    assert {token: script.rejection_reason(token) for token in foreign} == dict.fromkeys(foreign, SIGN)
    assert not script.exclusive_pattern.search(ALL_CHARACTERS)
    assert partial_bytes(script) == set()
    strings = {token.lstrip("▁ ") for token in tokens}
    assert find_strings(strings, [f"x. {tokens[0]}, {tokens[0]}"], script) == {tokens[0]}
    assert script.rejection_reason("\u200d") == USED_ELSEWHERE  # as in emoji
    assert script.rejection_reason("\u0301") in (USED_ELSEWHERE, SIGN)  # an accent, on whatever letter


def test_find_strings_looks_inside_words_and_again_after_forgetting_them(monkeypatch):
    latin = WRITING_SYSTEMS["latin"]
    wanted = {"trong", "nhà", "iệ", "đi"}
    for limit in (1_000_000, 1):
        monkeypatch.setattr("llmtuner.tokenizer.writing_systems.MAX_SEEN_RUNS", limit)
        assert find_strings(wanted, iter(["strong strong", "strong", "Điện Việt"]), latin) == {"trong", "iệ"}


def test_only_prefixes_of_own_characters_are_partial_bytes():
    assert partial_bytes(JA) == {b"\xe3\x81"}  # not E3 83, which begins ・ too
    assert partial_bytes(WRITING_SYSTEMS["khmer"]) == {b"\xe1\x9e", b"\xe1\x9f"}  # the second begins its digits too
    assert partial_bytes(WRITING_SYSTEMS["thai"]) == {b"\xe0\xb9"}  # E0 B8 begins the baht sign too
    hangul = partial_bytes(WRITING_SYSTEMS["korean"])
    assert {b"\xea\xb0", b"\xed\x9d"} < hangul
    assert b"\xed\x9e" in hangul  # the last syllables and 77 old letters
    for prefix in hangul:
        for last in range(0x80, 0xC0):
            character = bytes([*prefix, last]).decode()
            assert unicodedata.name(character, "HANGUL").startswith(("HANGUL", "HALFWIDTH HANGUL"))
    assert {len(prefix) for prefix in partial_bytes(WRITING_SYSTEMS["adlam"])} == {3}  # beyond 16 bits: F0 9E A4


def test_unknown_names_get_near_ones():
    for name, near in (("kmer", "khmer"), ("Tibet", "tibetan"), ("vietnamese", "latin"), ("common", "korean")):
        with pytest.raises(UserError, match=f"the writing system '{name}' is unknown.*{near}"):
            WRITING_SYSTEMS[name]
    assert WRITING_SYSTEMS["Latn"].exclusive == ""  # a short name of a shared script is no loophole
