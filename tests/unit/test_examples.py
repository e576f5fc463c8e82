"""examples/*.yaml: each runs as it is but for model and data, says what every line does, and has the settings of its step."""

import dataclasses
import json

import pytest
import yaml

import constants
import pipeline
import step5_train_pt_single_gpu as step5
import step6_train_sft_single_gpu as step6
from llmtuner.console import UserError
from llmtuner.data.sources import get_dataset_attr
from llmtuner.eval.questions import read_questions
from llmtuner.hparams import get_train_args
from llmtuner.hparams.parser import read_dataclass
from llmtuner.tokenizer.writing_systems import WRITING_SYSTEMS
from llmtuner.train.tuner import export_model, run_exp
from tests.helpers import ROOT
from tests.scripts import start

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.yaml"))
PROFILE_FILES = ("llama3-8b-khmer", "qwen3-4b-japanese")
PATHS = ("model_name_or_path", "adapter_name_or_path", "output_dir", "export_dir")


def settings_of(name):
    return yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def small(tiny_run, tmp_path):
    """Returns an example's settings, reduced to one step with the tiny model on the tiny data sets."""

    def reduce(name, **changes):
        settings = settings_of(name)
        entries = json.loads((tmp_path / "dataset_info.json").read_text(encoding="utf-8"))
        entry = entries["dialogues" if settings.get("stage") == "sft" else "documents"]
        names = settings.get("dataset", "").split(",")
        (tmp_path / "dataset_info.json").write_text(json.dumps({**entries, **dict.fromkeys(names, entry)}))
        if "dataset" in settings:
            same = {key: tiny_run[key] for key in ("dataset_dir", "cache_dir", "cutoff_len", "use_cpu", "output_dir")}
            settings |= {**same, "corpus_dir": None, "max_steps": 1, "plot_loss": False, "deepspeed": None}
            settings["gradient_accumulation_steps"] = 1
        return {**settings, "model_name_or_path": tiny_run["model_name_or_path"], **changes}

    return reduce


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_setting_is_explained_and_has_an_example_that_can_be_pasted(name):
    text = (ROOT / "examples" / f"{name}.yaml").read_text(encoding="utf-8")
    assert f" examples/{name}.yaml\n" in text.replace("PROFILE=", " ")
    assert all(line.startswith("#") or "  # " in line for line in text.splitlines() if line)
    named = settings_of(name).get("dataset")
    if named:
        known = json.loads((ROOT / settings_of(name)["dataset_dir"] / "dataset_info.json").read_text(encoding="utf-8"))
        assert set(named.split(",")) <= known.keys()


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in ("evaluate", "export", *PROFILE_FILES)])
def test_a_training_example_trains(name, small, tmp_path):
    metrics = run_exp(small(name))
    assert metrics["steps"] == 1
    assert metrics["data"].keys() == set(settings_of(name)["dataset"].split(","))
    assert list((tmp_path / "adapter").glob("*.safetensors"))


def test_the_trained_adapter_is_evaluated_and_exported_by_the_examples(small, tmp_path):
    adapter = str(tmp_path / "adapter")
    run_exp(small("pt_single_gpu"))
    losses = run_exp(small("evaluate", adapter_name_or_path=adapter, output_dir=str(tmp_path / "evaluation")))
    mix = constants.PROFILES["chatglm3-6b"].pretraining_mix
    assert losses.keys() - {"data"} == {"eval_loss", *(f"eval_{name}_loss" for name in mix)}
    merged = export_model(small("export", adapter_name_or_path=adapter, export_dir=str(tmp_path / "merged")))
    assert (merged / "model.safetensors").is_file()


@pytest.mark.parametrize(("stage", "step"), [("pt", step5), ("sft", step6)])
def test_examples_have_the_settings_of_the_steps(stage, step):
    of_step = {**step.SETTINGS, **step.BY_PROFILE["chatglm3-6b"]}
    profile = constants.PROFILES["chatglm3-6b"]
    of_step["cutoff_len"] = profile.context_length
    if stage == "pt":
        of_step |= {"dataset": [*profile.pretraining_mix], "interleave_probs": [*profile.pretraining_mix.values()]}
    else:
        of_step["dataset"] = profile.instruction_sets
    for name in (*PATHS, *constants.DATA_SETTINGS, "overwrite_output_dir"):
        of_step.pop(name, None)
    example = settings_of(f"{stage}_single_gpu")
    for name in example.keys() & of_step.keys():
        value = of_step[name]
        wanted = [str(one) for one in value] if isinstance(value, list) else value
        given = example[name].split(",") if isinstance(value, list) else example[name]
        assert (given == wanted) or (isinstance(value, str) and given == value), name
    assert settings_of(f"{stage}_multi_gpu") == {**example, "deepspeed": "ds_config_zero2.json"}


