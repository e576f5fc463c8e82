"""What tests of the report share: metrics of a whole run."""

import copy
import json
import shutil

from llmtuner.report.steps import Step

LADDER_CELL = {"n": 120, "accuracy": 0.25, "accuracy_interval": [0.181, 0.3344]}
LADDER_CELL |= {"names_subject": 0.8, "names_subject_interval": [0.7199, 0.8617]}
LADDER = {
    "told": {"ja_ja": LADDER_CELL},
    "untold_unnamed": {"ja_ja": LADDER_CELL | {"accuracy": 0.05}, "pivot": LADDER_CELL},
}
ATTACK = "<script>alert(1)</script>"
STEPS = [
    Step("step1", "step1_train_tokenizer.py", "Train a tokenizer", ("corpora",), "pieces"),
    Step("step2", "step2_merge_tokenizer.py", "Merge it", ("base tokenizer", "pieces"), "merged tokenizer"),
    Step("step3", "step3_resize_model.py", "Resize the embeddings", ("base model", "merged tokenizer"), "Zero model"),
    Step("step4", "step4_test_zero.py", "Zero test", ("Zero model",), "zero test"),
    Step("step5", "step5_train_pt_single_gpu.py", "Pretraining", ("Zero model", "mix"), "pretrained model"),
    Step("step6", "step6_train_sft_single_gpu.py", "Tuning", ("pretrained model", "instructions"), "chat model"),
    Step("step7", "step7_eval_chat.py", "Evaluate", ("chat model",), "report"),
]
MODELS = ("base", "zero", "pretrained", "chat")
LOOP = "同じことを何度も言う。"
SENTENCE = ["▁", "私", "<0xE3>", "<0x81>", "<0xAF>", " ", ATTACK]
CANDIDATE = {"longest_loop": 9, "mean_loop": 1.5, "finished_ratio": 0.95, "tokens_per_second": 1234.5}
CONFUSION = {"line_pass_rate": 0.99, "lines": 300, "undecided_lines": 5, "responses": 198, "undecided_responses": 2}
METRICS = {
    "step1": {"skipped": 0, "new_pieces": 900, "input_bytes": 2_961_403},
    "step2": {
        "special_ids_kept": True,
        "unreachable_tokens": 0,
        "added_pieces": 900,
        "changed_texts": {"zh": 0, "en": 0},
        "texts": {"ja": 104, "zh": 96, "en": 95},
        "token_ratio": {"ja": 0.2684},
        "segmentations": {
            "ja": {"text": "私は", "before": SENTENCE, "after": [" 私は"]},
            "zh": {"text": "柳树", "before": [" 柳", "树"], "after": [" 柳", "树"]},
            "en": {"text": "a b", "before": [" a", " b"], "after": [" a", " b"]},
        },
    },
    "step3": {"old_rows": 2432, "new_rows": 3328, "old_rows_identical": True, "old_logits_max_diff": 1e-6},
    "step4": {
        "zh": {"total": 60, "identical": 60},
        "en": {"total": 50, "identical": 50},
        "ja": {"total": 60, "correct": 0},
        "tokens_per_character": {
            "base": {"ja": 2.4484, "zh": 0.9, "en": 0.4},
            "zero": {"ja": 0.6572, "zh": 0.9, "en": 0.4},
        },
        "bits_per_byte": {"base": {"ja": 13.9787, "zh": 0.61, "en": 0.63}},
    },
    "step5": {
        "tokens": 798_720,
        "padding_ratio": 0.00124,
        "bits_per_byte": {"before": {"ja": 3.6648}, "after": {"ja": 0.3183, "zh": 0.62, "en": 0.6}},
        "wall_seconds": 7_384.2,
        "processes": 4,
        "device": "NVIDIA GeForce RTX 4090",
        "peak_memory_gb": 21.34,
        "mfu": 0.413,
        "price_per_hour": 0.5,
        "best": {"metric": "eval_bits_per_byte_ja", "step": 3, "value": 0.31834},
        "samples": [
            {"step": step, "prompt": prompt, "answer": f"{ATTACK}{step}" + LOOP * 2 * (step == 14)}
            for step in range(15)
            for prompt in ("山は？", "河？")
        ],
        "data": {
            "wikipedia_ja": {"target_ratio": 0.64, "ratio": 0.65},
            "aozora_ja": {"target_ratio": 0.36, "ratio": 0.35},
        },
    },
    "step6": {
        "tokens": 1_454_032,
        "padding_ratio": 0.0499,
        "train_loss": {"first": 2.0349, "last": 0.1753},
        "eval_loss": {"first": 1.9952, "last": 0.2514},
        "data": {"dolly_ja": {"target_ratio": None, "ratio": 1.0}},
    },
    "step7": {
        "decoding": {model: {"do_sample": False} for model in MODELS} | {"chat": {"repetition_penalty": 1.1}},
        "accuracy": {
            model: {"zh": 1.0, "en": 0.995, "ja": 0.0 if model == "base" else 0.96, "ja_unseen": None}
            for model in MODELS
        },
        "bits_per_byte": {model: {"ja": 13.9787, "zh": 0.6136, "en": 0.6351} for model in MODELS},
        "bits_per_byte_interval": {model: {"ja": [13.5, 14.25]} for model in MODELS},
        "agreement": {model: {"zh": {"identical": 0.335, "similar": 0.7812}} for model in MODELS},
        "language_confusion": {model: {"ja": CONFUSION | {"response_pass_rate": 0.9996}} for model in MODELS},
        "repetition": {model: {"ja": 0.1845} for model in MODELS},
        "free_answers": {model: {**CANDIDATE, "repeated_4gram_ratio": 0.1845} for model in MODELS},
        "generation": {
            "candidates": {
                "greedy": {
                    "settings": {"do_sample": False},
                    **CANDIDATE,
                    "repeated_4gram_ratio": 0.2,
                    "accuracy": None,
                },
                "penalty": {
                    "settings": {"repetition_penalty": 1.1},
                    **CANDIDATE,
                    "repeated_4gram_ratio": 0.2,
                    "accuracy": 0.9,
                },
            },
            "chosen": "penalty",
        },
    },
    "suite_ja_chat": {
        "suite": "ja",
        "model": "/models/chat_model",
        "harness": "0.4.13",
        "limit": 50,
        "tasks": {"jnli": {"acc": 0.31, "acc_stderr": 0.066, "n": 50, "few_shot": 3}},
    },
}
ANSWERS = [
    {"group": "ja", "language": "ja", "question": f"同じ{number}？", "right": "答え"}
    | dict.fromkeys(MODELS, "山です。")
    | {"chat": "はい、答えです。"}
    for number in range(4)
] + [
    {
        "group": "ja",
        "language": "ja",
        "question": ATTACK,
        "right": "木",
        "base": "no",
        "zero": "",
        "pretrained": LOOP * 3,
    }
    | {"chat": f"答えは木。{ATTACK}\u2028{'X' * 300}"},
    {"group": "ja_free", "language": "ja", "question": "話して。", "right": None} | dict.fromkeys(MODELS, "はい\ud800"),
]
LOG = [
    {"step": 0, "eval_loss": 8.0},
    {"step": 1, "loss": 9.0, "learning_rate": 1e-4, "tokens_per_second": 900.0},
    {"step": 2, "loss": 7.0, "learning_rate": 2e-4, "tokens_per_second": 950.0},
    {"step": 3, "loss": 6.0, "learning_rate": 1e-4, "tokens_per_second": 910.0},
    {"step": 3, "eval_loss": 6.5},
]


