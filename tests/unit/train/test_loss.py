"""The chunked loss has the value and gradients of the whole one."""

import pytest
import torch

from llmtuner.train.loss import linear_cross_entropy_sum


@pytest.mark.parametrize("at_once", [2**25, 700])
@pytest.mark.parametrize("trained", ["both", "hidden", "weight"])
def test_chunked_loss_has_the_value_and_gradients_of_the_whole(monkeypatch, at_once, trained):
    monkeypatch.setattr("llmtuner.train.loss.CHUNK_NUMEL_CPU", at_once)
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, dtype=torch.float32, requires_grad=trained != "weight")
    weight = torch.randn(100, 16, requires_grad=trained != "hidden")
    targets = torch.randint(0, 100, (37,))
    whole = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    leaves = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    wanted = torch.autograd.grad(whole / 7, leaves)
    loss = linear_cross_entropy_sum(hidden, weight, targets)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    for own, other in zip(torch.autograd.grad(loss / 7, leaves), wanted, strict=True):
        assert torch.allclose(own, other, atol=1e-5)


def test_chunked_loss_holds_few_logits_and_takes_autocast(monkeypatch):
    monkeypatch.setattr("llmtuner.train.loss.CHUNK_NUMEL_CPU", 1_000)
    largest = []
    original = torch.Tensor.amax

    def spy(self, *args, **kwargs):
        largest.append(self.numel())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "amax", spy)
    hidden, weight = torch.randn(50, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy_sum(hidden, weight, torch.arange(50))
    assert max(largest) == 1_000
    assert loss.dtype == torch.float32
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert linear_cross_entropy_sum(hidden[:0], weight, torch.arange(0)) == 0
