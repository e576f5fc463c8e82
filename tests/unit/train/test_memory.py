"""The estimate of a training step's memory against what a step really holds."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GlmConfig, Qwen3Config
from transformers.training_args import OptimizerNames

from llmtuner.hparams import get_train_args
from llmtuner.hparams.packages import missing_packages
from llmtuner.model.adapters import init_adapter
from llmtuner.model.attention import VARLEN, register_varlen
from llmtuner.model.model_dir import APPENDED_ROWS
from llmtuner.train import loss
from llmtuner.train.memory import (
    GradientBuckets,
    LiveTensors,
    StepEstimator,
    fake_copy,
    follow_micro_batch,
    make_skeleton,
    state_bytes_per_parameter,
)

ROWS, WIDTH = 512, 64
BOTH = dict(additional_target=["embed_tokens", "lm_head"])
ZERO = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 20_000}, "bf16": {"enabled": "auto"}}


def make_args(**settings):
    """Settings of a run in bf16, whatever this CPU supports."""
    settings = {"model_name_or_path": "model", "dataset": "texts", "output_dir": "out", "cutoff_len": 32, **settings}
    args = get_train_args(
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "lora_rank": 8, **settings}
    )
    args.training.bf16 = True
    return args


def make_config(layers=3, attention="sdpa"):
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=WIDTH // 4, attention_bias=True)
    config = GlmConfig(
        vocab_size=ROWS,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=layers,
        pad_token_id=0,
        **heads,
    )
    config.tie_word_embeddings = False
    setattr(config, APPENDED_ROWS, [400, 500])
    config._attn_implementation = attention
    return config


def make_model(finetuning, layers=3, attention="sdpa", dtype=torch.bfloat16):
    """A model with random weights, prepared for training."""
    config = make_config(layers, attention)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    return init_adapter(base, finetuning)


def make_estimator(processes=1, **settings):
    args = make_args(**{**BOTH, **settings})
    return StepEstimator(make_skeleton(make_config(1), args.finetuning, torch.bfloat16), args, processes)


@pytest.mark.parametrize("settings", [BOTH, {"finetuning_type": "full"}, {**BOTH, "train_new_tokens_only": True}])
@pytest.mark.parametrize("deepspeed", [None, ZERO])
def test_a_tied_matrix_counts_once(settings, deepspeed):
    def estimator(is_tied):
        sizes = dict(hidden_size=WIDTH, intermediate_size=96, num_attention_heads=4, num_key_value_heads=4, head_dim=16)
        config = Qwen3Config(vocab_size=ROWS, num_hidden_layers=1, tie_word_embeddings=is_tied, **sizes)
        setattr(config, APPENDED_ROWS, [400, 500])
        config._attn_implementation = "sdpa"
        args = make_args(**settings, deepspeed=deepspeed)
        return StepEstimator(make_skeleton(config, args.finetuning, torch.bfloat16), args)

    estimators = [estimator(is_tied) for is_tied in (False, True)]
    untied, tied = (each.estimate(4, checkpointing=False) for each in estimators)
    by_row = "train_new_tokens_only" in settings
    once = WIDTH * (100 if by_row else ROWS)
    assert estimators[0].num_trained - estimators[1].num_trained == once
    assert untied.optimizer - tied.optimizer == pytest.approx((12 if deepspeed else 8) * once, abs=8)  # of a step count
    assert untied.gradients - tied.gradients == (2 if deepspeed else 4) * once
    saved = untied.weights - tied.weights
    assert saved == (2 if deepspeed else 4) * once + (2 * ROWS * WIDTH if by_row else 0)
    assert untied.total > tied.total


# ------------------------------------------------------------------------------------------------------ following a step
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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    [
        # Without content, transformers cannot see that a mask is not needed; packed documents need one.
        ("sdpa", torch.bfloat16, 0.1),
        ("eager", torch.bfloat16, 0.01),
        (VARLEN, torch.bfloat16, 0.01),
        (VARLEN, torch.float32, 0.01),
    ],
)
def test_a_step_without_content_holds_what_a_real_one_holds(checkpointing, attention, dtype, tolerance):
    register_varlen()
    finetuning = make_args(**BOTH).finetuning
    model = make_model(finetuning, 4, attention, dtype)
    copied, mode = fake_copy(model)
    settings = (finetuning, 2, 64, checkpointing, dtype)
    with mode:
        estimate = follow_micro_batch(copied, *settings, on_gpu=False)
    assert estimate == pytest.approx(follow_micro_batch(model, *settings, on_gpu=False), rel=tolerance)


def test_what_is_kept_grows_with_the_layers_and_less_if_they_are_recomputed():
    finetuning = make_args(**BOTH).finetuning
    kept = {}
    for layers in (2, 6):
        for checkpointing in (False, True):
            model, mode = fake_copy(make_model(finetuning, layers, VARLEN))
            with mode:
                step = follow_micro_batch(model, finetuning, 2, 64, checkpointing, torch.bfloat16)
            kept[layers, checkpointing] = step.kept
    per_layer = {recomputed: (kept[6, recomputed] - kept[2, recomputed]) / 4 for recomputed in (False, True)}
    assert 2 * 64 * WIDTH * 2 <= per_layer[True] < per_layer[False] / 4  # its input, in 16 bits or more


def test_a_micro_batch_finds_the_gradients_of_the_one_before():
    finetuning = make_args(**BOTH).finetuning
    model, mode = fake_copy(make_model(finetuning))
    gradients = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with mode:
        first, second = (
            follow_micro_batch(model, finetuning, 1, 16, False, torch.bfloat16, accumulates)
            for accumulates in (False, True)
        )
    assert first.forward == second.forward  # both beside gradients that are there already
    assert first.backward > 0.5 * gradients > second.backward - 4 * ROWS * WIDTH * 4
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_loss_forms_as_many_logits_as_on_a_gpu(monkeypatch):
    finetuning = make_args(**BOTH).finetuning
    model, mode = fake_copy(make_model(finetuning))
    peaks = []
    for numel in (2**12, 2**20):
        monkeypatch.setattr(loss, "CHUNK_NUMEL", numel)
        with mode:
            peaks.append(follow_micro_batch(model, finetuning, 4, 64, True, torch.bfloat16).forward)
    tokens, chunk = 4 * 63, loss.CHUNK_ROWS_MULTIPLE
    assert (
        peaks[1] - peaks[0] >= 2 * (tokens - chunk) * ROWS
    )  # 16-bit logits of all tokens instead of the first chunk's


def test_flash_attention_is_followed_as_one_document_after_another():
    finetuning = make_args(**BOTH).finetuning
    model = make_model(finetuning)
    model.config._attn_implementation = "flash_attention_2"
    copied, mode = fake_copy(model)
    assert copied.config._attn_implementation == VARLEN
    with mode:
        follow_micro_batch(copied, finetuning, 1, 16, False, torch.bfloat16)
    assert model.config._attn_implementation == "flash_attention_2"


def test_the_model_itself_is_left_alone():
    args = make_args(**BOTH)
    model = make_model(args.finetuning).eval()
    StepEstimator(model, args).estimate(2, True)
    assert not model.training
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert {type(parameter.data) for parameter in model.parameters()} == {torch.Tensor}
    assert all(parameter.grad is None for parameter in model.parameters())


# -------------------------------------------------------------------------------------------------------------- sharing
def test_one_process_holds_everything():
    estimator = make_estimator(embedding_learning_rate=1e-4)
    estimate, numel = estimator.estimate(4, False), estimator.num_trained
    frozen = sum(parameter.numel() for parameter in estimator.model.parameters()) - numel
    assert estimate.weights == 2 * frozen + 4 * numel
    assert estimate.gradients == 4 * numel
    assert estimate.optimizer == pytest.approx(8 * numel, rel=0.001)
    assert estimate.buckets == 0
    assert estimate.total == sum(vars(estimate).values())
    assert estimator.estimate(8, False).gradients == 0  # one micro-batch: its gradients are in the workspace
    assert "weights 0.0" in str(estimate)
    assert "buckets" not in str(estimate)


def test_ddp_holds_a_copy_of_the_gradients():
    one, four = (make_estimator(processes) for processes in (1, 4))
    assert vars(four.estimate(4, True)) == vars(one.estimate(4, True)) | {"buckets": 4 * one.num_trained}
    assert four.variant(processes=8).estimate(4, True) == four.estimate(4, True)
    # A single micro-batch: its gradients become views of the buckets as soon as they are ready.
    alone = four.estimate(8, True)
    assert (alone.gradients, alone.buckets) == (0, 4 * one.num_trained)
    assert alone.workspace < one.estimate(8, True).workspace


@pytest.mark.parametrize("accumulated", [None, "bf16", "fp32"])
def test_zero_divides_gradients_and_optimizer(accumulated):
    config = {**ZERO, **({"data_types": {"grad_accum_dtype": accumulated}} if accumulated else {})}
    estimator = make_estimator(deepspeed=config)
    for processes in (1, 2, 8):
        estimate = estimator.variant(processes=processes).estimate(4, True)
        share = -(-estimator.num_trained // processes)
        assert estimate.weights == 2 * sum(parameter.numel() for parameter in estimator.model.parameters())
        assert estimate.gradients == (4 if accumulated == "fp32" else 2) * share
        assert estimate.optimizer == pytest.approx(12 * share, rel=0.001)  # with the weights in fp32


def test_zero_with_its_optimizer_on_the_cpu_needs_no_memory_for_it():
    zero = {**ZERO["zero_optimization"], "offload_optimizer": {"device": "cpu"}}
    assert make_estimator(2, deepspeed={**ZERO, "zero_optimization": zero}).estimate(4, True).optimizer == 0


@pytest.mark.parametrize(
    ("bucket", "overlap", "size"),
    [
        (200_000, True, 2 * 200_000 * 2),
        (200_000, False, 200_000 * 2),
        ("auto", True, 2 * WIDTH**2 * 2),
        (None, True, 2 * 500_000_000 * 2),
    ],
)
def test_zero_holds_its_buckets_from_the_first_gradient_on(bucket, overlap, size):
    def estimate(bucket):
        zero = {"stage": 2, "overlap_comm": overlap} | ({} if bucket is None else {"reduce_bucket_size": bucket})
        return make_estimator(2, deepspeed={"zero_optimization": zero}).estimate(1, True)

    without, with_buckets = estimate(1), estimate(bucket)
    assert with_buckets.buckets in (0, size)  # 0 if the peak is before the backward pass
    if bucket in (200_000, None):
        assert with_buckets.buckets == size
        assert with_buckets.total > without.total


def test_gradients_fill_buckets_and_leave_their_parameters():
    buckets, sent = GradientBuckets(numel=100, count=2), []
    buckets.reduce = lambda: (sent.append(sum(buckets.filled)), GradientBuckets.reduce(buckets))
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (60, 30, 20, 300, 40)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
        buckets.collect(parameter)
    assert [buffer.numel() for buffer in buckets.buffers] == [100, 100]
    buckets.release()
    assert sent == [90, 20, 300, 40]
    assert [parameter.grad is None for parameter in parameters] == [True, True, True, False, True]
    assert not buckets.buffers


# ------------------------------------------------------------------------------------------------------------- optimizer
STATE_BYTES = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), 8),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), 2 + 2 * 4 / 256),  # and a scale of each 256 values
    "ademamix": 12,
    "ademamix_8bit": 3 * (1 + 4 / 256),
    **dict.fromkeys(("lion_32bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit", "adagrad"), 4),
    **dict.fromkeys(("lion_8bit", "rmsprop_bnb_8bit"), 1 + 4 / 256),
    **dict.fromkeys(("adafactor", "sgd"), 0),
}


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_bytes_of_the_optimizers_state(name):
    """By what the optimizer itself holds, or at most 32-bit Adam's if its package is not installed."""
    training = SimpleNamespace(**{**vars(make_args().training), "optim": OptimizerNames(name), "device": "cpu"})
    size = state_bytes_per_parameter(training)
    if name in STATE_BYTES and not list(missing_packages("optim", name)):
        assert size == pytest.approx(STATE_BYTES[name], abs=0.02)
    elif name.startswith("paged_"):  # the driver moves it out of the GPU's memory
        assert size == 0
    else:
        assert size == (2 if "8bit" in name else 8)


def test_an_optimizer_with_arguments_is_taken_with_them():
    training = make_args(optim="sgd", optim_args="momentum=0.9").training
    assert state_bytes_per_parameter(training) == 4
    training = make_args(optim="adafactor").training
    assert state_bytes_per_parameter(training) < 0.1 < state_bytes_per_parameter(training, flat=True)


@pytest.mark.skipif(bool(list(missing_packages("optim", "adamw_8bit"))), reason="bitsandbytes is not installed")
def test_bitsandbytes_keeps_embeddings_in_32_bits_only_without_a_learning_rate_of_their_own():
    matrix = ROWS * WIDTH
    apart, together = (make_estimator(optim="adamw_8bit", **rate) for rate in ({"embedding_learning_rate": 1e-4}, {}))
    assert apart.estimate(4, True).optimizer == pytest.approx(2 * apart.num_trained, rel=0.03)
    assert together.estimate(4, True).optimizer == pytest.approx(2 * together.num_trained + 6 * matrix, rel=0.03)
    shared = make_estimator(2, optim="adamw_8bit", deepspeed=ZERO)  # which passes it one vector
    assert shared.estimate(4, True).optimizer == pytest.approx((4 + 2) * shared.num_trained / 2, rel=0.03)