@pytest.mark.parametrize("name", PROFILE_FILES)
def test_a_profile_names_what_exists(name):
    profile = read_dataclass(ROOT / "examples" / f"{name}.yaml", constants.Profile, constants._find_contradictions)
    info, nowhere = ROOT / "data" / "dataset_info.json", ROOT / "no-such-directory"
    for dataset in {
        *profile.tokenizer_mix,
        *profile.pretraining_mix,
        *profile.reference_sets,
        *profile.instruction_sets,
    }:
        if dataset != "instructions_km":  # to be written by whoever wants it
            assert get_dataset_attr(dataset, info, nowhere).hf_hub_url
    assert {*profile.pretraining_mix} >= {dataset for sets in profile.eval_sets.values() for dataset in sets}
    assert {f"test_{code}" for code in profile.eval_sets} <= json.loads(info.read_text(encoding="utf-8")).keys()
    writing_system = WRITING_SYSTEMS[profile.writing_system]
    assert bool(writing_system.shared) == bool(profile.reference_sets)
    groups = {question.group for question in read_questions(ROOT / profile.questions)}
    assert {*profile.eval_sets, f"{profile.language}_free"} <= groups
    for step, own in ((step5, profile.pt_settings), (step6, profile.sft_settings)):
        settings = {**step.SETTINGS, **step.OTHER_BASE, **own}
        del settings["overwrite_output_dir"]
        get_train_args({**settings, "bf16": False, "use_cpu": True})


def test_a_profile_of_one_s_own_selects_language_base_and_results(tmp_path):
    code = "import constants, pipeline; print(constants.WORK_DIR.name, constants.BASE_MODEL_DIR, *constants.LANGUAGES)"
    code += "; print(pipeline.STEPS['step1'].title, constants.QUESTIONS.name, *constants.LANGUAGES.retained)"
    shown = start(["-c", code], PROFILE="examples/llama3-8b-khmer.yaml", WORK_DIR="", BASE_MODEL_DIR="").stdout
    assert shown.splitlines() == [
        f"llama3-8b-khmer {ROOT / 'models/llama3-8b-instruct'} km en",
        "Train a Khmer tokenizer questions-khmer.txt en",
    ]


WRONG_PROFILES = [
    ({"languge": "km"}, ["unknown setting 'languge'; did you mean 'language'?"]),
    ({"language": None}, ["language is not given. Code of"]),
    ({"language": False}, ["language is False; it must be text"]),
    ({"num_new_tokens": "many"}, ["num_new_tokens is 'many'; it must be a whole number"]),
    ({"num_new_tokens": 0}, ["num_new_tokens is 0; it must be at least 1"]),
    (
        {"tokenizer_mix": ["wikipedia_km"]},
        ["tokenizer_mix is ['wikipedia_km']; it must be lines of the form `name: number`"],
    ),
    ({"tokenizer_mix": {"wikipedia_km": "all"}}, ["tokenizer_mix is {", "`name: number`"]),
    (
        {"pretraining_mix": {"wikipedia_km": 0.5}},
        ["pretraining_mix has the shares 0.5; shares are above 0 and sum to 1"],
    ),
    ({"eval_sets": {"en": ["wikitext_en"]}}, ["eval_sets has no entry for km, so that there is no text to measure"]),
    ({"retained_languages": {}}, ["retained_languages has to name", "eval_sets.en is for no language"]),
    (
        {"context_length": 4, "base_id": 7},
        ["context_length is 4; it must be at least 8", "base_id is 7; it must be text"],
    ),
]


@pytest.mark.parametrize(("changes", "messages"), WRONG_PROFILES, ids=lambda value: "-".join(value))
def test_a_wrong_profile_is_refused_by_file_and_field(changes, messages, tmp_path):
    values = {name: value for name, value in {**settings_of("llama3-8b-khmer"), **changes}.items() if value is not None}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        read_dataclass(file, constants.Profile, constants._find_contradictions)
    assert str(refused.value).startswith(f"{file}:\n  - ")
    assert all(message in str(refused.value) for message in messages)


@pytest.mark.slow
def test_a_profile_that_cannot_be_read_ends_with_one_message(tmp_path):
    (tmp_path / "mini.yaml").write_text("language: km", encoding="utf-8")
    (tmp_path / "text.yaml").write_text("- km", encoding="utf-8")
    for profile, message in (
        ("none.yaml", "cannot read the settings file none.yaml: No such file"),
        (
            str(tmp_path / "mini.yaml"),
            "is unknown. Set PROFILE to one of: mini, chatglm3-6b; or to a YAML file of another",
        ),
        (str(tmp_path / "text.yaml"), "holds no settings"),
        ("examples", "PROFILE=examples is unknown"),
    ):
        result = start(["-c", "import constants"], PROFILE=profile)
        assert result.returncode
        assert message in result.stderr + result.stdout
        assert "Traceback" not in result.stderr


def test_shared_scripts_need_a_reference(monkeypatch):
    profile = dataclasses.replace(constants.PROFILE, writing_system="latin", reference_sets=[], language_name="Yoruba")
    monkeypatch.setattr(pipeline, "PROFILE", profile)
    with pytest.raises(
        UserError, match=r"Yoruba shares the characters of the writing system 'latin'.*`reference_sets`"
    ):
        pipeline.reference_texts()
    monkeypatch.setattr(pipeline, "PROFILE", dataclasses.replace(profile, writing_system="kmer"))
    with pytest.raises(UserError, match=r"the writing system 'kmer' is unknown.*khmer"):
        pipeline.reference_texts()
    monkeypatch.setattr(pipeline, "PROFILE", dataclasses.replace(profile, writing_system="khmer"))
    assert list(pipeline.reference_texts()) == []
