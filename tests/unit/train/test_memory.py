"""The estimate of a training step's memory against what a step really keeps."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GlmConfig

from benchmarks.memory_budget import LiveTensors, simulate_step, with_fake_tensors
from llmtuner.hparams import FinetuningArguments
from llmtuner.model.adapters import init_adapter
from llmtuner.model.model_dir import APPENDED_ROWS
from llmtuner.train.memory import estimate_step_memory, saved_activation_bytes


def glm(layers, width, heads, rows, intermediate, attention, dtype):
    config = GlmConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=width // heads,
        attention_bias=True,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def prepared(layers=3, width=64, attention="eager", dtype=torch.float32):
    model = glm(layers, width, 4, 256, 2 * width, attention, dtype)
    targets = dict(
        target_modules="all-linear", exclude_modules=["lm_head"], modules_to_save=["embed_tokens", "lm_head"]
    )
    model = get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM", **targets))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def real_saved_bytes(model, batch_size, seq_len, dtype):
    """Bytes that autograd saves in a real forward pass, without the weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved = {}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    with autocast, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        ids = torch.randint(0, 256, (batch_size, seq_len))
        positions = torch.arange(seq_len).expand(batch_size, -1)
        nothing = torch.zeros(0, dtype=torch.long)
        outputs = model.train()(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=nothing)
    assert outputs.logits.requires_grad
    return sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize(("attention", "tolerance"), [("eager", 0.001), ("sdpa", 0.12)])
def test_activations_are_counted(layers, attention, tolerance, dtype):
    model = prepared(layers, attention=attention, dtype=dtype)
    estimate = saved_activation_bytes(model, 3, 50, dtype)
    assert estimate == pytest.approx(real_saved_bytes(model, 3, 50, dtype), rel=tolerance)
    assert all(type(parameter.data) is torch.Tensor for parameter in model.parameters())


def test_flash_attention_is_counted_as_the_fused_kernel():
    model = prepared(attention="sdpa").eval()
    wanted = saved_activation_bytes(model, 3, 50, torch.float32)
    model.config._attn_implementation = "flash_attention_2"
    assert saved_activation_bytes(model, 3, 50, torch.float32) == wanted
    assert model.config._attn_implementation == "flash_attention_2"
    assert not model.training


def test_parts_have_the_sizes_of_what_is_there():
    model = prepared(dtype=torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    whole = estimate_step_memory(model, 2, 32, False, torch.bfloat16)
    assert whole.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert (whole.gradients, whole.optimizer) == (4 * count, 8 * count)
    # logits in fp32, their gradients in fp32 and bf16; the output matrix in bf16, its gradient in fp32
    assert whole.loss == 2 * 32 * 256 * 10 + 256 * 64 * 6
    assert whole.total == whole.weights + 12 * count + whole.activations + whole.loss
    shared = estimate_step_memory(model, 2, 32, False, torch.bfloat16, optimizer_bytes=2, processes=4)
    assert (shared.gradients, shared.optimizer) == (count, count // 2)
    assert "weights 0.0, gradients 0.0" in str(whole)


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer():
    model = prepared(layers=8)
    whole, few = (estimate_step_memory(model, 2, 64, how) for how in (False, True))
    assert few.activations == whole.activations // 8 + 8 * 2 * 64 * 64 * 4
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    inputs = real_saved_bytes(model, 2, 64, torch.float32)
    assert inputs == pytest.approx(8 * 2 * 64 * 64 * 4, rel=0.15)  # and masks, positions, the last norm


def test_living_tensors_are_counted_once_and_forgotten():
    first = torch.zeros(1000)
    with LiveTensors([first]) as live:
        assert live.now == 4000
        second = first + 1
        view = second.view(10, 100).T  # the same memory
        third = view.double()
        assert live.now == 4000 + 4000 + 8000
        del third
        live.phase = "later"
        fourth = second * 2
    assert (live.peak["before"], live.peak["later"], live.now) == (16_000, 12_000, 12_000)
    del second, view, fourth
    assert live.now == 4000


def whole_model(dtype, **beside):
    """A Glm wider and deeper than the others here, as the trainer prepares it."""
    base = glm(6, 256, 8, 2048, 768, "sdpa", dtype)
    setattr(base.config, APPENDED_ROWS, [1800, 2000])
    return init_adapter(base, FinetuningArguments(lora_rank=16, **beside))


BOTH = dict(additional_target=["embed_tokens", "lm_head"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("beside", "checkpointing", "dtype", "above"),
    [
        (BOTH, True, torch.bfloat16, 1.03),
        (BOTH, False, torch.float32, 1.12),
        (dict(**BOTH, train_new_tokens_only=True), False, torch.bfloat16, 1.03),
        ({}, True, torch.float32, 1.24),
    ],
)
def test_the_estimate_is_not_below_the_height_of_a_real_step(beside, checkpointing, dtype, above):
    model = whole_model(dtype, **beside)
    estimate = estimate_step_memory(model, 2, 256, checkpointing, dtype, optimizer_bytes=0)
    real = simulate_step(model, 2, 256, checkpointing, dtype)
    # As far above it as was once measured, for not all parts are there at once; less far the deeper a model is.
    assert estimate.total / max(real.values()) == pytest.approx(above, abs=0.02)
    with with_fake_tensors(model):
        # As elsewhere: without content, attention is not traced as the fused kernel.
        assert simulate_step(model, 2, 256, checkpointing, dtype) == pytest.approx(real, rel=0.12)