def put(work_dir, metrics):
    shutil.rmtree(work_dir / "metrics", ignore_errors=True)
    (work_dir / "metrics").mkdir()
    for name, content in metrics.items():
        (work_dir / "metrics" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def changed(path, value):
    """`METRICS` with another value in one place; None takes the place away."""
    metrics = copy.deepcopy(METRICS)
    *names, last = path.split("/")
    place = metrics
    for name in names:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return metrics


SETTINGS = {"stage": "sft", "seed": 42, "num_train_epochs": 1, "additional_target": [], "output_dir": "somewhere"}
NUM_QUESTIONS = 40


def save_run(directory, losses=(2.0, 1.0, 0.5), log=True, **settings):
    """An output_dir of step 6 or of a run by itself."""
    directory.mkdir(parents=True)
    entries = [{"step": 0, "eval_loss": 3.0}]
    entries += [{"step": step, "loss": loss, "grad_norm": 1.0} for step, loss in enumerate(losses, 1)]
    entries += [{"step": len(losses), "eval_loss": losses[-1], "eval_bits_per_byte_ja": losses[-1] / 2}]
    if log:
        (directory / "trainer_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    made = SETTINGS | {"output_dir": str(directory)} | settings
    (directory / "training_args.json").write_text(json.dumps(made))
    return directory


def save_work_dir(directory, correct, losses=(2.0, 1.0, 0.5), asked="問", **settings):
    """A WORK_DIR after steps 6 and 7, whose chat model answers the first `correct` of 40 questions correctly."""
    save_run(directory / "step6_sft_adapter", losses, **settings)
    (directory / "metrics").mkdir()
    step7 = copy.deepcopy(METRICS["step7"])
    step7["accuracy"]["chat"] = {"ja": correct / NUM_QUESTIONS}
    for name, content in {"step6": METRICS["step6"] | {"wall_seconds": 61}, "step7": step7}.items():
        (directory / "metrics" / f"{name}.json").write_text(json.dumps(content))
    rows = [
        {"group": "ja", "language": "ja", "question": f"{asked}{number}？", "right": "山", "chat": f"{ATTACK}{correct}"}
        | {"correct": {"chat": number < correct}}
        for number in range(NUM_QUESTIONS)
    ]
    (directory / "answers.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return directory
