"""Memory of one training step of ChatGLM3-6B on one GPU: a step simulated tensor by tensor, beside the trainer's estimate.

    python -m benchmarks.memory_budget        some minutes of one core, no GPU; then update_readme

The simulation runs every operation of forward pass, loss and backward pass of all 28 layers on fake tensors and adds up the
bytes of those that are alive at the same time. Rounding up, fragmentation and the kernels' own buffers are not in it.
tests of the estimate follow small models with real tensors in the same way.
"""

import itertools
import weakref
from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GlmConfig, GlmForCausalLM

from benchmarks.common import CHATGLM3_6B, LORA_RANK, Values, make_parser, markdown_table, save_results
from benchmarks.training import loss_function
from llmtuner.console import run_cli
from llmtuner.hparams import FinetuningArguments
from llmtuner.model.adapters import init_adapter
from llmtuner.model.model_dir import APPENDED_ROWS
from llmtuner.train import loss
from llmtuner.train.memory import estimate_step_memory

SEQ_LEN = 1_024
MICRO_BATCHES = 2  # the second finds the gradients of the first: as with any accumulation
CARDS = {"24 GB": 23e9, "40 GB": 38e9, "80 GB": 76e9}  # usable bytes of each
EMBEDDINGS = dict(additional_target=["embed_tokens", "lm_head"])
NEW_TOKENS = dict(**EMBEDDINGS, train_new_tokens_only=True)
# What is trained beside LoRA, and the optimizers by their bytes per trained parameter.
RECIPES = {"LoRA + embeddings": (EMBEDDINGS, (8, 2)), "LoRA + new tokens": (NEW_TOKENS, (8, 2)), "LoRA": ({}, (8,))}
PHASES = ("forward", "loss", "backward")


class LiveTensors(TorchDispatchMode):
    """Adds up the bytes of all tensors alive at the same time, each storage once, and keeps the peak of each phase."""

    def __init__(self, existing: Any) -> None:
        """`existing`: tensors that are alive already."""
        super().__init__()
        self.now, self.phase, self.peak = 0, "before", Counter[str]()
        self.known: set[int] = set()
        for tensor in existing:
            self._add(tensor)

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        self.peak[self.phase] = max(self.peak[self.phase], self.now)
        return results

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address not in self.known:
            self.known.add(address)
            self.now += size
            weakref.finalize(storage, self._remove, address, size)

    def _remove(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


def simulate_step(model: Any, batch_size: int, seq_len: int, checkpointing: bool, dtype: torch.dtype) -> dict[str, int]:
    """Peak bytes of live tensors in each phase of a step of `MICRO_BATCHES`, without the optimizer's state.

    The loss is the trainer's own, under autocast as there.

    Args:
        model: prepared for training, with real tensors or, under `FakeTensorMode`, with fake ones.
        batch_size, seq_len: of a micro-batch.
        dtype: autocast's; fp32 means none.
    """
    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    live = LiveTensors([*model.parameters(), *model.buffers()])
    ids = torch.zeros(batch_size, seq_len, dtype=torch.long)
    positions = torch.arange(seq_len).expand(batch_size, -1)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions, "loss_indices": torch.arange(ids.numel() - 1)}
    model.train()
    decoder = model.get_base_model().base_model
    hook = decoder.register_forward_hook(lambda *_: setattr(live, "phase", "loss"))
    # On a GPU the loss forms more logits at once.
    as_on_a_gpu = mock.patch.object(loss, "CHUNK_NUMEL_CPU", loss.CHUNK_NUMEL)
    compute_loss = loss_function(model, FinetuningArguments())
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with as_on_a_gpu, live:
        for _ in range(MICRO_BATCHES):
            live.phase = "forward"
            with autocast:
                summed, _ = compute_loss(batch)
            live.phase = "backward"
            summed.backward()
            del summed
    if checkpointing:
        model.activation_checkpointing_disable()
    hook.remove()
    model.zero_grad()
    return {phase: live.peak[phase] for phase in PHASES}


def chatglm3(finetuning: Values, shape: Values = CHATGLM3_6B) -> Any:
    """ChatGLM3-6B with resized embeddings, or another shape, prepared for training, in memory that is never touched."""
    return glm(FinetuningArguments(lora_rank=LORA_RANK, **finetuning), "meta", shape).to_empty(device="cpu")


