"""Memory of one training step of ChatGLM3-6B, grown, on one GPU: computed by the trainer's own estimate.

    python -m benchmarks.memory_budget        writes docs/memory.md; takes 6 GB and a minute

The estimate (`llmtuner/train/memory.py`) looks at models of one and two layers of the full width, with everything else in full
size, and is drawn out to 28: every part grows evenly with the layers. tests/test_memory.py compares it with what small models
really keep.
"""

from dataclasses import fields
from pathlib import Path

import torch
from transformers import GlmConfig, GlmForCausalLM
from transformers.initialization import no_init_weights

from benchmarks.scaling import table
from llmtuner.hparams import FinetuningArguments
from llmtuner.model.adapters import prepare_for_training
from llmtuner.model.growing import APPENDED_ROWS
from llmtuner.train.memory import StepMemory, step_memory

PAGE = Path(__file__).resolve().parent.parent / "docs" / "memory.md"
LAYERS, ROWS, RANK = 28, 78_592, 64
CARDS = {"24 GB": 23e9, "40 GB": 38e9, "80 GB": 76e9}  # what can be used of each
BOTH = dict(additional_target=["embed_tokens", "lm_head"])
NEW = dict(**BOTH, embedding_rows="new")
# What is trained beside LoRA, and the optimizer's bytes for each trained number.
RECIPES = {
    "LoRA and both matrices": (BOTH, 8),
    "LoRA and both matrices, 8-bit Adam": (BOTH, 2),
    "LoRA and new rows": (NEW, 8),
    "LoRA and new rows, 8-bit Adam": (NEW, 2),
    "LoRA alone": ({}, 8),
}
BATCHES = ((1, 1024), (4, 1024))


def model_of(layers: int, beside: dict) -> torch.nn.Module:
    config = GlmConfig(
        vocab_size=ROWS,
        hidden_size=4096,
        intermediate_size=13_696,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        attention_bias=True,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with no_init_weights():
        base = GlmForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    setattr(base.config, APPENDED_ROWS, [64_798, 78_554])
    return prepare_for_training(base, FinetuningArguments(lora_rank=RANK, **beside))


def estimate(models: list[torch.nn.Module], rows: int, length: int, checkpointing: bool, optimizer: int) -> StepMemory:
    """Drawn out from one and two layers."""
    one, two = (step_memory(model, rows, length, False, torch.bfloat16, optimizer) for model in models)
    parts = {
        part.name: getattr(one, part.name) + (LAYERS - 1) * (getattr(two, part.name) - getattr(one, part.name))
        for part in fields(StepMemory)
    }
    if checkpointing:  # as the estimate has it
        parts["activations"] = parts["activations"] // LAYERS + LAYERS * rows * length * 4096 * 4
    return StepMemory(**parts)


def main() -> None:
    lines = []
    for name, (beside, optimizer) in RECIPES.items():
        models = [model_of(layers, beside) for layers in (1, 2)]
        for rows, length in BATCHES:
            for checkpointing in (True, False):
                needed = estimate(models, rows, length, checkpointing, optimizer)
                numbers = [getattr(needed, part.name) for part in fields(StepMemory)] + [needed.total]
                fits = next((card for card, room in CARDS.items() if needed.total <= room), "none")
                how = "again" if checkpointing else "kept"
                lines.append([name, f"{rows} x {length:,}", how, *(f"{one / 1e9:.1f}" for one in numbers), fits])
                print(lines[-1], flush=True)
        del models
    header = [
        "trained",
        "micro-batch",
        "activations",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "loss",
        "total",
    ]
    PAGE.write_text(
        f"""# Memory of a training step

`python -m benchmarks.memory_budget` writes this page. ChatGLM3-6B grown to 78,592 rows, LoRA of rank 64 on all linear layers,
bf16, one GPU, GB. **Computed, not measured on a GPU.** It is the trainer's own estimate (`llmtuner/train/memory.py`), by which a
run on a GPU decides whether activations are kept or computed again (`gradient_checkpointing`, if it is left out): weights,
gradients and the optimizer's state by their sizes, activations by counting what autograd keeps of a forward pass. Tests
compare the count with small models on a CPU: equal with attention in plain products, up to 12 % more than the fused kernel keeps.
Measured peak on a GPU: not measured.

{table([*header, "fits a card of"], lines)}

Weights hold the frozen model in bf16 and what is trained in fp32; where both matrices are trained, the frozen originals, which
peft would keep (1.3 GB), are freed. Of a card's memory 23, 38 and 76 GB are counted on. "loss" is one chunk of logits with its gradients, and where the
output matrix is trained its copy in bf16 and its gradient while it is formed.

**One card of 24 GB**: train the new rows alone (`embedding_rows: new`), or both matrices with an optimizer in 8 bits
(`optim: adamw_8bit`, which needs `pip install bitsandbytes`), with `per_device_train_batch_size: 1` and activations computed
again, where the table says that it fits.
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
