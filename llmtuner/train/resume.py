"""Decides from which checkpoint a run goes on."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerState

from llmtuner.aliases import describe_old_names
from llmtuner.console import UserError, is_rank_zero, print0
from llmtuner.hparams import TrainArgs, serialize_settings
from llmtuner.train.callbacks import is_training_finished
from llmtuner.train.checkpointing import (
    changed_settings,
    checkpoint_step,
    read_settings,
    valid_checkpoints,
    verify_checkpoint,
)
from llmtuner.train.schedule import WSD, constant_steps, is_other_length


def find_resume_checkpoint(args: TrainArgs, settings: dict[str, Any], num_steps: int) -> Path | None:
    """Returns the latest valid checkpoint from which this run of `num_steps` can go on, or the one that is named.

    Rank 0 looks for all. A checkpoint of a shorter or longer run will do if the learning rate is constant there in both.

    Raises:
        UserError: if the named one is damaged, or the checkpoint holds weights only or belongs to another run.
    """
    found: list[Path | None] = [None]
    if is_rank_zero():
        found = [_choose_checkpoint(args, settings, num_steps)]
        if found[0] is not None:
            state = TrainerState.load_from_json(str(found[0] / "trainer_state.json"))
            if not is_training_finished(state, num_steps, args.finetuning):
                check_resumable(found[0])
            if old_names := describe_old_names(found[0]):
                print0(old_names)
            earlier = (
                f", where a run of {state.max_steps:,} steps had a constant learning rate: this one makes {num_steps:,}"
            )
            print0(f"resuming from {found[0]}{earlier if changed_settings(found[0], settings) else ''}")
    if args.training.world_size > 1:
        broadcast_object_list(found)
    return found[0]


def _choose_checkpoint(args: TrainArgs, settings: dict[str, Any], num_steps: int) -> Path | None:
    """Returns the first of all candidates from which this run can go on; raises if there are some, but none will do."""
    named, output_dir = args.training.resume_from_checkpoint, Path(args.training.output_dir or ".")
    candidates: Iterable[Path] = () if args.finetuning.overwrite_output_dir else valid_checkpoints(output_dir)
    if isinstance(named, str):
        if damage := verify_checkpoint(Path(named)):
            raise UserError(f"resume_from_checkpoint {named} cannot be resumed: {damage}. Name another one, or none.")
        candidates = [Path(named)]
    refusal = ""
    for checkpoint in candidates:
        changes = changed_settings(checkpoint, settings)
        if not changes or (is_other_length(changes) and _has_constant_rate(checkpoint, args, num_steps)):
            return checkpoint
        refusal = refusal or f"{checkpoint} was written with other settings:\n  - " + "\n  - ".join(changes)
        if not is_other_length(changes):  # the older ones belong to that run, too
            break
    if refusal:
        if is_other_length(changes):
            refusal += (
                "\nA run can be made longer or shorter from where its learning rate is constant in both: with lr_scheduler_type "
                f"{WSD}, constant or constant_with_warmup. There is no such checkpoint here."
            )
        raise UserError(
            f"{refusal}\nKeep those settings, choose another output_dir, or set overwrite_output_dir: true (steps: "
            "OVERWRITE=1) to start over."
        )
    return None


def _has_constant_rate(checkpoint: Path, args: TrainArgs, num_steps: int) -> bool:
    """Tells whether the learning rate is constant at a checkpoint, in its own run and in this one of `num_steps`."""
    before, after = read_settings(checkpoint), serialize_settings(args)
    total = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).max_steps
    return all(
        checkpoint_step(checkpoint)
        in constant_steps(
            settings["lr_scheduler_type"],
            settings.get("lr_scheduler_kwargs") or {},
            args.training.get_warmup_steps(steps),
            steps,
        )
        for settings, steps in ((before, total), (after, num_steps))
    )


def check_resumable(checkpoint: Path) -> None:
    """Makes sure that a checkpoint holds the optimizer state.

    Raises:
        UserError: if it holds weights only; says how to continue training from them.
    """
    # DeepSpeed keeps the optimizer's state in global_stepN/, everything else in files named optimizer*.
    if [*checkpoint.glob("optimizer*"), *checkpoint.glob("global_step*")]:
        return
    if (checkpoint / "adapter_config.json").is_file():
        weights = f"set adapter_name_or_path: {checkpoint}"
    else:
        weights = f"copy the tokenizer's files into it and set model_name_or_path: {checkpoint}"
    raise UserError(
        f"{checkpoint} cannot be resumed: it was saved with save_only_model: true, without the state of optimizer, "
        f"learning rate schedule and random number generators. To start a new schedule from its weights, {weights} and another "
        "output_dir. To be able to resume a run, train with save_only_model: false."
    )


def resume_hint(args: TrainArgs) -> str:
    """Says how a run that was stopped goes on."""
    if args.training.save_only_model:
        return "save_only_model: true: it holds weights only, and the run cannot be resumed from it."
    given = {
        "overwrite_output_dir (steps: OVERWRITE=1)": args.finetuning.overwrite_output_dir,
        "resume_from_checkpoint": isinstance(args.training.resume_from_checkpoint, str),
    }
    if any(given.values()):
        return f"Run it again without {' and '.join(name for name, is_given in given.items() if is_given)} to resume."
    return "The same command resumes from there."
