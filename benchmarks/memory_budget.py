"""Memory of one training step of ChatGLM3-6B, by the trainer's own estimate: recipes on one GPU, and several GPUs.

    python -m benchmarks.memory_budget        two minutes of one core, no GPU; then update_readme

Every tensor of a micro-batch is followed through forward pass, loss and backward pass of all 28 layers, on tensors without
content (llmtuner/train/memory.py). Rounding up, fragmentation and the kernels' own buffers are not in it.
"""

import itertools
from typing import Any

import torch
from transformers import GlmConfig, GlmForCausalLM

from benchmarks.common import CHATGLM3_6B, LORA_RANK, ROOT, Values, make_parser, markdown_table, save_results
from llmtuner.console import run_cli
from llmtuner.hparams import FinetuningArguments, TrainArgs, get_train_args
from llmtuner.model.adapters import init_adapter
from llmtuner.model.attention import VARLEN, register_varlen
from llmtuner.model.fused import apply_fused_ops
from llmtuner.model.model_dir import APPENDED_ROWS
from llmtuner.train.memory import StepEstimator
from llmtuner.train.step_settings import MEMORY_FRACTION, find_step_settings

# Settings of steps 5 and 6 for chatglm3-6b that matter here.
SETTINGS: Values = dict(
    model_name_or_path="chatglm3-6b", dataset="texts", output_dir="runs", bf16=True, cutoff_len=1_024
)
SETTINGS |= dict(lora_rank=LORA_RANK, embedding_learning_rate=5e-5, per_device_train_batch_size=4)
SETTINGS |= dict(gradient_accumulation_steps=4, auto_find_batch_size=True)
ATTENTION = VARLEN  # default_attention's choice on a GPU
# Bytes of each card that a process finds free: what the smallest of its kind has, less 0.6 GB for CUDA itself.
CARDS = {"24 GB": 24.5e9, "48 GB": 47.5e9, "80 GB": 84e9}
EMBEDDINGS = dict(additional_target=["embed_tokens", "lm_head"])
NEW_TOKENS = dict(**EMBEDDINGS, train_new_tokens_only=True)
ADAM, EIGHT_BIT = "adamw_torch_fused", "adamw_8bit"
OPTIMIZERS = {ADAM: "", EIGHT_BIT: ", 8-bit Adam"}
# What is trained beside LoRA.
RECIPES: dict[str, Values] = {"LoRA + embeddings": EMBEDDINGS, "LoRA + new tokens": NEW_TOKENS, "LoRA": {}}
CASES = list(itertools.product((1, 4), (True, False)))  # micro-batch, and whether activations are recomputed
ACTIVATIONS = {True: "recomputed", False: "kept"}


def chatglm3(finetuning: Values, shape: Values = CHATGLM3_6B) -> Any:
    """ChatGLM3-6B with resized embeddings, or another shape, prepared for training, on the meta device."""
    return glm(FinetuningArguments(lora_rank=LORA_RANK, **finetuning), "meta", shape)


def glm(finetuning: FinetuningArguments, device: str, shape: Values) -> Any:
    """A Glm of a shape under GlmConfig's names, prepared for training, made on a device with random weights in bf16."""
    config = GlmConfig(**shape, attention_bias=True, pad_token_id=0, tie_word_embeddings=False)
    setattr(config, APPENDED_ROWS, [64_798, 78_554])
    register_varlen()
    with torch.device(device):
        base = GlmForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=ATTENTION)
        return init_adapter(base, finetuning)


def make_args(**settings: Any) -> TrainArgs:
    """Settings of a run of chatglm3-6b, in bf16 whatever this CPU supports."""
    args = get_train_args({**SETTINGS, **settings})
    args.training.bf16 = True
    return args


def make_estimator(finetuning: Values, **settings: Any) -> StepEstimator:
    """The estimator of a run of chatglm3-6b."""
    model = chatglm3(finetuning)
    apply_fused_ops(model)
    return StepEstimator(model, make_args(**finetuning, **settings))


def measure_recipes() -> list[Values]:
    """Parts of a step on one GPU, by recipe, optimizer and micro-batch."""
    results = []
    for name, finetuning in RECIPES.items():
        estimator = make_estimator(finetuning)
        for (size, recomputed), (optim, text) in itertools.product(CASES, OPTIMIZERS.items()):
            estimate = estimator.variant(optim).estimate(size, recomputed)
            result = {"trained": name + text, "batch_size": size, "recomputed": recomputed}
            results.append({**result, "parts": vars(estimate), "total": estimate.total})
            print(results[-1], flush=True)
    return results


