"""Settings as transformers takes them; the only module of settings that imports torch, so that `--help` need not."""

import platform
from functools import cached_property
from typing import Any

import torch
from transformers import TrainingArguments

from llmtuner.hparams.setting import settings_of

# Other names of settings; some versions of transformers know only one of the two.
SYNONYMS = {"evaluation_strategy": "eval_strategy", "gradient_checkpointing": "activation_checkpointing"}
SYNONYMS = {name: new for name, new in SYNONYMS.items() if new in settings_of(TrainingArguments)}
GRADIENT_CHECKPOINTING = SYNONYMS.get("gradient_checkpointing", "gradient_checkpointing")
# Building TrainingArguments with these changes the process.
WITH_EFFECTS = ("deepspeed", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode")


class CheckedTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments`, checked, of a process that has joined no others: `train.process.join_processes` does.

    Raises:
        TypeError, ValueError, ImportError, OSError: for what transformers does not accept.
    """

    distributed_state = None
    _n_gpu = 0

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        super().__init__(**{name: value for name, value in settings.items() if name not in WITH_EFFECTS})
        for name in WITH_EFFECTS:
            if name in settings:
                setattr(self, name, settings[name])

    @cached_property
    def _setup_devices(self) -> torch.device:
        return torch.device("cpu")


def to_training_arguments(settings: dict[str, Any], for_export: bool) -> tuple[dict[str, Any], list[str]]:
    """Settings without names of older transformers, with this trainer's defaults and what the machine requires.

    Returns:
        the settings, and what to tell the user about them.
    """
    notes = []
    settings = {"logging_nan_inf_filter": False, "use_cpu": not torch.cuda.is_available(), **settings}
    settings["remove_unused_columns"] = False
    ratio, steps = settings.pop("warmup_ratio", None), settings.get("warmup_steps") or 0
    if 0 < steps < 1:
        notes.append(f"warmup_steps: {steps} is read as warmup_ratio: {steps}; write that instead")
    elif ratio:
        settings["warmup_steps"] = float(ratio)  # transformers takes a ratio in the place of a count
    if settings["use_cpu"] and (settings.get("fp16") or settings.get("bf16")):
        has_bf16 = cpu_supports_bf16()
        if settings.get("fp16"):
            notes.append(f"fp16 needs a GPU: computing in {'bf16' if has_bf16 else 'fp32'} on this CPU")
        elif not has_bf16:
            notes.append("bf16: this CPU does not support it and would be many times slower: computing in fp32")
        settings |= {"fp16": False, "bf16": has_bf16}
    if settings.get(GRADIENT_CHECKPOINTING) is not None:
        settings["disable_gradient_checkpointing"] = not settings[GRADIENT_CHECKPOINTING]
    elif settings.get("disable_gradient_checkpointing") is False:
        settings[GRADIENT_CHECKPOINTING] = True
    if not settings.get("do_eval"):
        settings.setdefault("do_train", True)
    if for_export:
        settings.pop("deepspeed", None)
    return settings, notes


def cpu_supports_bf16() -> bool:
    """Whether this machine's CPU has bf16 instructions; x86 without them falls back to scalar code."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
