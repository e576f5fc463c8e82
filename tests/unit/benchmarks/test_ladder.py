"""The ladder by recipe: what each leaves out, and how shares over seeds are shown."""

from dataclasses import replace

import pytest

import constants
from benchmarks import ladder
from benchmarks.ladder import RECIPES, Recipe, arguments, brief, limit_tokens, pooled, share, table
from constants import PROFILE
from llmtuner.tokenizer.chatglm3 import read_sentencepiece
from tests.tokenizers import make_sentencepiece


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_exchanges_sets_that_the_miniature_has(name):
    instead = RECIPES[name].instead
    assert {*instead} <= {*PROFILE.pretraining_mix, *PROFILE.instruction_sets}
    (flag, sets, probabilities_flag, shares, *_), (_, dialogues, *_) = arguments(RECIPES[name])
    assert (flag, probabilities_flag) == ("--dataset", "--interleave_probs")
    mix = dict(zip(sets.split(","), map(float, shares.split(",")), strict=True))
    assert sum(mix.values()) == pytest.approx(1)
    assert not {*instead} & {*mix, *dialogues.split(",")}
    expected = {}
    for set_name, share_of_set in PROFILE.pretraining_mix.items():
        taken = instead.get(set_name, set_name) or "wikipedia_ja"
        expected[taken] = expected.get(taken, 0) + share_of_set
    assert mix == pytest.approx(expected)
    assert all(dialogues.split(","))


def test_without_bridges_nothing_sets_two_languages_side_by_side():
    mix, sets = arguments(RECIPES["no_bridges"])
    assert {*mix[1].split(",")} == {
        "wikipedia_ja",
        "aozora_ja",
        "wikipedia_zh",
        "wikitext_en",
        "alpaca_zh",
        "wiki_qa_en",
    }
    assert "switched" not in sets[1]
    assert "crosslingual" not in sets[1]
    assert "alpaca_zh" in sets[1].split(",")


def test_arguments_of_a_recipe_follow():
    step5, step6 = arguments(Recipe(step5="--lora_rank 8", step6="--num_train_epochs 2"))
    assert step5[-2:] == ["--lora_rank", "8"]
    assert step6[-2:] == ["--num_train_epochs", "2"]


def test_the_first_tokens_are_those_learned_first(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(ladder, "run_step", lambda script, *words, **variables: ran.append((script, variables)))
    monkeypatch.setattr(constants, "PROFILE", replace(PROFILE, num_new_tokens=4))
    learned = make_sentencepiece(["水", "山", "み", "ず", "みず", "みずうみ"])  # the first two are the base's
    (tmp_path / "step1_ja_tokenizer").mkdir()
    (tmp_path / "step1_ja_tokenizer" / "ja_bpe.model").write_bytes(learned.SerializeToString())
    limit_tokens(tmp_path, 3)
    kept = [piece.piece for piece in read_sentencepiece(tmp_path / "fewer_tokens.model").pieces]
    assert kept[-5:] == ["水", "山", "み", "ず", "みず"]
    assert ran == [("step2_merge_tokenizer.py", {"OVERWRITE": "1"}), ("step3_resize_model.py", {"OVERWRITE": "1"})]


def test_without_new_tokens_the_zero_model_is_the_base(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.model").write_text("base's")
    monkeypatch.setattr(constants, "BASE_MODEL_DIR", tmp_path / "base")
    limit_tokens(tmp_path, 0)
    assert (tmp_path / "step3_zero" / "tokenizer.model").read_text() == "base's"


def test_the_table_has_means_and_intervals_over_seeds():
    def one(recipe, seed, right):
        cell = {"n": 120, "accuracy": right, "names_subject": 1.0}
        return {
            "recipe": recipe,
            "seed": seed,
            "ladder": {"told": {"ja_ja": cell}},
            "accuracy": {"ja": right},
            "accuracy_pretrained": {"ja": 0.5},
        }

    text = table([one("default", 1, 0.4), one("default", 2, 0.5), one("no_bridges", 1, 0.1)])
    lines = [line.split(" | ") for line in text.splitlines()]
    assert lines[0][1:3] == ["`default`: right", "`default`: names it"]
    both_japanese = "| told in Japanese: Japanese question, Japanese name"
    assert [both_japanese, "45 (0 to 100)", "100 (100 to 100)", "10", "100 |"] in lines
    assert ["| pretrained model, questions ja", "50 (50 to 50)", "", "50", " |"] in lines


def test_runs_of_other_recipes_and_seeds_stay_in_the_results():
    def one(recipe, seed, tokens):
        return {"recipe": recipe, "seed": seed, "tokens": tokens}

    earlier = [one("half", 42, 1), one("default", 43, 2), one("default", 42, 3)]
    merged = ladder.merge(earlier, [one("default", 42, 4), one("no_bridges", 42, 5)])
    assert [run["tokens"] for run in merged] == [4, 2, 5, 1]


def test_a_share_without_values_is_empty():
    assert share([]) == ""
    assert share([0.123]) == "12"
    assert ladder.share([0.9, 0.9, 0.9]) == "90 (90 to 90)"


def test_brief_table_pools_untold_entities():
    def cell(n, right):
        return {form: {"n": n, "accuracy": right} for form in ("ja_ja", "ja_zh", "zh_ja", "pivot")}

    cells = {"told": cell(10, 1.0), "untold_named": cell(60, 0.5), "untold_unnamed": cell(120, 0.2)}
    assert pooled(cells, ("untold_named", "untold_unnamed"), "ja_zh") == pytest.approx(0.3)
    accuracy = {"zh": 0.99, "en": 0.93, "ja": 0.95}
    text = brief([{"recipe": "default", "tokens": [1_000_000, 500_000], "accuracy": accuracy, "ladder": cells}])
    assert text.splitlines()[2] == "| `default` | 1 | 1.5 | 95 | 99 | 93 | 100 | 100 | 100 | 100 | 30 | 30 | 30 | 30 |"
