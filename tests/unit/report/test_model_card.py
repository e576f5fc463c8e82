"""The model card: front matter that the hub can read, figures as measured, and nothing about what was not."""

import ast
import copy
import errno
import re
from pathlib import Path

import pytest
import yaml

from llmtuner.console import UserError
from llmtuner.report import model_card
from llmtuner.report.model_card import write_model_card

DATA = {
    "wikipedia_ja": {"hf_hub_url": "izumi-lab/wikipedia-ja-20230720", "columns": {}},
    "own | texts": {"file_name": "own.*"},
    "never_read": {"hf_hub_url": "somebody/else"},
}
METRICS = {
    "step2": {"base_pieces": 64_789, "added_pieces": 13_756},
    "step4": {"tokens_per_character": {"base": {"ja": 1.25, "zh": 0.7}, "zero": {"ja": 0.75, "zh": 0.7}}},
    "step5": {
        "data": {
            "wikipedia_ja": {"target_ratio": 0.64, "ratio": 0.6398},
            "own | texts": {"target_ratio": 0.36, "ratio": 0.3602},
        }
    },
    "step6": {"data": {"wikipedia_ja": {"target_ratio": None, "ratio": 0.123}}},
    "step7": {
        "accuracy": {"base": {"zh": 1.0, "ja": 0.0}, "chat": {"zh": 0.99, "ja": 0.96, "ja_unseen": 0.045}},
        "language_confusion": {"chat": {"zh": {"response_pass_rate": 0.9996}, "ja": {"response_pass_rate": None}}},
        "bits_per_byte": {"base": {"ja": 13.9787}, "zero": {"ja": 3.6648}, "chat": {"ja": 0.5811}},
        "repetition": {"chat": {"ja": 0.2087}},
        "free_answers": {"chat": {"finished_ratio": 0.75, "longest_loop": 1_234}},
        "agreement": {"chat": {"zh": {"identical": 0.5, "similar": 0.8}}},
        "generation": {
            "chosen": "penalty",
            "candidates": {
                "greedy": {
                    "settings": {"do_sample": False},
                    "repeated_4gram_ratio": 0.21,
                    "longest_loop": 88,
                    "finished_ratio": 0.7,
                },
                "penalty": {
                    "settings": {"do_sample": False, "repetition_penalty": 1.1},
                    "repeated_4gram_ratio": 0.05,
                    "longest_loop": 12,
                    "finished_ratio": 0.95,
                    "accuracy": 0.955,
                    "tokens_per_second": 512.3,
                },
                "unfinished": {},
            },
        },
    },
    "suite_ja_chat": {
        "suite": "ja",
        "model": "chat",
        "tasks": {"jcommonsenseqa": {"acc,none": 0.25, "acc,none_stderr": 0.01}},
    },
    "suite_en_chat": {"suite": "en", "model": "chat", "tasks": {"piqa": {"acc,none": 0.5, "f1,none": None}}},
}


@pytest.fixture
def directory(tmp_path):
    """A model directory as far as a card cares."""
    made = tmp_path / "island-chat"
    made.mkdir()
    (made / "config.json").write_text("{}")
    return made


def card(directory, metrics=METRICS, base="THUDM/chatglm3-6b", data=DATA):
    """Front matter and body."""
    path = write_model_card(directory, metrics, base, data)
    assert path == directory / "README.md"
    assert sorted(one.name for one in directory.iterdir() if "README" in one.name) == ["README.md"]
    opening, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(front), body


def rows(body):
    """First cell -> the other cells of every row of every table."""
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in body.splitlines() if line.startswith("|")]
    return {first.strip(): [one.strip() for one in others] for first, *others in cells}


def test_the_hub_can_read_the_front_matter(directory):
    front, _ = card(directory)
    assert front == {
        "language": ["ja", "zh", "en"],
        "base_model": "THUDM/chatglm3-6b",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "chatglm3-model-license",
        "license_link": "https://huggingface.co/THUDM/chatglm3-6b/blob/main/MODEL_LICENSE",
        "datasets": ["izumi-lab/wikipedia-ja-20230720"],  # once, and none that was not read
    }


@pytest.mark.parametrize(
    ("base", "licence", "says"),
    [
        ("the miniature of this project", "apache-2.0", "Apache-2.0."),
        ("somebody/another-model", None, "The weights are under the base model's licence"),
        ("chatglm3-6b from a disk", "other", "remain under [its licence](https://"),
    ],
)
def test_the_licence_is_that_of_the_base(directory, base, licence, says):
    front, body = card(directory, base=base)
    assert front.get("license") == licence
    assert ("license_link" in front) == (licence == "other")
    assert front.get("base_model") == (base if base.startswith("somebody/") else None)
    section = body.split("## Licence")[1]
    assert says in section
    assert ("ChatGLM3" in section) == (licence == "other")
    assert (f"[{base}](https://huggingface.co/{base})" in body) == base.startswith("somebody/")


def test_a_licence_beside_the_weights_is_named(directory):
    assert "included as" not in card(directory)[1]
    (directory / "MODEL_LICENSE").write_text("...")
    front, body = card(directory, base="a base with no telling name")
    assert front["license"] == "other"
    assert "included as\n[MODEL_LICENSE](MODEL_LICENSE)" in body


