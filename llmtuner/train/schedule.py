"""Between warm-up and decay the learning rate is constant: from a checkpoint saved there, a run can be made longer or shorter."""

from collections.abc import Sequence
from typing import Any

from llmtuner.console import UserError

WSD = "warmup_stable_decay"
# Of all steps. Hägele et al. (arXiv:2405.18392) find a decay over 10 to 20 % as good as a cosine over the whole run.
DECAY_RATIO = 0.2
# Settings that say how long a run is and where it decays.
LENGTH_SETTINGS = frozenset({"max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs"})


def is_other_length(changes: Sequence[str]) -> bool:
    """Tells whether a run of other length is all that changed settings, as lines of `diff_settings`, make of a run."""
    return bool(changes) and {line.split(":")[0] for line in changes} <= LENGTH_SETTINGS


def scheduler_kwargs(scheduler: str, given: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """Adds the number of decay steps to `lr_scheduler_kwargs` where a schedule needs one."""
    if scheduler != WSD or "num_decay_steps" in given:
        return given
    return {**given, "num_decay_steps": round(DECAY_RATIO * num_steps)}


def constant_steps(scheduler: str, given: dict[str, Any], num_warmup_steps: int, num_steps: int) -> range:
    """Returns the steps after which a checkpoint stands between warm-up and decay.

    Args:
        scheduler: `lr_scheduler_type`.
        given: `lr_scheduler_kwargs`.
        num_warmup_steps: as in transformers, also where a schedule has no warm-up.
        num_steps: of the whole run.

    Raises:
        UserError: if warm-up and decay take more steps than there are, or a number of steps is none.
    """
    if scheduler in ("constant", "constant_with_warmup"):
        return range(num_warmup_steps if scheduler != "constant" else 0, num_steps + 1)
    if scheduler != WSD:
        return range(0)
    kwargs = scheduler_kwargs(scheduler, given, num_steps)
    for name in {"num_decay_steps", "num_stable_steps"} & {*kwargs}:
        if type(kwargs[name]) is not int or kwargs[name] < 0:
            raise UserError(f"lr_scheduler_kwargs: {name} is {kwargs[name]!r}; it is a number of steps, not a ratio.")
    decay_begin = num_steps - kwargs["num_decay_steps"]
    if "num_stable_steps" in kwargs:
        decay_begin = num_warmup_steps + kwargs["num_stable_steps"]
    if decay_begin < num_warmup_steps:
        raise UserError(
            f"of {num_steps:,} steps {num_warmup_steps:,} are warm-up and {kwargs['num_decay_steps']:,} are decay, which is more "
            "than there are: set fewer warmup_steps or, in lr_scheduler_kwargs, fewer num_decay_steps."
        )
    return range(num_warmup_steps, decay_begin + 1)
