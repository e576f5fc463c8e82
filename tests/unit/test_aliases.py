"""Names of earlier versions: a settings file, a checkpoint and a finished run that were made before they changed.

fixtures/before_renaming holds what that version wrote: run.yaml and checkpoint-2 of a run like `tiny_run`, and metrics,
logs and answers of all steps of the miniature, with 12 training steps each.
"""

import json
import shutil

import pytest
import yaml

from llmtuner import aliases
from llmtuner.console import UserError
from llmtuner.data.sources import get_dataset_attr
from llmtuner.hparams import diff_settings, get_train_args, serialize_settings
from llmtuner.report.page import RUNS, write_report
from llmtuner.train.checkpointing import verify_checkpoint, write_checksums
from llmtuner.train.tuner import run_exp
from tests.helpers import ROOT
from tests.reports import STEPS

OLD = ROOT / "tests" / "fixtures" / "before_renaming"
RENAMED = {
    "embedding_rows: all": "train_new_tokens_only: false",
    "fused_layers: true": "fused_ops: true",
    "max_eval_sequences: 16": "max_eval_samples: 16",
    "max_rejected: 0.1": "max_invalid_ratio: 0.1",
    "interleave_by: bytes": "interleave_unit: bytes",
    "flash_attn: documents": "flash_attn: varlen",
}


@pytest.fixture
def settings_file(tiny_run, tmp_path):
    """The old settings file, with paths of this machine."""
    text = (OLD / "run.yaml").read_text(encoding="utf-8")
    path = tmp_path / "run.yaml"
    text = text.replace("DIRECTORY", str(tmp_path)).replace("MODEL", tiny_run["model_name_or_path"])
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------------ settings
def test_an_old_settings_file_is_accepted_with_a_line_about_each_old_name(settings_file):
    old = get_train_args(settings_file)
    assert sorted(old.notes) == sorted(f"{name} is deprecated: write {new}" for name, new in RENAMED.items())
    settings = yaml.safe_load(settings_file.read_text(encoding="utf-8"))
    for name, new in RENAMED.items():
        del settings[name.split(": ")[0]]
        settings |= yaml.safe_load(new)
    new = get_train_args(settings)
    assert new.notes == ()
    assert (old.model, old.data, old.finetuning) == (new.model, new.data, new.finetuning)
    assert old.training.to_dict() == new.training.to_dict()


def test_rows_of_new_tokens_only():
    settings = {"model_name_or_path": "a", "output_dir": "b", "dataset": "c", "additional_target": "lm_head"}
    args = get_train_args({**settings, "embedding_rows": "new"})
    assert args.finetuning.train_new_tokens_only
    assert args.notes == ("embedding_rows: new is deprecated: write train_new_tokens_only: true",)


def test_a_current_name_wins_over_its_old_one():
    settings = {"model_name_or_path": "a", "output_dir": "b", "dataset": "c", "max_rejected": 0.1}
    args = get_train_args({**settings, "max_invalid_ratio": 0.2})
    assert args.data.max_invalid_ratio == 0.2
    assert args.notes == ("max_rejected is ignored: it is an old name of max_invalid_ratio, which is given, too",)


def test_settings_saved_under_old_names_are_compared_by_the_current_ones(settings_file):
    before = json.loads((OLD / "checkpoint-2" / "settings.json").read_text(encoding="utf-8"))
    assert {*before} & {*aliases.SETTINGS} == {*aliases.SETTINGS}
    after = serialize_settings(get_train_args(settings_file))
    names = {new.split(":")[0] for new in RENAMED.values()}
    assert not [line for line in diff_settings(before, after) if line.split(":")[0] in names]
    changed = diff_settings({**before, "embedding_rows": "new", "fused_layers": False}, after)
    assert {"train_new_tokens_only: True -> False", "fused_ops: False -> True"} <= {*changed}


