"""Memory of one training step of ChatGLM3-6B, grown, on one GPU: a step followed tensor by tensor, beside the trainer's estimate.

    python -m benchmarks.memory_budget        writes docs/memory.md and its JSON; some minutes of one core, no GPU

All 28 layers are there, as tensors without content: every operation of forward pass, loss and backward pass is gone through, and
the bytes of all tensors that live at the same time are added up. So rounding up, fragments and the kernels' own buffers are not
in it. tests/unit/train/test_memory.py follows small models with real tensors and compares them with the estimate.
"""

import weakref
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GlmConfig, GlmForCausalLM

from benchmarks.scaling import markdown_table
from llmtuner.files import atomic_write_json
from llmtuner.hparams import FinetuningArguments
from llmtuner.model.adapters import init_adapter
from llmtuner.model.model_dir import APPENDED_ROWS
from llmtuner.report.environment import environment
from llmtuner.train import loss
from llmtuner.train.memory import estimate_step_memory
from llmtuner.train.trainer import PackedTrainer

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "memory.md", ROOT / "benchmarks" / "results" / "memory_budget.json"
ROWS, WIDTH, RANK, LENGTH = 78_592, 4_096, 64, 1_024
MICRO_BATCHES = 2  # the second finds the gradients of the first: as with any accumulation
CARDS = {"24 GB": 23e9, "40 GB": 38e9, "80 GB": 76e9}  # what can be used of each
BOTH = dict(additional_target=["embed_tokens", "lm_head"])
NEW = dict(**BOTH, train_new_tokens_only=True)
# What is trained beside LoRA, and the optimizers by their bytes for each trained number.
RECIPES = {"LoRA and both matrices": (BOTH, (8, 2)), "LoRA and new rows": (NEW, (8, 2)), "LoRA alone": ({}, (8,))}
PHASES = ("forward", "loss", "backward")


