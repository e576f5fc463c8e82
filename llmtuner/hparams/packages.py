"""Which package a setting needs, so that a missing one is reported before data is tokenized."""

import fnmatch
import importlib.util
from collections.abc import Iterator
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
                break
        else:
            if setting == "report_to" and name not in ("none", "all"):
                yield f"report_to is {name}; it can be none, all, or some of {', '.join(REQUIRED_PACKAGES[setting])}"
