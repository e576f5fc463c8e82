"""Step 5: continued pretraining on Japanese, with Chinese and English replayed; for chatglm3-6b ja 76 : zh 12 : en 12 by tokens.

    python step5_train_pt_single_gpu.py                         one GPU, or the CPU
    bash step5_train_pt_multi_gpu.sh                            several GPUs: this file under torchrun with ZeRO-2
    python step5_train_pt_single_gpu.py --learning_rate 5e-5    any setting can be overridden
    python step5_train_pt_single_gpu.py --dry_run               check everything, and say what the run will take
    python step5_train_pt_single_gpu.py --staged                embeddings only, then LoRA only, to compare

Started again after an interruption, it resumes from its latest checkpoint.

Trains LoRA on all linear layers together with both embedding matrices in full, then merges the adapter. To inspect one
training step, set a breakpoint in `PackedTrainer.compute_loss` (llmtuner/train/trainer.py).
"""

from functools import partial
from pathlib import Path

import constants
import pipeline
from constants import LANGUAGES, PROFILE, PT_ADAPTER_DIR, PT_MERGED_DIR, ZERO_DIR
from llmtuner.console import Timer, UserError, command, is_rank_zero, print0, print_header, run_cli
from llmtuner.hparams.help import parse_step_args

SETTINGS = dict(
    **constants.DATA_SETTINGS,
    stage="pt",
    model_name_or_path=str(ZERO_DIR),
    output_dir=str(PT_ADAPTER_DIR),
    overwrite_output_dir=constants.OVERWRITE,
    finetuning_type="lora",
    lora_target="all",
    additional_target="embed_tokens,lm_head",
    dataset=list(constants.PRETRAINING_MIX),
    mix_strategy="interleave_under",
    interleave_probs=list(constants.PRETRAINING_MIX.values()),
    cutoff_len=PROFILE.context_length,
    val_size=constants.VALIDATION_SHARE,
    lr_scheduler_type="cosine",
    weight_decay=0.01,
    num_train_epochs=1,
    bf16=True,
    eval_strategy="steps",
    eval_on_start=True,
    logging_first_step=True,
    logging_steps=10,
    save_strategy="steps",
    save_total_limit=2,
    plot_loss=True,
    report_to="none",
    seed=42,
)
BY_PROFILE = {
    "mini": dict(
        lora_rank=32,
        learning_rate=2e-3,
        embedding_learning_rate=2e-3,
        warmup_ratio=0.05,
        per_device_train_batch_size=max(1, 8 // constants.WORLD_SIZE),  # 2,048 tokens a step, however many processes
        eval_steps=150,
        save_steps=150,
        max_eval_samples=48,
        sample_steps=50,
        sample_prompts=["ナギサの仕事は", "宿の広間では、", "渚沙是"],
    ),
    # Ranks and learning rates for a new language: docs/decisions.md. The global batch grows with the number of GPUs.
    "chatglm3-6b": dict(
        lora_rank=64,
        learning_rate=1e-4,
        embedding_learning_rate=5e-5,
        warmup_ratio=0.03,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        auto_find_batch_size=True,  # 2 x 8 or 1 x 16 where 4 x 4 does not fit
        eval_steps=1000,
        save_steps=1000,  # 3.9 hours on 4 x RTX 4090
        save_minutes=30,
        max_eval_samples=256,
        sample_steps=500,
        sample_prompts=["日本で一番高い山は", "吾輩は", "中国的首都是", "The capital of France is"],
    ),
}
# Prompts are in the languages of a profile, so that another one brings its own.
OTHER_BASE = {**BY_PROFILE["chatglm3-6b"], "sample_steps": None, "sample_prompts": []}


def main() -> None:
    settings = {**SETTINGS, **BY_PROFILE.get(constants.PROFILE_NAME, OTHER_BASE), **PROFILE.pt_settings}
    options, arguments = parse_step_args(
        str(__doc__), settings, {"--staged": "train the embeddings only, then LoRA only"}
    )
    pipeline.start_step("step5", ZERO_DIR)
    pipeline.require_corpus()
    timer = Timer()

    from llmtuner.eval.bits_per_byte import bpb_by_language, format_bpb_table
    from llmtuner.hparams import parse_overrides
    from llmtuner.model.loading import load_for_evaluation
    from llmtuner.train.tuner import run_exp
    from llmtuner.weights.merge_lora import merge_adapter

    settings = parse_overrides(settings, arguments)
    base, first_stage = ZERO_DIR, {}
    if options.staged and settings.get("dry_run"):
        raise UserError("--dry_run measures one stage: leave out --staged.")
    if options.staged:
        settings, base, first_stage = train_embeddings_only(settings)
        print_header("second stage: LoRA only")
    texts = {language: pipeline.held_out_texts(language) for language in LANGUAGES}
    metrics = {**run_exp(settings, texts, partial(pipeline.mark_unfinished, "step5")), **first_stage}
    if settings.get("dry_run") or not is_rank_zero():
        return
    merge_adapter(base, PT_ADAPTER_DIR, PT_MERGED_DIR, overwrite=True)

    print_header("bits per byte of held-out text (lower is better)")
    bits = {
        when: bpb_by_language(*load_for_evaluation(directory), texts, PROFILE.context_length, when)
        for when, directory in (("before", ZERO_DIR), ("after", PT_MERGED_DIR))
    }
    print0(format_bpb_table(bits))
    outcome = (
        f"eval loss {metrics['eval_loss']['first']:.3f} -> {metrics['eval_loss']['last']:.3f}, {LANGUAGES.name} bits per byte "
        f"{bits['before'][LANGUAGES.added]:.3f} -> {bits['after'][LANGUAGES.added]:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s"
    )
    pipeline.finish_step("step5", {**metrics, "bits_per_byte": bits, "seconds": timer.seconds()}, outcome)


def train_embeddings_only(settings: dict) -> tuple[dict, Path, dict]:
    """Trains the embeddings only; returns settings and base model of the second stage, LoRA only, and the metrics.

    This is the original project's first recipe. Each stage takes half of the steps, so that the number of tokens equals
    that of the joint recipe.
    """
    from llmtuner.train.tuner import run_exp
    from llmtuner.weights.merge_lora import merge_adapter

    if constants.WORLD_SIZE > 1:
        raise UserError(f"--staged is for one process: run {command('step5_train_pt_single_gpu.py')} --staged.")
    print_header("first stage: embeddings only")
    settings["num_train_epochs"] /= 2
    if "max_steps" in settings:
        settings["max_steps"] //= 2
    output_dir, merged = (PT_ADAPTER_DIR.with_name(f"step5_embeddings_{kind}") for kind in ("adapter", "merged"))
    lora = {name: settings.pop(name) for name in ("lora_target", "lora_rank")}
    learning_rate = settings.pop("embedding_learning_rate")
    stage = dict(finetuning_type="freeze", output_dir=str(output_dir), learning_rate=learning_rate)
    metrics = run_exp({**settings, **stage}, before_training=partial(pipeline.mark_unfinished, "step5"))
    merge_adapter(ZERO_DIR, output_dir, merged, overwrite=True)
    # The second stage takes documents in another order than the first.
    second = dict(model_name_or_path=str(merged), additional_target=[], seed=settings["seed"] + 1)
    return {**settings, **lora, **second}, merged, {"embeddings_only": metrics}


if __name__ == "__main__":
    run_cli(main)