class LivingTensors(TorchDispatchMode):
    """Adds up the bytes of all tensors that live at the same time, each memory once, and keeps the most in each phase."""

    def __init__(self, before: Any) -> None:
        """`before`: tensors that are there already."""
        super().__init__()
        self.now, self.phase, self.most = 0, "before", Counter[str]()
        self.known: set[int] = set()
        for tensor in before:
            self._meet(tensor)

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operation(*args, **(kwargs or {}))
        for one in tree_leaves(results):
            if isinstance(one, torch.Tensor):
                self._meet(one)
        self.most[self.phase] = max(self.most[self.phase], self.now)
        return results

    def _meet(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place not in self.known:
            self.known.add(place)
            self.now += size
            weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def follow_step(model: Any, rows: int, length: int, checkpointing: bool, dtype: torch.dtype) -> dict[str, int]:
    """The most bytes of living tensors in each phase of a step of `MICRO_BATCHES`, without the optimizer's state.

    The loss is the trainer's own, and so is what stands under autocast: accelerate puts the model's forward pass under it.

    Args:
        model: prepared for training, with real tensors or, under `FakeTensorMode`, with fakes.
        rows, length: of a micro-batch.
        dtype: autocast's; fp32 means none.
    """
    causal_lm, autocast = model.get_base_model(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    trainer: Any = SimpleNamespace(model=model, finetuning_args=FinetuningArguments(), hidden=None)
    living = LivingTensors([*model.parameters(), *model.buffers()])

    def keep_hidden(_: Any, __: Any, outputs: Any) -> None:
        trainer.hidden = outputs.last_hidden_state
        living.phase = "loss"

    ids = torch.zeros(rows, length, dtype=torch.long)
    positions = torch.arange(length).expand(rows, -1)
    batch = {
        "input_ids": ids,
        "labels": ids,
        "position_ids": positions,
        "loss_indices": torch.arange(rows * length - 1),
    }
    model.train()
    hook = causal_lm.base_model.register_forward_hook(keep_hidden)
    under_autocast = mock.patch.object(model, "forward", autocast(model.forward))
    # On a GPU more logits are formed at once.
    as_on_a_gpu = mock.patch.object(loss, "CHUNK_NUMEL_CPU", loss.CHUNK_NUMEL)
    with _checkpointing(model, checkpointing), under_autocast, as_on_a_gpu, living:
        for _ in range(MICRO_BATCHES):
            living.phase = "forward"
            summed, _ = PackedTrainer._compute_loss_sum(trainer, model, batch)
            living.phase = "backward"
            summed.backward()
            del summed
    hook.remove()
    model.zero_grad()
    return {phase: living.most[phase] for phase in PHASES}


@contextmanager
def _checkpointing(model: Any, wanted: bool) -> Any:
    if not wanted:
        yield
        return
    model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


def chatglm3(beside: dict[str, Any]) -> Any:
    """ChatGLM3-6B, grown and prepared for training, in memory that is asked for and never touched."""
    config = GlmConfig(
        vocab_size=ROWS,
        hidden_size=WIDTH,
        intermediate_size=13_696,
        num_hidden_layers=28,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        attention_bias=True,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        base = GlmForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    setattr(base.config, APPENDED_ROWS, [64_798, 78_554])
    return init_adapter(base, FinetuningArguments(lora_rank=RANK, **beside)).to_empty(device="cpu")


def without_content(model: Any) -> FakeTensorMode:
    """Puts fakes into the place of a model's tensors; returns the mode under which it computes."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for module in model.modules():
            for name, one in module._parameters.items():
                if one is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty_like(one), one.requires_grad)
            for name, one in module._buffers.items():
                if one is not None:
                    module._buffers[name] = torch.empty_like(one)
    return mode


def budgets() -> list[dict[str, Any]]:
    """Of each recipe, micro-batch and way to keep activations: the estimate's parts and what the step was followed to."""
    found = []
    for name, (beside, optimizers) in RECIPES.items():
        model = chatglm3(beside)
        count = sum(one.numel() for one in model.parameters() if one.requires_grad)
        ways = [(rows, again) for rows in (1, 4) for again in (True, False)]
        estimates = [
            [estimate_step_memory(model, rows, LENGTH, again, torch.bfloat16, optimizer) for optimizer in optimizers]
            for rows, again in ways
        ]
        with without_content(model):
            for (rows, again), of_optimizers in zip(ways, estimates, strict=True):
                phases = follow_step(model, rows, LENGTH, again, torch.bfloat16)
                for optimizer, estimate in zip(optimizers, of_optimizers, strict=True):
                    found.append(
                        {
                            "trained": name + (", 8-bit Adam" if optimizer == 2 else ""),
                            "rows": rows,
                            "activations": "again" if again else "kept",
                            "estimate": {**vars(estimate), "total": estimate.total},
                            "followed": {phase: most + optimizer * count for phase, most in phases.items()},
                        }
                    )
                    print(found[-1], flush=True)
    return found


def main() -> None:
    found = budgets()
    atomic_write_json(RESULTS, {**environment(), "bytes": found})
    PAGE.write_text(page(found), encoding="utf-8")


def page(found: list[dict[str, Any]]) -> str:
    """docs/memory.md."""
    lines, off = [], []
    for one in found:
        parts, most = one["estimate"], max(one["followed"].values())
        off.append(parts["total"] / most - 1)
        needed = max(most, parts["total"])
        fits = next((card for card, room in CARDS.items() if needed <= room), "none")
        parts_gb = [f"{part / 1e9:.1f}" for part in parts.values()]
        ends = [f"{most / 1e9:.1f}", f"{(CARDS['24 GB'] - most) / 1e9:+.1f}", fits, "not measured"]
        lines.append([one["trained"], f"{one['rows']} x {LENGTH:,}", one["activations"], *parts_gb, *ends])
    header = ["trained", "micro-batch", "activations", *(name for name in found[0]["estimate"] if name != "total")]
    header += ["estimate", "followed", "left of 23 GB", "fits a card of", "peak on a GPU"]
    full = next(one for one in found if one["trained"].endswith("8-bit Adam"))
    phases = ", ".join(f"{phase} {most / 1e9:.1f}" for phase, most in full["followed"].items())
    numbers = ROWS * WIDTH
    return f"""# Memory of a training step

`python -m benchmarks.memory_budget` writes this page. ChatGLM3-6B grown to {ROWS:,} rows, LoRA of rank {RANK} on all linear layers,
bf16, one GPU, gradients accumulated; GB. **Computed, not measured on a GPU**, in two ways:

- *estimate*: the trainer's own (`llmtuner/train/memory.py`), by which a run on a GPU decides whether activations are kept or
  computed again (`gradient_checkpointing`, if it is left out), with its parts;
- *followed*: every operation of a step of the full model, over tensors without content; the most bytes of tensors that live at the
  same time, with the optimizer's state. Fragments and the kernels' own buffers come on top.

The estimate lies between {min(off):.0%} and {max(off):+.0%} of what was followed. A card counts as large enough where both fit.

{markdown_table(header, lines)}

Weights are the frozen model in bf16 and what is trained in fp32. Of a card's memory 23, 38 and 76 GB are counted on.

## One card of 24 GB

Both matrices trained, an optimizer in 8 bits (`optim: adamw_8bit`, `pip install bitsandbytes`), `per_device_train_batch_size: 1` and
activations computed again: {max(full["followed"].values()) / 1e9:.1f} GB ({phases}), if the table says that it fits; with the new rows alone
(`train_new_tokens_only: true`) less. Leave `embedding_learning_rate` set, as step 5 has it: without it transformers keeps the input matrix's
Adam in 32 bits, which takes {6 * numbers / 1e9:.1f} GB more.

| what it takes or saves, both matrices trained | GB |
| --- | ---: |
| Adam in 8 bits instead of 32: 6 bytes for each trained number | {6 * (2 * numbers + lora_numbers(found)) / 1e9:.1f} |
| frozen originals of both matrices, which peft would keep beside the trained ones in bf16: freed | {4 * numbers / 1e9:.1f} |
| a second fp32 gradient of the output matrix, which is formed before it is added to the first: not avoided | {4 * numbers / 1e9:.1f} |
"""


def lora_numbers(found: list[dict[str, Any]]) -> int:
    """Trained numbers of LoRA, from the gradients of LoRA alone (fp32)."""
    return next(one["estimate"]["gradients"] for one in found if one["trained"] == "LoRA alone") // 4


if __name__ == "__main__":
    main()
