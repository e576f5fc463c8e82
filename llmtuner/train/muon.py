"""Muon for the hidden matrices of a model and another optimizer for everything else, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch

from llmtuner.model.adapters import embedding_parameters


def hidden_matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trained matrices of a model but the embeddings, whose rows are not a map from one hidden state to another."""
    embeddings = embedding_parameters(model)
    return [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad and parameter.ndim == 2 and id(parameter) not in embeddings
    ]


class MuonAndOther(torch.optim.Optimizer):
    """Muon (Keller Jordan 2024) and another optimizer behind one interface, with one state to save.

    Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982), so that both take the same learning rate.

    Args:
        other: of the parameters that Muon does not update. Its groups come first in `param_groups`.
        groups: of matrices, each with `lr` and `weight_decay`.
    """

    def __init__(self, other: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
        self.muon, self.other = torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw"), other
        super().__init__([*other.param_groups, *self.muon.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Lets both work on this optimizer's own groups and state: schedulers change the former, checkpoints hold both."""
        count = len(self.other.param_groups)
        self.other.param_groups, self.muon.param_groups = self.param_groups[:count], self.param_groups[count:]
        self.other.state = self.muon.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = self.other.step(closure)
        self.muon.step()
        return loss
