"""Muon beside another optimizer: each updates its own parameters, and both are resumed from one state."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from llmtuner.console import TrainingInterrupted
from llmtuner.model.loading import load_model
from llmtuner.train.muon import MuonAndOther, hidden_matrices
from llmtuner.train.trainer import PackedTrainer
from llmtuner.train.tuner import run_exp
from tests.training import NO_FIGURES, losses_of
from tests.unit.train.test_memory import make_estimator


def test_hidden_matrices_are_those_of_the_layers(family_dir):
    model = load_model(family_dir, torch.float32)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter in hidden_matrices(model)}
    assert found == {name for name in names.values() if "_proj" in name and name.endswith("weight")}
    model.requires_grad_(False)
    assert hidden_matrices(model) == []


def make(parameters):
    matrix, vector = parameters
    adamw = torch.optim.AdamW([{"params": [vector], "lr": 0.1}])
    return MuonAndOther(adamw, [{"params": [matrix], "lr": 0.1, "weight_decay": 0.01}])


def take_steps(optimizer, parameters, count, scheduler=None):
    for step in range(count):
        for parameter in parameters:
            parameter.grad = torch.sin(parameter.detach() + step)
        optimizer.step()
        if scheduler:
            scheduler.step()


def make_parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((6, 4), (5,))]


def test_each_optimizer_updates_its_own_parameters_at_the_schedules_rate():
    ours, expected = make_parameters(), make_parameters()
    optimizer = make(ours)
    take_steps(optimizer, ours, 3, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    muon = torch.optim.Muon(expected[:1], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for separate, parameter in ((muon, expected[0]), (torch.optim.AdamW(expected[1:], lr=0.1), expected[1])):
        take_steps(separate, [parameter], 3, torch.optim.lr_scheduler.StepLR(separate, 1, 0.5))
    for parameter, other in zip(ours, expected, strict=True):
        assert torch.equal(parameter, other)


def test_a_saved_state_is_that_of_both():
    parameters = make_parameters()
    optimizer = make(parameters)
    take_steps(optimizer, parameters, 2)
    saved, values = copy.deepcopy(optimizer.state_dict()), [parameter.detach().clone() for parameter in parameters]
    take_steps(optimizer, parameters, 2)
    resumed = [torch.nn.Parameter(value) for value in values]
    again = make(resumed)
    again.load_state_dict(saved)
    take_steps(again, resumed, 2)
    for parameter, other in zip(parameters, resumed, strict=True):
        assert torch.equal(parameter, other)
    assert len(saved["state"]) == 2


def test_a_run_learns_with_it_and_resumes_exactly(tiny_run, tmp_path, monkeypatch):
    settings = {**tiny_run, **NO_FIGURES, "eval_strategy": "no", "finetuning_type": "full", "use_muon": True}
    settings |= {"save_strategy": "steps", "save_steps": 2, "embedding_learning_rate": 1e-3}
    run_exp(settings)
    complete = load_file(tmp_path / "adapter" / "model.safetensors")
    finish = PackedTrainer._finish_step

    def finish_and_stop(self):
        finish(self)
        self.should_stop = self.state.global_step == 2

    monkeypatch.setattr(PackedTrainer, "_finish_step", finish_and_stop)
    resumed = {**settings, "output_dir": str(tmp_path / "resumed")}
    with pytest.raises(TrainingInterrupted):
        run_exp(resumed)
    monkeypatch.undo()
    run_exp(resumed)
    for name, tensor in load_file(tmp_path / "resumed" / "model.safetensors").items():
        assert torch.equal(tensor, complete[name]), name
    losses = losses_of(settings["output_dir"])
    assert losses[-1] < losses[0]
    run_exp({**settings, "use_muon": False, "output_dir": str(tmp_path / "adamw")})
    assert losses_of(tmp_path / "adamw")[0] == losses[0]
    assert losses_of(tmp_path / "adamw")[-1] != losses[-1]


def test_its_state_is_half_of_adams():
    full = {"finetuning_type": "full", "additional_target": []}
    adamw, muon = (make_estimator(**full, use_muon=use_muon) for use_muon in (False, True))
    hidden = sum(matrix.numel() for matrix in hidden_matrices(muon.model))
    saved = adamw.estimate(4, True).optimizer - muon.estimate(4, True).optimizer
    assert saved == 4 * hidden > 0
