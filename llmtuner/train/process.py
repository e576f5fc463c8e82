"""The one place where a run touches its process: environment variables, the group of processes, the GPU."""

import gc
import os
import socket
from dataclasses import replace

import torch
from transformers import TrainingArguments

from llmtuner.console import UserError, hide_4_bit_warning
from llmtuner.hparams import TrainArgs
from llmtuner.hparams.transformers_args import CheckedTrainingArguments

# The present name and the earlier one of the CUDA allocator's settings.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def join_processes(args: TrainArgs) -> TrainArgs:
    """Joins the other processes of a run and starts DeepSpeed.

    Returns:
        arguments whose `training` knows rank and device.

    Raises:
        UserError: for what transformers or DeepSpeed does not accept.
    """
    assert isinstance(args.training, CheckedTrainingArguments)  # nothing is joined twice
    settings = dict(args.training.settings)
    if not settings.get("do_train"):
        settings.pop("deepspeed", None)  # it casts the weights when it makes its optimizer: an evaluation needs neither
    hide_4_bit_warning()
    _set_environment()
    if settings.get("deepspeed") and "RANK" not in os.environ:
        _set_single_process_env()
    try:
        training = TrainingArguments(**settings)
    except (TypeError, ValueError, ImportError, OSError) as error:
        raise UserError(f"settings: {error}") from error
    if training.n_gpu > 1:  # a process trains on one GPU; Trainer would split each batch among all that it sees
        training._n_gpu = 1
    return replace(args, training=training)


def _set_environment() -> None:
    """Sets what PyTorch and DeepSpeed read before they first use a GPU."""
    if {*ALLOCATOR_VARIABLES}.isdisjoint(os.environ):
        # Blocks that grow instead of being searched for: micro-batches of unequal size would leave gaps between fixed ones.
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # else DeepSpeed, which Trainer imports, warns of the missing GPU


def release_memory() -> None:
    """Frees the model and the optimizer of a finished run, which reference cycles of Trainer keep in memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _set_single_process_env() -> None:
    """Sets what torchrun would set for a single process: DeepSpeed reads it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in variables.items():
        os.environ.setdefault(name, str(value))
