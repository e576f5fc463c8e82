"""The most used settings of transformers' `TrainingArguments`, with limits of this trainer; all others are accepted, too."""

from dataclasses import dataclass

from llmtuner.hparams.setting import ABOVE_0, AT_LEAST_1, BELOW_1, NOT_NEGATIVE, RATIO_OR_STEPS, UINT32, setting

MAX_STEPS = (lambda value: value == -1 or value >= 1, "a number of steps, or left out to train num_train_epochs")
NAMES_AND_VALUES = (lambda value: all("=" in part for part in value.split(",")), "name=value, with commas between")
# Settings of transformers that do not change what is learned (patterns).
RESUME_SAFE = (
    *("logging_*", "log_*", "save_*", "eval_*", "per_device_eval_batch_size", "*_full_eval", "debug", "disable_tqdm"),
    *("report_to", "run_name", "project", "trackio_*", "hub_*", "push_to_hub", "skip_memory_metrics", "output_dir"),
    *("resume_from_checkpoint", "do_train", "do_eval", "local_rank", "use_cpu", "ddp_timeout", "ddp_backend"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("dataloader_multiprocessing_context", "*_checkpointing*", "torch_empty_cache_steps", "auto_find_batch_size"),
)


@dataclass(frozen=True)
class TrainerArguments:
    """Settings of the training loop, with the defaults of `TrainingArguments`, which a run uses itself."""

    output_dir: str | None = setting(None, "Directory of the adapter, its checkpoints and its log.")
    do_train: bool = setting(False, "Train; true unless do_eval alone is given.")
    do_eval: bool = setting(False, "Measure the eval loss; alone, nothing is trained.")
    per_device_train_batch_size: int = setting(8, "Sequences in one forward pass of one process.", AT_LEAST_1)
    per_device_eval_batch_size: int = setting(8, "The same when evaluating.", AT_LEAST_1)
    gradient_accumulation_steps: int = setting(1, "Forward and backward passes before each update.", AT_LEAST_1)
    auto_find_batch_size: bool = setting(
        False, "On a GPU: halve per_device_train_batch_size until a step fits, and double gradient_accumulation_steps."
    )
    num_train_epochs: float = setting(3.0, "Passes through the training set.", ABOVE_0)
    max_steps: int = setting(-1, "Updates to make, instead of num_train_epochs.", MAX_STEPS)
    learning_rate: float = setting(5e-5, "The peak learning rate.", NOT_NEGATIVE)
    lr_scheduler_type: str = setting(
        "linear", "Learning rate schedule: linear, cosine, constant, warmup_stable_decay, ..."
    )
    warmup_ratio: float | None = setting(None, "Ratio of all steps over which the learning rate rises.", BELOW_1)
    warmup_steps: float = setting(0, "Steps over which it rises.", RATIO_OR_STEPS)
    optim: str = setting("adamw_torch_fused", "Optimizer, by transformers' name.")
    optim_args: str | None = setting(None, "Its further arguments.", NAMES_AND_VALUES)
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", NOT_NEGATIVE)
    adam_beta1: float = setting(0.9, "Decay of the first moment.", BELOW_1)
    adam_beta2: float = setting(0.999, "Decay of the second moment.", BELOW_1)
    adam_epsilon: float = setting(1e-8, "Added to the denominator.", NOT_NEGATIVE)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm; 0: they are not.", NOT_NEGATIVE)
    label_smoothing_factor: float = setting(0.0, "Label smoothing.", unsupported="the loss is plain cross-entropy")
    average_tokens_across_devices: bool = setting(
        True, "Average the loss over the tokens of all ranks.", unsupported="the loss is normalised over all ranks"
    )
    bf16: bool = setting(False, "Compute in bf16; a CPU without bf16 support computes in fp32.")
    fp16: bool = setting(False, "Compute in fp16; needs a GPU.")
    gradient_checkpointing: bool | None = setting(None, "Recompute activations; left out: if memory is short.")
    eval_strategy: str = setting("no", "When to evaluate: no, steps or epoch.")
    eval_steps: float | None = setting(None, "Steps between evaluations; by default logging_steps.", ABOVE_0)
    eval_on_start: bool = setting(False, "Evaluate before the first step, too.")
    do_predict: bool = setting(False, "Predict.", unsupported="a run trains, or measures the eval loss (do_eval)")
    logging_steps: float = setting(500, "Steps between lines of the log.", ABOVE_0)
    report_to: str | list[str] | None = setting("none", "Where the log goes, too: tensorboard, wandb, ... or a list.")
    save_strategy: str = setting("steps", "When to save a checkpoint: no, steps or epoch.")
    save_steps: float = setting(500, "Steps between checkpoints.", ABOVE_0)
    save_total_limit: int | None = setting(None, "Keep this many of the newest checkpoints, and the best.", AT_LEAST_1)
    greater_is_better: bool | None = setting(
        None, "How metric_for_best_model is read.", unsupported="all figures of the log are better the lower they are"
    )
    resume_from_checkpoint: str | None = setting(None, "Checkpoint to resume from; by default the latest valid one.")
    seed: int = setting(42, "Seed of the adapter's first weights, and of the order of the data.", UINT32)
    data_seed: int | None = setting(None, "Seed of the order of sequences; by default seed.", UINT32)
    dataloader_num_workers: int = setting(0, "Processes that prepare batches.", NOT_NEGATIVE)
    deepspeed: str | dict | None = setting(None, "DeepSpeed configuration: a JSON file such as ds_config_zero2.json.")
