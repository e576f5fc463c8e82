"""Settings whose package is not installed are refused with the command that installs it, before data is read."""

import importlib.util
import re

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from llmtuner.console import UserError
from llmtuner.hparams import get_train_args
from llmtuner.hparams.packages import REQUIRED_PACKAGES, missing_packages
from llmtuner.train.tuner import run_exp


@pytest.fixture
def bare(monkeypatch):
    """As if none of the optional packages were installed."""
    modules = {module for own in REQUIRED_PACKAGES.values() for needed, _ in own.values() for module in needed}
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in modules else find_spec(name, *rest)
    )


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"report_to": "wandb"}, "wandb"),
        ({"report_to": ["tensorboard", "mlflow"]}, "mlflow"),
        ({"report_to": "swanlab"}, "swanlab"),
        ({"report_to": "trackio"}, "trackio"),
        ({"report_to": "tensorboard"}, "tensorboard"),
        ({"optim": "adamw_8bit"}, "bitsandbytes==0.50.2"),
        ({"optim": "paged_lion_8bit"}, "bitsandbytes==0.50.2"),
        ({"optim": "galore_adamw_8bit"}, "galore-torch"),
        ({"flash_attn": "fa2"}, "flash-attn --no-build-isolation"),
        ({"plot_loss": True}, "matplotlib"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_missing_package_is_refused_before_data_is_read(tiny_run, tmp_path, bare, settings, package):
    with pytest.raises(UserError, match=rf"not installed\. Run: \S+ -m pip install {re.escape(package)}$"):
        run_exp({**tiny_run, "plot_loss": False, **settings})
    assert not (tmp_path / "cache").exists()


def test_all_missing_packages_are_reported_at_once(tiny_run, bare):
    with pytest.raises(UserError) as caught:
        get_train_args({**tiny_run, "report_to": ["wandb", "mlflow"], "optim": "lion_8bit", "learning_rate": -1})
    assert all(part in str(caught.value) for part in ("wandb", "mlflow", "bitsandbytes", "learning_rate"))


def test_what_needs_no_package_is_taken(tiny_run, bare):
    for optim in ("adamw_torch", "adafactor", "sgd"):
        get_train_args({**tiny_run, "plot_loss": False, "optim": optim, "report_to": "none"})
    get_train_args({**tiny_run, "adapter_name_or_path": "x", "export_dir": "y", "report_to": "wandb"}, for_export=True)


def test_unknown_tracker_is_refused(tiny_run):
    with pytest.raises(UserError, match=r"report_to is wandbb; it can be none, all, or some of .*wandb"):
        get_train_args({**tiny_run, "report_to": "wandbb"})


def test_every_tracker_of_transformers_is_known(bare):
    for name in INTEGRATION_TO_CALLBACK:
        assert "is not installed" in next(missing_packages("report_to", name))


def test_every_optimizer_of_transformers_is_placed(bare):
    """Those of PyTorch and transformers themselves need nothing; every other name needs a package."""
    own = "adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adafactor sgd adagrad rmsprop"
    free = {one.value for one in OptimizerNames if not list(missing_packages("optim", one.value))}
    assert free == {*own.split(), "adamw_anyprecision"}


@pytest.mark.parametrize(
    "setting",
    [
        {"max_grad_norm": -1},  # would turn every step around
        {"seed": -1},
        {"data_seed": 2**32},
        {"adam_beta1": 2},
        {"adam_beta2": -0.1},
        {"adam_epsilon": -1e-8},
        {"dataloader_num_workers": -1},
        {"optim_args": "nonsense"},
    ],
    ids=str,
)
def test_values_that_end_a_run_later_or_turn_it_around_are_refused(tiny_run, setting):
    [(name, value)] = setting.items()
    with pytest.raises(UserError, match=rf"{name} is {value}; it must be "):
        get_train_args({**tiny_run, **setting})


def test_limits_take_what_is_usual(tiny_run):
    usual = dict(max_grad_norm=0, seed=0, adam_beta1=0.9, adam_beta2=0.999, dataloader_num_workers=0)
    get_train_args({**tiny_run, **usual, "optim_args": "a=1,b=2"})
