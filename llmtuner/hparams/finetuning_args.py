"""What is trained: the stage, LoRA, embeddings, and how the loss is computed."""

from dataclasses import dataclass
from typing import Literal

from llmtuner.hparams.setting import ABOVE_0, AT_LEAST_1, BELOW_1, NOT_NEGATIVE, setting

EMBEDDING_MODULES = ("embed_tokens", "lm_head")
LAYERS = (lambda value: value != 0, "the number of the last layers, or of the first if negative")


@dataclass(frozen=True)
class FinetuningArguments:
    """Settings of the method."""

    stage: Literal["pt", "sft"] = setting("pt", "Continued pretraining on documents, or tuning on dialogues.")
    finetuning_type: Literal["lora", "full", "freeze"] = setting(
        "lora", "lora: adapters, and additional_target in full; full: every parameter; freeze: some layers or modules."
    )
    lora_rank: int = setting(8, "Rank of the adapters' matrices.", AT_LEAST_1)
    lora_alpha: float | None = setting(None, "Scale of the adapter; by default twice the rank.", ABOVE_0)
    lora_dropout: float = setting(0.0, "Dropout of an adapter's inputs.", BELOW_1)
    lora_target: list[str] = setting(
        ["all"], "Modules that get an adapter: names, or `all` linear layers except the output layer."
    )
    additional_target: list[str] = setting([], "Modules trained in full beside it, such as embed_tokens and lm_head.")
    train_new_tokens_only: bool = setting(
        False, "Of embed_tokens and lm_head in additional_target, train only the rows that step 3 appended."
    )
    freeze_trainable_layers: int | None = setting(
        None, "With freeze: how many of the last layers are trained; left out: 2, none with additional_target.", LAYERS
    )
    freeze_trainable_modules: list[str] = setting(
        ["all"], "With freeze: which modules of those layers, such as self_attn or mlp; `all` of them."
    )
    freeze_extra_modules: list[str] = setting([], "With freeze: modules outside the layers that are trained, too.")
    loraplus_lr_ratio: float | None = setting(
        None, "LoRA+ (arXiv 2402.12354): the B matrices' learning rate is learning_rate times this.", ABOVE_0
    )
    use_rslora: bool = setting(
        False, "Scale by alpha / sqrt(rank), for high ranks (arXiv 2312.03732); set lora_alpha then."
    )
    use_dora: bool = setting(False, "Train each weight row's magnitude apart from its direction (arXiv 2402.09353).")
    embedding_learning_rate: float | None = setting(
        None, "Learning rate of the embedding matrices; by default that of everything else.", NOT_NEGATIVE
    )
    use_muon: bool = setting(
        False, "Muon (arXiv 2502.16982) updates the hidden matrices, and optim what remains: embeddings, norms, biases."
    )
    fused_ops: bool = setting(True, "LoRA, norms, attention and MLP in fewer passes: in bf16, and in fp32 on a CPU.")
    chunked_loss: bool = setting(True, "Compute logits and their gradients in chunks instead of all at once.")
    metric_for_best_model: str | None = setting(
        None,
        "Keep the checkpoint with the lowest value of this figure of the log, such as eval_bits_per_byte_ja.",
        resume_safe=True,
    )
    max_retention_loss: float | None = setting(
        None,
        "Of those where no other language or data set got worse than before training by more than this ratio.",
        NOT_NEGATIVE,
        resume_safe=True,
    )
    load_best_model_at_end: bool = setting(
        False, "Save the weights of the best checkpoint (by default of eval_loss), not the last ones.", resume_safe=True
    )
    early_stopping_steps: int | None = setting(
        None,
        "Stop once metric_for_best_model, or eval_loss, has not improved for so many evaluations.",
        AT_LEAST_1,
        resume_safe=True,
    )
    save_minutes: float | None = setting(
        None,
        "Save a checkpoint at least so often, too: a killed run loses no more training than that.",
        ABOVE_0,
        resume_safe=True,
    )
    divergence_factor: float = setting(
        3.0,
        "Loss or gradient norm above so many times its running median is high.",
        (lambda value: 1 < value < float("inf"), "greater than 1"),
        resume_safe=True,
    )
    divergence_steps: int = setting(
        10,
        "Stop after so many steps in a row with a high loss or gradient norm; 0: never (so with disable_shuffling).",
        NOT_NEGATIVE,
        resume_safe=True,
    )
    dry_run: bool = setting(
        False,
        "Check everything, measure a few real steps, print what the run will take, and leave nothing.",
        resume_safe=True,
    )
    price_per_hour: float | None = setting(
        None, "Price of one GPU for an hour, in any currency, for the cost of a run.", NOT_NEGATIVE, resume_safe=True
    )
    sample_steps: int | None = setting(
        None,
        "Answer sample_prompts before the first step, after every so many and after the last.",
        AT_LEAST_1,
        resume_safe=True,
    )
    sample_prompts: list[str] = setting(
        [], "Beginnings of documents (pt) or questions (sft) to answer; a list if they have commas.", resume_safe=True
    )
    plot_loss: bool = setting(False, "Draw training_loss.png and eval_loss.png into output_dir.", resume_safe=True)
    overwrite_output_dir: bool = setting(
        False, "Delete an earlier run's checkpoints in output_dir instead of resuming from them.", resume_safe=True
    )
