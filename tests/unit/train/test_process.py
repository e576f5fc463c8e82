"""Joining the processes of a run: what is set in the environment, and what a run's arguments know afterwards."""

import os

import pytest
import torch
from transformers import TrainingArguments

from llmtuner.hparams import get_train_args
from llmtuner.train import process

GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def without_torchrun(monkeypatch):
    """No test leaves behind, or finds, the environment of a group of processes."""
    for name in GROUP:
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)


@pytest.fixture
def started(monkeypatch):
    """The settings with which transformers was asked to start; nothing is started."""
    given = []

    class Started:
        n_gpu = 1

        def __init__(self, **settings):
            given.append(settings)

    monkeypatch.setattr(process, "TrainingArguments", Started)
    return given


def settings(tmp_path, **changed):
    return {"model_name_or_path": "somewhere", "output_dir": str(tmp_path), "dataset": "a", **changed}


def test_deepspeed_in_one_process_sets_what_torchrun_would(tmp_path, started):
    args = get_train_args(settings(tmp_path, deepspeed={"zero_optimization": {"stage": 2}}))
    assert not {*GROUP} & {*os.environ}
    process.join_processes(args)
    assert started[0]["deepspeed"] == {"zero_optimization": {"stage": 2}}
    environment = {name: os.environ[name] for name in GROUP}
    assert 1024 < int(environment.pop("MASTER_PORT")) < 65536
    assert environment == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def test_deepspeed_under_torchrun_keeps_its_environment(tmp_path, started, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    process.join_processes(get_train_args(settings(tmp_path, deepspeed={})))
    process.join_processes(get_train_args(settings(tmp_path, deepspeed={"zero_optimization": {"stage": 1}})))
    assert "MASTER_PORT" not in os.environ


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize("value", [None, "max_split_size_mb:128"])
def test_gpu_memory_is_allocated_in_segments_that_grow_unless_told_otherwise(
    tmp_path, started, monkeypatch, name, value
):
    for variable in process.ALLOCATOR_VARIABLES:
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    if value:
        monkeypatch.setenv(name, value)
    process.join_processes(get_train_args(settings(tmp_path)))
    found = {variable: os.environ[variable] for variable in process.ALLOCATOR_VARIABLES if variable in os.environ}
    assert found == ({name: value} if value else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_evaluation_alone_starts_no_deepspeed(tmp_path, started):
    alone = {"do_train": False, "do_eval": True, "val_size": 0.1, "deepspeed": {"zero_optimization": {"stage": 2}}}
    args = get_train_args(settings(tmp_path, **alone))
    process.join_processes(args)
    assert "deepspeed" not in started[0]
    assert "RANK" not in os.environ


def test_the_other_arguments_and_settings_are_kept(tmp_path):
    given = get_train_args(settings(tmp_path, learning_rate=1e-3, warmup_ratio=0.1, use_cpu=True))
    joined = process.join_processes(given)
    assert (joined.model, joined.data, joined.finetuning) == (given.model, given.data, given.finetuning)
    assert type(joined.training) is TrainingArguments
    assert joined.training.get_warmup_steps(100) == 10
    ours = {name: value for name, value in given.training.to_dict().items() if name != "accelerator_config"}
    assert ours == {name: value for name, value in joined.training.to_dict().items() if name != "accelerator_config"}


def test_one_process_trains_on_one_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(TrainingArguments, "_setup_devices", torch.device("cpu"))
    monkeypatch.setattr(TrainingArguments, "_n_gpu", 4, raising=False)
    assert process.join_processes(get_train_args(settings(tmp_path))).training.n_gpu == 1
