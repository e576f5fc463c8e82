"""The counter of memory traffic: bytes and kernels of single operations, phases, a layer's share of a step."""

import inspect
import shutil
from itertools import pairwise
from unittest import mock

import pytest
import torch
from torch._inductor.graph import GraphLowering
from torch.nn.functional import embedding
from torch.utils._pytree import tree_leaves

from benchmarks import traffic
from benchmarks.common import CHATGLM3_6B
from benchmarks.traffic import ALL_OFF, TrafficCounter
from llmtuner.model import pointwise
from llmtuner.train.memory import COMPILED

A = torch.zeros(100, 10)  # 4,000 bytes
B = torch.zeros(10, 20)  # 800 bytes
SQUARE = torch.zeros(10, 10)  # 400 bytes
ROW = torch.zeros(10)  # 40 bytes
INDICES = torch.arange(3)  # 24 bytes
VALUES = torch.zeros(3, 10)  # 120 bytes


@pytest.mark.parametrize(
    ("operation", "kind", "size"),
    [
        (lambda: A @ B, "product", 4000 + 800 + 8000),
        (lambda: SQUARE.addmm_(A.T, A), "product", 4000 + 400 + 400),  # both read A
        (lambda: torch.mm(A, B, out=torch.empty(100, 20)), "product", 4000 + 800 + 8000),
        (lambda: A + ROW, "elementwise", 4000 + 40 + 4000),
        (lambda: A * A, "elementwise", 4000 + 4000),
        (lambda: A.add_(ROW.expand(100, 10)), "elementwise", 4000 + 40 + 4000),
        (lambda: A.to(torch.bfloat16), "elementwise", 4000 + 2000),
        (lambda: A.sum(dim=1), "elementwise", 4000 + 400),
        (lambda: A[:, ::2].contiguous(), "elementwise", 2000 + 2000),
        (lambda: A.copy_(ROW), "elementwise", 40 + 4000),
        (lambda: A.zero_(), "elementwise", 4000),
        (lambda: torch.zeros_like(A), "elementwise", 4000),
        (lambda: torch.cat([A, A[50:]]), "elementwise", 4000 + 2000 + 6000),
        (lambda: embedding(INDICES, A), "elementwise", 24 + 120 + 120),
        (lambda: A.index_add_(0, INDICES, VALUES), "elementwise", 24 + 120 + 2 * 120),
    ],
)
def test_an_operation_reads_inputs_and_writes_outputs_once(operation, kind, size):
    with TrafficCounter() as counter:
        operation()
    assert counter.bytes == {("forward", kind): size}
    assert counter.kernels == {("forward", kind): 1}


def test_views_and_unwritten_memory_cost_nothing():
    with TrafficCounter() as counter:
        view = A.view(10, 10, 10).transpose(0, 1)[2:].expand(8, 10, 10)
        view.chunk(2)
        view.detach()
        torch.empty(1000)
        assert view.device.type == "cpu"
    assert not counter.bytes


def test_kernels_of_the_backward_pass_are_counted_apart():
    x = torch.ones(10, requires_grad=True)
    with TrafficCounter() as counter:
        (x * 2).sum().backward()
    assert counter.kernels["forward", "elementwise"] == 3  # product, sum, and ones_like of the gradient
    assert counter.bytes["backward", "elementwise"] > 0


def test_a_compiled_function_is_one_kernel():
    counter = TrafficCounter()

    def compute(x, scale):
        y = x * scale + 1
        return y, y.sum(dim=1)

    with counter:
        results = counter.as_one_kernel(compute)(A, 3.0)
    assert [tuple(result.shape) for result in results] == [(100, 10), (100,)]
    assert counter.kernels == {("forward", "elementwise"): 1}
    assert counter.bytes == {("forward", "elementwise"): 4000 + 4000 + 400}


