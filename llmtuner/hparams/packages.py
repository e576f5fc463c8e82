"""Which package a setting needs, so that a missing one is reported before data is tokenized."""

import fnmatch
import importlib.util
import netrc
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmtuner.console import interpreter

# Setting -> pattern of its values -> (modules of which one must be importable, what to install).
REQUIRED_PACKAGES: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "report_to": {
        "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
        "azure_ml": (("azureml",), "azureml-mlflow"),
        "neptune": (("neptune",), "neptune"),
        "flyte": (("flytekit",), "flytekit"),
        "kubeflow": (("kubeflow",), "kubeflow"),
        **{name: ((name,), name) for name in ("wandb", "mlflow", "swanlab", "trackio", "comet_ml", "clearml")},
        **{name: ((name,), name) for name in ("codecarbon", "dagshub", "dvclive")},
    },
    "optim": {
        **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), (("torchao",), "torchao")),
        "galore_*": (("galore_torch",), "galore-torch"),
        "apollo_*": (("apollo_torch",), "apollo-torch"),
        **dict.fromkeys(("lomo", "adalomo"), (("lomo_optim",), "lomo-optim")),
        "grokadamw": (("grokadamw",), "grokadamw"),
        "schedule_free_*": (("schedulefree",), "schedulefree"),
        "stable_adamw": (("optimi",), "torch-optimi"),
        "adamw_apex_fused": (("apex",), "apex"),
        **dict.fromkeys(
            ("*_8bit", "paged_*", "lion_*", "rmsprop_bnb*", "ademamix*"), (("bitsandbytes",), "bitsandbytes==0.50.2")
        ),
    },
    "flash_attn": {"fa2": (("flash_attn",), "flash-attn --no-build-isolation")},
    "deepspeed": {"*": (("deepspeed",), "deepspeed")},
    "plot_loss": {"True": (("matplotlib",), "matplotlib")},
}

# Tracker -> (variable of its mode, modes in which it needs no account, variable of its key).
ACCOUNTS = {
    "wandb": ("WANDB_MODE", ("offline", "disabled", "dryrun"), "WANDB_API_KEY"),
    "swanlab": ("SWANLAB_MODE", ("local", "offline", "disabled"), "SWANLAB_API_KEY"),
}


def missing_packages(setting: str, value: Any) -> Iterator[str]:
    """Yields what is wrong for each value of a setting whose package is not installed, or that nobody knows."""
    for one in value if isinstance(value, list) else [value] if value else []:
        name = str(one)
        for pattern, (modules, package) in REQUIRED_PACKAGES.get(setting, {}).items():
            if fnmatch.fnmatchcase(name, pattern):
                if not any(importlib.util.find_spec(module) for module in modules):
                    yield (
                        f"{setting}: {name} needs {modules[0]}, which is not installed. Run: "
                        f"{interpreter()} -m pip install {package}"
                    )
                elif setting == "report_to" and name in ACCOUNTS:
                    yield from _missing_account(name)
                break
        else:
            if setting == "report_to" and name not in ("none", "all"):
                yield f"report_to is {name}; it can be none, all, or some of {', '.join(REQUIRED_PACKAGES[setting])}"


def _missing_account(tracker: str) -> Iterator[str]:
    """Yields what to do if a tracker would ask for a key, which nobody answers once the data has been prepared."""
    mode_variable, modes, key_variable = ACCOUNTS[tracker]
    if os.environ.get(mode_variable) in modes or os.environ.get(key_variable):
        return
    for path in (os.environ.get("NETRC") or "~/.netrc", f"~/.{tracker}/.netrc"):  # where `wandb login` keeps the key
        with suppress(OSError, netrc.NetrcParseError):
            if any(tracker in host for host in netrc.netrc(Path(path).expanduser()).hosts):
                return
    yield (
        f"report_to: {tracker} knows no account to log in with. Run {tracker} login, set {key_variable}, or keep its files "
        f"in output_dir: {mode_variable}={modes[0]}"
    )
