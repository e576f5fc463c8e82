"""The counter of memory traffic: bytes and kernels of single operations, phases, a layer's share of a step."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import embedding

from benchmarks import traffic
from benchmarks.common import CHATGLM3_6B
from benchmarks.traffic import ALL_OFF, TrafficCounter

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