def test_traffic_of_a_plain_layer_of_the_full_size():
    """Of 28 layers, what is kept is what docs/memory.md has of the whole model."""
    plain = traffic.layer_traffic(ALL_OFF, CHATGLM3_6B, 4, 1024)
    assert plain["elementwise_forward_gb"] == pytest.approx(6.05, abs=0.01)
    assert plain["elementwise_backward_gb"] == pytest.approx(9.77, abs=0.01)
    assert plain["kernels"] == 241
    assert plain["kept_mb"] * 28 == pytest.approx(26_200, rel=0.05)
    # Of six linear layers: base, A and B; backwards these three, and the gradients of A and B.
    assert plain["product_kernels"] == 6 * (1 + 2) + 6 * (1 + 4)
    assert plain["attention_kernels"] == 2


def test_lines_of_the_table_add_one_optimization_each():
    lines = list(traffic.optimizations_in_turn().values())
    assert lines[0] == ALL_OFF
    assert all(sum(line[name] != other[name] for name in line) == 1 for line, other in pairwise(lines))
    assert lines[-1] == dict(flash_attn="varlen", fused_ops=True, chunked_loss=True)


def test_optimizations_leave_a_quarter_of_the_traffic_and_half_of_what_is_kept():
    plain, fast = (
        traffic.layer_traffic(settings, CHATGLM3_6B, 4, 1024)
        for settings in list(traffic.optimizations_in_turn().values())[::3]
    )
    assert fast["elementwise_gb"] < plain["elementwise_gb"] / 4
    assert fast["kept_mb"] < plain["kept_mb"] / 2
    assert fast["kernels"] < plain["kernels"] / 2


@pytest.fixture(scope="module")
def compiled_calls():
    """Name -> a function that is compiled on a GPU, and shape, strides and dtype of the arguments it gets in a step."""
    calls = {}

    class Recorder(TrafficCounter):
        def as_one_kernel(self, function):
            call = super().as_one_kernel(function)

            def record(*args):
                kinds = [(x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in args]
                calls.setdefault(function.__name__, (function, kinds))
                return call(*args)

            return record

    shape = {
        **CHATGLM3_6B,
        "hidden_size": 512,
        "intermediate_size": 1_712,
        "num_attention_heads": 4,
        "vocab_size": 4_096,
    }
    settings = list(traffic.optimizations_in_turn().values())[-1]
    with mock.patch.object(traffic, "TrafficCounter", Recorder):
        traffic.layer_traffic(settings, shape, 2, 256)
    return calls


def compiled_functions():
    return [
        name
        for module in COMPILED
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if hasattr(function, "__wrapped__")
    ]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("name", compiled_functions())
def test_compiler_makes_one_kernel_that_reads_inputs_and_writes_outputs_once(name, compiled_calls, monkeypatch):
    function, kinds = compiled_calls[name]
    kernels, generate = [], GraphLowering.codegen

    def codegen(self):
        code = generate(self)
        kernels.append([4 * size for _, size in self.count_bytes()[1] if size])  # of elements that count as four bytes
        return code

    monkeypatch.setattr(GraphLowering, "codegen", codegen)
    monkeypatch.setattr(pointwise, "has_triton", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    torch._dynamo.reset()
    torch.manual_seed(0)
    for length in (1, 2):  # of the tokens: the second time they are known to vary
        args = [make_argument(kind, length) if isinstance(kind, tuple) else kind for kind in kinds]
        with torch.no_grad(), torch.compiler.config.patch(force_disable_caches=True):
            results, expected = function(*args), function.__wrapped__(*args)
        size = sum(map(traffic.region_bytes, (traffic.tensors_of(args), traffic.tensors_of(results))))
        assert kernels == [[pytest.approx(size, rel=0.1)]] * len(kernels)
        assert kernels or length == 2
        kernels.clear()
        for result, wanted in zip(tree_leaves(results), tree_leaves(expected), strict=True):
            torch.testing.assert_close(result, wanted, rtol=2e-2, atol=2e-2)


def make_argument(kind, length):
    """A random tensor of a kind whose first dimension, if it has several, is `length` times as long."""
    shape, stride, dtype = kind
    if len(shape) > 1 or not dtype.is_floating_point:
        shape = (length * shape[0], *shape[1:])
    tensor = torch.empty_strided(shape, stride, dtype=dtype)
    return tensor.uniform_(-1, 1) if dtype.is_floating_point else tensor.random_(0, 100)
