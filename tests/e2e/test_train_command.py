"""`python -m llmtuner train` with LLaMA-Factory's files, bad input and two runs in one directory."""

import json
import re

import pytest
import yaml

from llmtuner.console import UserError
from llmtuner.train.tuner import run_exp
from tests.helpers import ROOT
from tests.scripts import locked_by_another_process, refused, start
from tests.training import PT_FILE, SFT_FILE


@pytest.mark.parametrize(("content", "file"), [(PT_FILE, "documents"), (SFT_FILE, "dialogues")])
def test_files_written_for_the_original_project_run_as_they_are(tiny_run, tmp_path, content, file):
    """The settings of its steps 5 and 6, with other paths; DeepSpeed in one process, fp16 on a machine without a GPU."""
    paths = {"model_name_or_path": ROOT / "mini" / "base", "deepspeed": ROOT / "ds_config_zero2.json"}
    paths |= {"dataset_dir": tmp_path, "output_dir": tmp_path / "lora"}
    for name, path in paths.items():
        content = re.sub(rf"^{name}: .*$", f"{name}: {path}", content, flags=re.MULTILINE)
    (tmp_path / "settings.yaml").write_text(content, encoding="utf-8")
    entry = json.loads((tmp_path / "dataset_info.json").read_text())[file]
    names = yaml.safe_load(content)["dataset"].split(",")
    (tmp_path / "dataset_info.json").write_text(json.dumps(dict.fromkeys(names, entry)))
    result = start(
        ["-m", "llmtuner", "train", tmp_path / "settings.yaml"], tmp_path, PYTHONPATH=ROOT, DS_ACCELERATOR="cpu"
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "warmup_steps: 0.1 is read as warmup_ratio: 0.1" in result.stdout
    assert "fp16 needs a GPU" in result.stdout
    assert (tmp_path / "lora" / "adapter_config.json").is_file()


def test_bad_input_on_the_command_line_is_one_message(tiny_run, tmp_path):
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({**tiny_run, "cutoff_len": 100_000}), encoding="utf-8")
    result = start(["-m", "llmtuner", "train", tmp_path / "settings.yaml"])
    refused(result, "cutoff_len is 100,000")
    assert not (tmp_path / "adapter").exists()


def test_two_runs_in_one_output_dir(tiny_run, tmp_path):
    with (
        locked_by_another_process(tmp_path / "adapter" / ".lock") as holder,
        pytest.raises(UserError, match=f"adapter is in use by process {holder} "),
    ):
        run_exp(tiny_run)
    run_exp({**tiny_run, "max_steps": 1})
