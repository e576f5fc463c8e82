"""Recipes on real text: what every recipe asks for is valid, the original's tokens are its own, differences are paired."""

import math

import pytest
import yaml

from benchmarks import real_text
from llmtuner.console import UserError
from llmtuner.hparams import get_train_args
from llmtuner.hparams.parser import parse_overrides
from llmtuner.tokenizer.encoding import encode_batch, load_tokenizer
from llmtuner.tokenizer.merge_vocab import merge_as_original
from llmtuner.tokenizer.sentencepiece_bpe import split_sentences, train_bpe
from llmtuner.tokenizer.vocab import read_vocab
from tests.tokenizers import JAPANESE


def run(recipe, seed, ja, tokens=1000):
    return {"recipe": recipe, "seed": seed, "tokens": tokens, "bits_per_byte": {"ja": ja, "zh": 2 * ja}}


@pytest.mark.parametrize("name", real_text.RECIPES)
def test_every_recipe_is_accepted(name, tmp_path):
    """A wrong name would be noticed after an hour of other runs only."""
    import step3_resize_model
    import step5_train_pt_single_gpu as step5

    recipe = real_text.RECIPES[name]
    mix = real_text.PROFILE["pretraining_mix"]
    settings = {**step5.SETTINGS, **step5.OTHER_BASE, **real_text.PROFILE["pt_settings"]}
    settings |= {"dataset": [*mix], "interleave_probs": [*mix.values()]}
    arguments = [argument for argument in recipe.step5.split() if argument != "--staged"]
    settings = parse_overrides(settings, [*arguments, "--output_dir", str(tmp_path), "--use_cpu"])
    args = get_train_args(settings)
    assert len(args.data.dataset) == len(args.data.interleave_probs)
    methods = [word for word in recipe.step3.split() if not word.startswith("--")]
    assert set(methods) <= set(step3_resize_model.METHODS)
    assert recipe.step1 in ("", "--method sentencepiece")
    assert recipe.share in (1, 2, 1 / 2, 1 / 4)


def test_the_profile_is_one(tmp_path):
    from constants import Profile, _find_contradictions
    from llmtuner.hparams.parser import read_dataclass

    file = tmp_path / "real.yaml"
    file.write_text(yaml.safe_dump(real_text.PROFILE | {"base_model_dir": "base"}), encoding="utf-8")
    assert read_dataclass(file, Profile, _find_contradictions).num_new_tokens == real_text.PROFILE["num_new_tokens"]


def test_the_original_encodes_by_scores_of_its_own(tiny_tokenizer_dir, tmp_path):
    candidates = tmp_path / "step1_ja_tokenizer" / "original_bpe.model"
    candidates.parent.mkdir()
    sentences = (sentence for text in JAPANESE for sentence in split_sentences(text))
    train_bpe(sentences, candidates, 600, threads=1, chatglm3_spec=False)
    merged = tmp_path / "step2_merged_tokenizer"
    merged.mkdir()
    original = real_text.merge_original(tiny_tokenizer_dir, tmp_path)
    ranked = encode_batch(load_tokenizer(merged), JAPANESE)
    original.save(merged / "tokenizer.model")  # as it is saved in the resized model
    expected = merge_as_original(read_vocab(tiny_tokenizer_dir), read_vocab(candidates)).encode(JAPANESE)
    assert encode_batch(load_tokenizer(merged), JAPANESE) == expected
    assert ranked != expected


def test_intervals_are_students():
    assert real_text.interval([1.0]) is None
    mean, low, high = real_text.interval([1.0, 2.0, 3.0])
    assert (mean, high - mean) == (2.0, pytest.approx(4.303 / math.sqrt(3), abs=1e-3))
    assert mean - low == pytest.approx(high - mean, abs=1e-3)


def test_differences_are_paired_by_seed():
    """Seeds differ by 1.0, the recipes by 0.1 for each: an interval of unpaired differences would hold 0."""
    runs = [run("default", seed, 1.0 + seed) for seed in (0, 1, 2)]
    runs += [run("staged", seed, 1.1 + seed) for seed in (2, 1, 0)]
    recipes = real_text.summarize(runs)["recipes"]
    assert recipes["default"]["ja"]["difference"] is None
    assert recipes["staged"]["ja"]["difference"] == pytest.approx([0.1, 0.1, 0.1])
    assert recipes["staged"]["zh"]["difference"][0] == pytest.approx(0.2)
    assert recipes["staged"]["ja"]["interval"][1] < 0 < recipes["staged"]["ja"]["interval"][2]
    table = real_text.table({"recipes": recipes})
    assert "| `staged` | 3 | 2.100 | 4.200 | +0.100 (+0.100 to +0.100) |" in table


@pytest.mark.parametrize(
    ("goal", "share", "at_most"),
    [
        (3.0, 0.25, False),
        (2.5, 0.25 * math.sqrt(2), False),
        (1.5, 0.5 * math.sqrt(2), False),
        (4.0, 0.25, True),
        (0.0, 2.0, False),
    ],
)
def test_tokens_needed_are_interpolated_by_their_logarithm(goal, share, at_most):
    """Each doubling of the tokens gains 1 bit."""
    ours = [run(name, 42, bits, tokens) for name, bits, tokens in (("quarter", 3, 250), ("half", 2, 500))]
    needed = real_text.tokens_needed([*ours, run("default", 42, 1), run("original", 42, goal), run("staged", 42, 2)])
    assert needed["original"]["at_most"] is at_most
    assert needed["original"]["share"] == [pytest.approx(share, abs=1e-4)]
    assert needed.keys() == {"original"}
    assert real_text.tokens_needed([*ours, run("original", 42, goal)]) == {}  # nothing to compare with


def test_shares_of_tokens_are_averaged_by_their_logarithm():
    runs = [run("original", seed, goal) for seed, goal in ((42, 3.0), (43, 1.0))]
    runs += [
        run(name, seed, bits, tokens)
        for seed in (42, 43)
        for name, bits, tokens in (("quarter", 3, 250), ("half", 2, 500), ("default", 1, 1000))
    ]
    needed = real_text.tokens_needed(runs)
    assert needed["original"]["by_seed"] == {"42": 0.25, "43": 1.0}
    assert needed["original"]["share"][0] == pytest.approx(0.5)
    assert "| `original` | 50% |" in real_text.tables({"tokens_needed": needed}, "tokens")


def test_recipes_are_compared_at_equal_tokens():
    real_text.check_tokens([run("default", 42, 1), run("staged", 42, 1, 1005), run("half", 42, 1, 500)])
    with pytest.raises(UserError, match="1,000 to 1,020 tokens"):
        real_text.check_tokens([run("default", 42, 1), run("staged", 42, 1, 1020)])


def test_costs_of_both_stages_count():
    stage = {"tokens": 10, "tokens_per_second": 5.0, "trainable_parameters": 7}
    assert real_text.measurements({**stage, "seconds": 1.0})["tokens"] == 10
    both = real_text.measurements({**stage, "seconds": 1.0, "embeddings_only": {**stage, "trainable_parameters": 9}})
    assert (both["tokens"], both["trainable_parameters"]) == (20, 9)