def glm(finetuning: FinetuningArguments, device: str, shape: Values) -> Any:
    """A Glm of a shape under GlmConfig's names, prepared for training, made on a device with random weights in bf16."""
    config = GlmConfig(**shape, attention_bias=True, pad_token_id=0, tie_word_embeddings=False)
    setattr(config, APPENDED_ROWS, [64_798, 78_554])
    with torch.device(device):
        base = GlmForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        return init_adapter(base, finetuning)


def with_fake_tensors(model: Any) -> FakeTensorMode:
    """Replaces a model's tensors by fake ones; returns the mode under which it computes."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = torch.empty_like(parameter)
                    module._parameters[name] = torch.nn.Parameter(fake, parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer)
    return mode


def budgets() -> list[Values]:
    """For each recipe and micro-batch, with and without gradient checkpointing: the estimate's parts, and the simulation."""
    results = []
    for name, (finetuning, optimizers) in RECIPES.items():
        model = chatglm3(finetuning)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        cases = list(itertools.product((1, 4), (True, False), optimizers))
        estimates = [estimate_step_memory(model, case[0], SEQ_LEN, case[1], torch.bfloat16, case[2]) for case in cases]
        simulated: dict[Any, dict[str, int]] = {}
        with with_fake_tensors(model):
            for (size, again, optimizer), estimate in zip(cases, estimates, strict=True):
                if (size, again) not in simulated:  # the same for all optimizers
                    simulated[size, again] = simulate_step(model, size, SEQ_LEN, again, torch.bfloat16)
                peaks = {phase: peak + optimizer * trained for phase, peak in simulated[size, again].items()}
                result: Values = {"trained": name + (", 8-bit Adam" if optimizer == 2 else ""), "batch_size": size}
                result |= {"activations": "recomputed" if again else "kept"}
                result |= {"estimate": {**vars(estimate), "total": estimate.total}, "simulated": peaks}
                results.append(result)
                print(result, flush=True)
    return results


def tables(measured: Values, name: str) -> str:
    """A table of docs/memory.md: cards, errors, phases, savings."""
    results, lines = measured["bytes"], []
    if name == "errors":
        errors = [result["estimate"]["total"] / max(result["simulated"].values()) - 1 for result in results]
        header = ["estimate / simulation - 1", "smallest", "largest"]
        lines = [["", f"{min(errors):+.0%}", f"{max(errors):+.0%}"]]
    elif name == "savings":
        matrix = CHATGLM3_6B["vocab_size"] * CHATGLM3_6B["hidden_size"]
        # Gradients of LoRA alone are fp32.
        lora = next(result["estimate"]["gradients"] for result in results if result["trained"] == "LoRA") // 4
        savings = {
            "8-bit Adam instead of 32-bit: 6 bytes per trained parameter": 6 * (2 * matrix + lora),
            "of these, the input matrix's state, which stays in 32 bits without `embedding_learning_rate`": 6 * matrix,
            "frozen originals of both matrices in bf16, which peft would keep: freed": 4 * matrix,
            "a second fp32 gradient of the output matrix, added to the first: not avoided": 4 * matrix,
        }
        header = ["both matrices trained", "GB"]
        lines = [[what, f"{size / 1e9:.1f}"] for what, size in savings.items()]
    elif name == "phases":
        small = next(result for result in results if result["trained"].endswith("8-bit Adam"))
        header = [small["trained"], *PHASES]
        lines = [["GB", *(f"{small['simulated'][phase] / 1e9:.1f}" for phase in PHASES)]]
    else:
        parts = [part for part in results[0]["estimate"] if part != "total"]
        header = ["trained", "micro-batch", "activations", *parts]
        header += ["estimate", "simulated", "left of 23 GB", "fits a card of", "peak on a GPU"]
        for result in results:
            peak, estimate = max(result["simulated"].values()), result["estimate"]
            fits = [card for card, usable in CARDS.items() if max(peak, estimate["total"]) <= usable]
            cells = [f"{size / 1e9:.1f}" for size in (*estimate.values(), peak)]
            cells += [f"{(CARDS['24 GB'] - peak) / 1e9:+.1f}", (fits or ["none"])[0], "not measured"]
            lines.append([result["trained"], f"{result['batch_size']} x {SEQ_LEN:,}", result["activations"], *cells])
    return markdown_table(header, lines)


def main() -> None:
    options = make_parser(__doc__, "memory_budget.json").parse_args()
    save_results(options.output, {"bytes": budgets()})


if __name__ == "__main__":
    run_cli(main)