def measure_gpus() -> list[Values]:
    """The recipe of steps 5 and 6 by number of GPUs and how they share a step, and the settings chosen for each card."""
    results = []
    zero = {"deepspeed": str(ROOT / "ds_config_zero2.json")}
    # Under DDP each GPU holds the same, however many there are.
    for sharing, settings, counts in (("none", {}, (1,)), ("DDP", {}, (2,)), ("ZeRO-2", zero, (2, 4, 8))):
        estimator = make_estimator(EMBEDDINGS, **settings)
        for count, optim in itertools.product(counts, OPTIMIZERS):
            variant = estimator.variant(optim, count)
            estimates = [variant.estimate(*case) for case in CASES]
            result: Values = {"gpus": "2, 4, 8" if sharing == "DDP" else str(count), "sharing": sharing, "optim": optim}
            result |= {"totals": [estimate.total for estimate in estimates], "chosen": {}}
            result["buckets"] = max(estimate.buckets for estimate in estimates)
            for card, free in CARDS.items():
                if found := find_step_settings(variant, int(free)):
                    result["chosen"][card] = {**vars(found[0]), "total": found[1].total}
            print(result, flush=True)
            results.append(result)
    return results


def fits(total: float) -> str:
    """The smallest card that has room for a step, as the trainer decides."""
    return next((card for card, free in CARDS.items() if total <= MEMORY_FRACTION * free), "none")


def tables(measured: Values, name: str) -> str:
    """A table of docs/memory.md: recipes, gpus, chosen, savings."""
    return markdown_table(*{"recipes": recipes, "gpus": gpus, "chosen": chosen, "savings": savings}[name](measured))


def recipes(measured: Values) -> tuple[list[str], list[list[str]]]:
    results = measured["recipes"]
    header = ["trained", "micro-batch", "layers", *results[0]["parts"], "total", "fits a card of", "peak on a GPU"]
    lines = []
    for result in results:
        sizes = [f"{size / 1e9:.1f}" for size in (*result["parts"].values(), result["total"])]
        case = [
            result["trained"],
            f"{result['batch_size']} x {SETTINGS['cutoff_len']:,}",
            ACTIVATIONS[result["recomputed"]],
        ]
        lines.append([*case, *sizes, fits(result["total"]), "not measured"])
    return header, lines


def gpus(measured: Values) -> tuple[list[str], list[list[str]]]:
    cases = [f"{size} x {SETTINGS['cutoff_len']:,}, {ACTIVATIONS[recomputed]}" for size, recomputed in CASES]
    lines = []
    for result in measured["gpus"]:
        sizes = [f"{size / 1e9:.1f}" for size in (result["buckets"], *result["totals"])]
        lines.append([result["gpus"], result["sharing"] + OPTIMIZERS[result["optim"]], *sizes])
    return ["GPUs", "shared by", "buckets", *cases], lines


def chosen(measured: Values) -> tuple[list[str], list[list[str]]]:
    lines = []
    for result in measured["gpus"]:
        cells = []
        for card, free in CARDS.items():
            if (settings := result["chosen"].get(card)) is None:
                cells.append("refused")
                continue
            size = f"{settings['per_device_train_batch_size']} x {settings['gradient_accumulation_steps']}"
            just = "" if settings["total"] <= MEMORY_FRACTION * free else ", with a warning"
            layers = ACTIVATIONS[settings["gradient_checkpointing"]]
            cells.append(f"{size}, {layers}: {settings['total'] / 1e9:.1f}{just}")
        lines.append([result["gpus"], result["sharing"] + OPTIMIZERS[result["optim"]], *cells])
    return ["GPUs", "shared by", *CARDS], lines


def savings(measured: Values) -> tuple[list[str], list[list[str]]]:
    matrix = CHATGLM3_6B["vocab_size"] * CHATGLM3_6B["hidden_size"]
    # Gradients are fp32.
    lora = next(result["parts"]["gradients"] for result in measured["recipes"] if result["trained"] == "LoRA") // 4
    sizes = {
        "8-bit Adam instead of 32-bit: 6 bytes per trained parameter": 6 * (2 * matrix + lora),
        "of these, the input matrix's state, which stays in 32 bits without `embedding_learning_rate`": 6 * matrix,
        "frozen originals of both matrices in bf16, which peft would keep: freed": 4 * matrix,
    }
    return ["both matrices trained", "GB"], [[what, f"{size / 1e9:.1f}"] for what, size in sizes.items()]


def main() -> None:
    options = make_parser(__doc__, "memory_budget.json").parse_args()
    save_results(options.output, {"recipes": measure_recipes(), "gpus": measure_gpus()})


if __name__ == "__main__":
    run_cli(main)