def test_figures_stand_as_measured(directory):
    _, body = card(directory)
    table = rows(body)
    expected = {
        "accuracy, Chinese": ["100%", "–", "–", "99%"],
        "accuracy, Japanese": ["0%", "–", "–", "96%"],
        "accuracy, Japanese, unseen facts": ["–", "–", "–", "4.5%"],
        "in the language of the question, Chinese": ["–", "–", "–", "99.9%"],
        "bits per byte, Japanese": ["13.979", "3.665", "–", "0.581"],
        "free-form replies: repeated 4-grams": ["–", "–", "–", "20.9%"],
        "free-form replies: finished": ["–", "–", "–", "75%"],
        "free-form replies: longest loop, characters": ["–", "–", "–", "1,234"],
    }
    assert {name: table[name] for name in expected} == expected
    assert "accuracy, English" not in table
    assert "in the language of the question, Japanese" not in table  # nothing could be told
    assert "base model's: Chinese 50%." in body
    assert table["Japanese"] != table["Chinese"] == ["0.700", "0.700"]
    assert "| Japanese | 1.250 | 0.750 |" in body
    assert "64,789 base tokens, 9 special tokens and 13,756 new tokens" in body
    assert "the model answers 4.5% correctly" in body
    assert "It repeats itself: 5% of the 4-grams" in body
    assert "(21% under greedy decoding)" in body


def test_data_generation_and_public_tasks(directory):
    _, body = card(directory)
    table = rows(body)
    link = "[izumi-lab/wikipedia-ja-20230720](https://huggingface.co/datasets/izumi-lab/wikipedia-ja-20230720)"
    assert f"| wikipedia_ja | {link} | 64% | 64% |" in body
    assert f"| wikipedia_ja | {link} | 12.3% | – |" in body
    assert table[r"own \| texts"] == ["local files", "36%", "36%"]
    assert "are those of **penalty**" in body
    assert table["greedy"] == ["do_sample False", "21%", "88", "70%", "–", "–"]
    assert table["penalty"] == ["do_sample False, repetition_penalty 1.1", "5%", "12", "95%", "95.5%", "512"]
    assert table["unfinished"] == ["", "–", "–", "–", "–", "–"]
    assert "| Japanese | jcommonsenseqa | acc,none | 0.250 ± 0.010 |" in body
    assert "| English | piqa | acc,none | 0.500 |\n| English | piqa | f1,none | – |" in body
    assert "stderr" not in body
    assert body.count("## Benchmarks") == 1


def test_the_lines_to_use_it_are_python(directory):
    for name in ("island-chat", 'a "quoted" \\name', "it's"):
        renamed = directory.rename(directory.with_name(name))
        code = re.search(r"```python\n(.*?)```", card(renamed)[1], re.DOTALL)[1]
        assert name in [one.value for one in ast.walk(ast.parse(code)) if isinstance(one, ast.Constant)]
        directory = renamed


def test_parts_that_were_not_measured_are_left_out(directory):
    def headings(metrics):
        return re.findall(r"^## (.*)$", card(directory, metrics)[1], re.MULTILINE)

    always = ["Use", "Limits", "Licence"]
    parts = {
        "step5": "Data",
        "step6": "Data",
        "step7": "Before and after",
        "suite_ja_chat": "Benchmarks",
    }
    assert headings({}) == always
    for name, heading in parts.items():
        assert heading in headings({name: METRICS[name]})
    without = copy.deepcopy(METRICS)
    for name in ("generation", "agreement", "accuracy", "repetition"):
        without["step7"].pop(name)
    for name in ("step2", "step4"):
        without.pop(name)
    assert "Generation settings" not in headings(without)
    for generation in ({"candidates": {"greedy": {}}}, {"candidates": {}, "chosen": "greedy"}):
        assert "Generation settings" not in headings({"step7": {"generation": generation}})
    _, body = card(directory, without)
    for absent in ("base tokens", "tokens per character", "identical to", "correctly", "repeats itself", "None"):
        assert absent not in body, absent
    assert "\n\n\n" not in body


def test_every_part_alone_makes_a_card(directory):
    for step, content in METRICS.items():
        for name, value in content.items():
            card(directory, {step: {name: value}})


def test_names_are_shown_not_interpreted(directory):
    name = "a: b # </script> | `x` *y* _z_ [n](javascript:1) '\" \n ---"
    data = {name: {"hf_hub_url": "o/日本 : #\n- x"}}
    metrics = {
        "step5": {"data": {name: {"ratio": 1.0}}},
        "step7": {"generation": {"chosen": name, "candidates": {name: {"settings": {name: name}}}}},
        "suite_ja_chat": {"suite": "ja", "tasks": {name: {name: name}}},
    }
    front, body = card(directory, metrics, name, data)
    assert front["datasets"] == ["o/日本 : #\n- x"]
    assert "base_model" not in front  # it is no id
    assert "</script>" not in body
    assert r"\</script\> \| \`x\` \*y\* \_z\_ \[n\](javascript:1) '" in body
    assert all(len(cells) == 3 for first, cells in rows(body).items() if first.startswith("a: b") and "100%" in cells)
    assert [line for line in body.splitlines() if line.strip() == "---"] == []


def test_it_is_whole_or_as_before(directory, monkeypatch):
    card(directory, {})
    before = (directory / "README.md").read_bytes()

    def fail(path, *_, **__):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(UserError, match="the disk filled up"):
        write_model_card(directory, METRICS, "base", DATA)
    assert (directory / "README.md").read_bytes() == before
    assert not list(directory.glob("*.partial"))


def test_only_a_model_directory_gets_a_card(tmp_path):
    with pytest.raises(UserError, match="is not a model directory"):
        write_model_card(tmp_path, METRICS, "base", DATA)
    assert list(tmp_path.iterdir()) == []


def test_packages_that_are_missing_are_not_named(directory, monkeypatch):
    monkeypatch.setattr(model_card, "PACKAGES", ("torch", "no-such-package"))
    written = re.search(r"Written with (.*)\.\n", card(directory)[1])[1]
    assert re.fullmatch(r"torch [\d.]+\S*", written)