def test_an_old_key_of_a_data_set_is_taken(tmp_path, capsys):
    entry = {"file_name": "a.jsonl", "keep_rows": {"label": 1}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": entry}), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    assert get_dataset_attr("a", tmp_path / "dataset_info.json", tmp_path).row_filter == {"label": 1}
    assert "keep_rows" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- checkpoint
@pytest.fixture
def old_run(settings_file):
    """A run of four steps whose checkpoint-2 is as the earlier version left it.

    Returns:
        settings file, output_dir, and the weights after four steps. Weights and the state of the optimizer are made
        here, and so are settings of transformers, which depend on its version.
    """
    run_exp(settings_file)
    run = settings_file.parent / "adapter"
    weights = (run / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoint-4")
    checkpoint = run / "checkpoint-2"
    current = json.loads((checkpoint / "training_args.json").read_text(encoding="utf-8"))
    old = json.loads((OLD / "checkpoint-2" / "settings.json").read_text(encoding="utf-8"))
    for name in ("training_args.json", "throughput.json", "checksums.json"):
        (checkpoint / name).unlink()
    for name in ("meter.json", "trainer_state.json"):
        shutil.copy(OLD / "checkpoint-2" / name, checkpoint)
    kept = {name: value for name, value in current.items() if name not in aliases.SETTINGS.values()}
    old_names = {name: old[name] for name in (*aliases.SETTINGS, *aliases.VALUES)}
    (checkpoint / "settings.json").write_text(json.dumps(kept | old_names), encoding="utf-8")
    write_checksums(checkpoint)
    (checkpoint / "checksums.json").rename(checkpoint / "whole.json")
    (run / "training_args.json").rename(run / "settings.json")
    (run / "trainer_log.jsonl").rename(run / "log.jsonl")
    return settings_file, run, weights


def test_an_old_checkpoint_is_verified_by_its_own_checksums(old_run):
    checkpoint = old_run[1] / "checkpoint-2"
    assert verify_checkpoint(checkpoint) == ""
    (checkpoint / "meter.json").write_text("{}", encoding="utf-8")
    assert verify_checkpoint(checkpoint).startswith("meter.json has 2 of ")


def test_an_old_checkpoint_is_resumed_to_the_same_weights(old_run, capsys):
    settings_file, run, weights = old_run
    metrics = run_exp(settings_file)
    output = capsys.readouterr().out
    assert "was written by an earlier version: settings.json, whole.json, meter.json read under deprecated" in output
    assert f"resuming from {run / 'checkpoint-2'}" in output
    assert metrics["steps"] == 4
    assert (run / "adapter_model.safetensors").read_bytes() == weights
    meter = json.loads((OLD / "checkpoint-2" / "meter.json").read_text(encoding="utf-8"))
    assert metrics["tokens"] == 2 * meter["all_tokens"]  # two of the four steps were counted by the earlier version
    log = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all("padding_ratio" in line and "padding_share" not in line for line in steps)


def test_an_old_checkpoint_of_other_settings_is_refused(old_run):
    settings = yaml.safe_load(old_run[0].read_text(encoding="utf-8"))
    with pytest.raises(UserError, match="fused_ops: True -> False"):
        run_exp({**settings, "fused_layers": False})


def test_an_old_output_dir_without_marker_is_a_run(old_run):
    settings_file, run, _ = old_run
    (run / ".llmtuner.json").unlink()
    shutil.rmtree(run / "checkpoint-2")
    run_exp(settings_file)  # settings.json tells that it is one
    assert (run / "checkpoint-4" / "checksums.json").is_file()


# -------------------------------------------------------------------------------------------------------------- report
def test_the_report_of_an_old_run_has_all_figures(tmp_path, capsys):
    work_dir = tmp_path / "work"
    shutil.copytree(OLD / "work", work_dir)
    text = write_report(work_dir, STEPS, {}).read_text(encoding="utf-8")
    output = capsys.readouterr().out
    for name in RUNS.values():
        assert f"{work_dir / name} was written by an earlier version: log.jsonl, settings.json read under" in output
    for figure in (
        "20 of 22 checks passed",
        "0 unreachable tokens",
        "60 of 60 Chinese and 60 of 60 English answers identical",
        "0.02 points off (wikipedia_ja)",
        "1.12% padding",
        "97.5%",  # accuracy
        "29.2%",  # finished
        "18.4%",  # repeated
        "66.7%",  # accuracy of a candidate
        "max_invalid_ratio",
    ):
        assert figure in text, figure
    # Figures of the log are drawn from keys that have other names now.
    assert text.count("<svg") == 17
