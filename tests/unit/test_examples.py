"""examples/*.yaml: each runs as it is but for model and data, says what every line does, and has the settings of its step."""

import json

import pytest
import yaml

import constants
import step5_train_pt_single_gpu as step5
import step6_train_sft_single_gpu as step6
from llmtuner.train.tuner import export_model, run_exp
from tests.helpers import ROOT

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.yaml"))
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
    assert f" examples/{name}.yaml\n" in text
    assert all(line.startswith("#") or "  # " in line for line in text.splitlines() if line)
    named = settings_of(name).get("dataset")
    if named:
        known = json.loads((ROOT / settings_of(name)["dataset_dir"] / "dataset_info.json").read_text(encoding="utf-8"))
        assert set(named.split(",")) <= known.keys()


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in ("evaluate", "export")])
def test_a_training_example_trains(name, small, tmp_path):
    metrics = run_exp(small(name))
    assert metrics["steps"] == 1
    assert metrics["data"].keys() == set(settings_of(name)["dataset"].split(","))
    assert list((tmp_path / "adapter").glob("*.safetensors"))


def test_the_trained_adapter_is_evaluated_and_exported_by_the_examples(small, tmp_path):
    adapter = str(tmp_path / "adapter")
    run_exp(small("pt_single_gpu"))
    losses = run_exp(small("evaluate", adapter_name_or_path=adapter, output_dir=str(tmp_path / "evaluation")))
    assert losses.keys() - {"data"} == {"eval_loss", *(f"eval_{name}_loss" for name in constants.PRETRAINING_MIX)}
    merged = export_model(small("export", adapter_name_or_path=adapter, export_dir=str(tmp_path / "merged")))
    assert (merged / "model.safetensors").is_file()


@pytest.mark.parametrize(("stage", "step"), [("pt", step5), ("sft", step6)])
def test_examples_have_the_settings_of_the_steps(stage, step):
    of_step = {**step.SETTINGS, **step.BY_PROFILE["chatglm3-6b"]}
    of_step["cutoff_len"] = constants.PROFILES["chatglm3-6b"].context_length
    for name in (*PATHS, *constants.DATA_SETTINGS, "overwrite_output_dir"):
        of_step.pop(name, None)
    example = settings_of(f"{stage}_single_gpu")
    for name in example.keys() & of_step.keys():
        value = of_step[name]
        wanted = [str(one) for one in value] if isinstance(value, list) else value
        given = example[name].split(",") if isinstance(value, list) else example[name]
        assert (given == wanted) or (isinstance(value, str) and given == value), name
    assert settings_of(f"{stage}_multi_gpu") == {**example, "deepspeed": "ds_config_zero2.json"}
