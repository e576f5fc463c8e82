"""The two entry points of the trainer: `run_exp` trains as the settings say, `export_model` merges and saves."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from llmtuner.console import print0
from llmtuner.env import env_flag
from llmtuner.hparams import TrainArgs, get_train_args
from llmtuner.train.best_checkpoint import check_metric


def run_exp(
    args: dict[str, Any] | str | Path | list[str] | None = None,
    texts: dict[str, list[str]] | None = None,
    before_training: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Trains one stage, or only evaluates if do_train is false.

    Args:
        args: settings as a dict, the path of a YAML file or command-line arguments; None takes those of this process.
        texts: language -> held-out texts, on which bits per byte are logged at every evaluation of the pt stage.
        before_training: called on rank 0 once settings, data and model have been checked, before anything of an earlier
            run is deleted.

    Afterwards nothing of model and optimizer is left in memory.

    Returns:
        metrics: steps, tokens, tokens_per_second, padding_ratio, trainable_parameters, train_loss, eval_loss, data and,
        for the sft stage, initial_loss of each dataset. Of a dry run: the figures of its table.

    Raises:
        UserError: for invalid settings, data or models.
    """
    from llmtuner.train.process import join_processes, release_memory

    checked_args = _checked(args)
    check_metric(checked_args, [*(texts or {})] if checked_args.finetuning.stage == "pt" else [])
    train_args = join_processes(checked_args)
    # Only now: with Trainer comes DeepSpeed, which reads the environment when it is imported.
    from llmtuner.train.checkpointing import lock_output_dir
    from llmtuner.train.dry_run import dry_run
    from llmtuner.train.workflow import run_pt, run_sft

    with lock_output_dir(Path(str(train_args.training.output_dir))):
        if train_args.finetuning.dry_run:
            metrics = dry_run(train_args, partial(join_processes, checked_args), texts or {}, _merged_bytes)
        elif train_args.finetuning.stage == "pt":
            metrics = run_pt(train_args, texts, before_training)
        else:
            metrics = run_sft(train_args, before_training)
    release_memory()
    return metrics


def export_model(args: dict[str, Any] | str | Path | list[str] | None = None) -> Path:
    """Merges an adapter into its base and saves a plain model directory; without an adapter, the model as it is.

    An older result in export_dir is replaced only with overwrite_output_dir: true or OVERWRITE=1 in the environment.

    Raises:
        UserError: if export_dir is missing, or adapter and model do not belong together; as `atomic_directory`.
    """
    from llmtuner.weights.merge_lora import merge_adapter  # training needs nothing of weights/

    train_args = _checked(args, for_export=True)
    model_args = train_args.model
    overwrite = train_args.finetuning.overwrite_output_dir or env_flag("OVERWRITE")
    adapter = Path(model_args.adapter_name_or_path) if model_args.adapter_name_or_path else None
    destination = Path(str(model_args.export_dir))
    merge_adapter(Path(model_args.model_name_or_path), adapter, destination, model_args.export_size, overwrite)
    return destination


def _merged_bytes(base: Path, adapter: Path) -> int:
    """Checks that an adapter can be merged; returns the bytes of the weights of the result."""
    from llmtuner.weights.merge_lora import plan_merge

    return sum(tensor.nbytes for tensor in plan_merge(base, adapter)[0].tensors)


def _checked(args: dict[str, Any] | str | Path | list[str] | None, for_export: bool = False) -> TrainArgs:
    train_args = get_train_args(args, for_export)
    for note in train_args.notes:
        print0(note)
    return train_args
