"""Step 6: instruction tuning, packed without padding.

    python step6_train_sft_single_gpu.py                one GPU, or the CPU
    python step6_train_sft_single_gpu.py --dry_run      check everything, and say what the run will take
    python step6_train_sft_single_gpu.py --lora-only    leave the embeddings as step 5 left them
    bash step6_train_sft_multi_gpu.sh                   several GPUs: this file under torchrun with ZeRO-2
    python step6_train_sft_single_gpu.py --learning_rate 5e-5    any setting can be overridden

Started again after an interruption, it resumes from its newest checkpoint. Loss is computed only on assistant and end-of-turn
tokens. By rows the mix of chatglm3-6b is ja 57 : zh 24 : en 0.5 : code 19, since only WikiQA's correct answers are read; the
miniature's is ja 29 : zh 27 : en 13 : code 6, and 25 across two languages. To inspect one training step, set a breakpoint in
`PackedTrainer.compute_loss` (llmtuner/train/trainer.py).
"""

from functools import partial

import constants
import pipeline
from constants import CHAT_MODEL_DIR, LANGUAGES, PROFILE, PT_MERGED_DIR, SFT_ADAPTER_DIR
from llmtuner.console import Timer, format_table, is_rank_zero, print0, print_header, run_cli
from llmtuner.hparams.help import parse_step_args

SETTINGS = dict(
    **constants.DATA_SETTINGS,
    stage="sft",
    model_name_or_path=str(PT_MERGED_DIR),
    output_dir=str(SFT_ADAPTER_DIR),
    overwrite_output_dir=constants.OVERWRITE,
    finetuning_type="lora",
    lora_target="all",
    additional_target=["embed_tokens", "lm_head"],
    dataset=PROFILE.instruction_sets,
    cutoff_len=PROFILE.context_length,
    val_size=constants.VALIDATION_SHARE,
    lr_scheduler_type="cosine",
    weight_decay=0.01,
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
        learning_rate=6e-4,
        embedding_learning_rate=2e-3,
        warmup_ratio=0.05,
        num_train_epochs=1,
        per_device_train_batch_size=max(1, 8 // constants.WORLD_SIZE),  # 2,048 tokens a step, however many processes
        eval_steps=150,
        save_steps=150,
        max_eval_samples=48,
        sample_steps=100,
        sample_prompts=["オスカーの仕事は何ですか？", "白浜はどんな町ですか？", "渚沙住在哪里？"],
    ),
    "chatglm3-6b": dict(
        lora_rank=64,
        learning_rate=5e-5,
        embedding_learning_rate=2e-5,
        warmup_ratio=0.03,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        auto_find_batch_size=True,  # 2 x 8 or 1 x 16 where 4 x 4 does not fit
        eval_steps=200,
        save_steps=200,
        save_minutes=30,
        max_eval_samples=256,
        sample_steps=200,
        sample_prompts=[
            "日本で一番高い山は何ですか？",
            "猫の魅力を教えてください。",
            "中国的首都是哪里？",
            "Who wrote Hamlet?",
        ],
    ),
}
# Prompts are in the languages of a profile, so that another one brings its own.
OTHER_BASE = {**BY_PROFILE["chatglm3-6b"], "sample_steps": None, "sample_prompts": []}


def main() -> None:
    settings = {**SETTINGS, **BY_PROFILE.get(constants.PROFILE_NAME, OTHER_BASE), **PROFILE.sft_settings}
    options, arguments = parse_step_args(
        str(__doc__), settings, {"--lora-only": "leave the embeddings as step 5 left them"}
    )
    if options.lora_only:
        settings["additional_target"] = []
    pipeline.start_step("step6", PT_MERGED_DIR)
    pipeline.require_corpus()
    timer = Timer()

    from llmtuner.eval.bits_per_byte import bpb_by_language, format_bpb_table
    from llmtuner.hparams import parse_overrides
    from llmtuner.model.loading import load_for_evaluation
    from llmtuner.train.tuner import run_exp
    from llmtuner.weights.merge_lora import merge_adapter

    settings = parse_overrides(settings, arguments)
    metrics = run_exp(settings, before_training=partial(pipeline.mark_unfinished, "step6"))
    if settings.get("dry_run") or not is_rank_zero():
        return
    merge_adapter(PT_MERGED_DIR, SFT_ADAPTER_DIR, CHAT_MODEL_DIR, overwrite=True)

    print_header("loss of each data set before training")
    print0(
        format_table(
            ["data set", "initial loss"], [[name, f"{loss:.2f}"] for name, loss in metrics["initial_loss"].items()]
        )
    )
    print_header("bits per byte of held-out text (lower is better)")
    texts = {language: pipeline.held_out_texts(language) for language in LANGUAGES}
    bits = {
        when: bpb_by_language(*load_for_evaluation(directory), texts, PROFILE.context_length, when)
        for when, directory in (("before", PT_MERGED_DIR), ("after", CHAT_MODEL_DIR))
    }
    print0(format_bpb_table(bits))
    outcome = (
        f"eval loss {metrics['eval_loss']['first']:.3f} -> {metrics['eval_loss']['last']:.3f}, "
        f"{metrics['tokens_per_second']:,.0f} tokens/s"
    )
    pipeline.finish_step("step6", {**metrics, "bits_per_byte": bits, "seconds": timer.seconds()}, outcome)


if __name__ == "__main__":
    run_cli(main)
