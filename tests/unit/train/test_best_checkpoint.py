"""The best checkpoint of a run is found by the figure that was asked for, survives, and is what is saved."""

import pytest
import torch
from safetensors.torch import load_file

from llmtuner.console import TrainingInterrupted, UserError
from llmtuner.data import loader
from llmtuner.train.best_checkpoint import find_best, retention_loss
from llmtuner.train.callbacks import TimedSave
from llmtuner.train.trainer import PackedTrainer
from llmtuner.train.tuner import run_exp
from tests.training import NO_FIGURES, SFT

JA = "eval_bits_per_byte_ja"
TEXTS = {"ja": ["柳樹の下で。"], "zh": ["柳树。"]}


def entry(step, ja, zh, loss=1.0):
    return {"step": step, "eval_loss": loss, JA: ja, "eval_bits_per_byte_zh": zh}


HISTORY = [
    entry(0, 4.0, 1.0),
    {"step": 5, "loss": 0.1},
    entry(10, 2.0, 1.01),
    entry(20, 1.0, 1.05, 0.5),
    entry(30, 1.5, 1.02),
]


@pytest.mark.parametrize(
    ("metric", "bound", "step"),
    [(JA, None, 20), (JA, 0.05, 20), (JA, 0.02, 30), (JA, 0.015, 10), (JA, 0.0, 0), ("eval_loss", None, 20)],
)
def test_the_best_is_the_lowest_of_those_that_keep_the_other_languages(metric, bound, step):
    best = find_best(HISTORY, metric, bound + 1e-9 if bound else bound)
    assert best["step"] == step


def test_nothing_is_best_of_nothing():
    assert find_best([{"step": 1, "loss": 2.0}], JA) is None
    assert find_best([entry(1, float("nan"), 1.0)], JA) is None
    assert (
        retention_loss({"eval_a_loss": 1.5, "eval_b_loss": 3.0}, {"eval_a_loss": 2, "eval_b_loss": 2}, "eval_a_loss")
        == 0.5
    )


def with_evaluations(monkeypatch, ja, zh=()):
    """Lets the evaluations of a run find these bits per byte; the eval loss only falls."""
    values, losses = {"ja": iter(ja), "zh": iter(zh)}, iter(range(100, 0, -1))
    languages = []

    def evaluate_bpb(self, windows):
        languages.append(len(languages))
        return next(values["ja" if len(languages) % 2 else "zh"], 1.0)

    monkeypatch.setattr(PackedTrainer, "evaluate_bpb", evaluate_bpb)
    monkeypatch.setattr(PackedTrainer, "evaluate_loss", lambda self, dataset: float(next(losses)))


@pytest.mark.parametrize("method", ["lora", "freeze"])
def test_the_best_checkpoint_survives_and_its_weights_are_saved(tiny_run, tmp_path, monkeypatch, capsys, method):
    settings = {**tiny_run, **NO_FIGURES, "finetuning_type": method, "max_steps": 4, "eval_steps": 1}
    settings |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    settings |= {"metric_for_best_model": "bits_per_byte_ja", "load_best_model_at_end": True}
    with_evaluations(monkeypatch, [3.0, 1.0, 2.0, 2.5])
    seen = {}
    finish = PackedTrainer._finish_step

    def remember(self):
        seen[self.state.global_step] = {
            name: weight.detach().clone() for name, weight in self.model.named_parameters() if weight.requires_grad
        }
        finish(self)

    monkeypatch.setattr(PackedTrainer, "_finish_step", remember)
    metrics = run_exp(settings, TEXTS)
    assert metrics["best"] == {"metric": JA, "step": 2, "value": 1.0}
    assert sorted(path.name for path in (tmp_path / "adapter").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert f"best checkpoint: step 2 of 4, {JA} 1.0000\nthe weights of step 2 are saved" in capsys.readouterr().out
    saved = load_file(tmp_path / "adapter" / f"{'adapter_' if method == 'lora' else ''}model.safetensors")
    head = next(name for name in saved if name.endswith("lm_head.weight"))
    after_two = next(weight for name, weight in seen[2].items() if "lm_head" in name)  # as the third step found it
    assert torch.equal(saved[head], after_two)
    assert not torch.equal(saved[head], next(weight for name, weight in seen[3].items() if "lm_head" in name))


def test_a_best_checkpoint_that_costs_another_language_is_none(tiny_run, monkeypatch, capsys):
    settings = {**tiny_run, "plot_loss": False, "max_steps": 2, "eval_steps": 1, "save_strategy": "steps"}
    settings |= {"metric_for_best_model": JA, "max_retention_loss": 0.02, "load_best_model_at_end": True}
    with_evaluations(monkeypatch, [4.0, 3.0, 2.0], [1.0, 1.1, 1.2])
    assert "best" not in run_exp(settings, TEXTS)
    assert (
        f"by {JA} within max_retention_loss 2.0%; the smallest loss of the others was 10.0%" in capsys.readouterr().out
    )


def test_patience_counts_the_metric_across_a_restart(tiny_run, monkeypatch):
    settings = {**tiny_run, **NO_FIGURES, "max_steps": 9, "eval_steps": 1, "early_stopping_steps": 2}
    settings |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "metric_for_best_model": JA}
    finish = PackedTrainer._finish_step

    def finish_and_stop(self):
        finish(self)
        self.should_stop = self.state.global_step == 2  # the third step is being made

    with monkeypatch.context() as patched:
        with_evaluations(patched, [3.0, 1.0, 2.0])
        patched.setattr(PackedTrainer, "_finish_step", finish_and_stop)
        with pytest.raises(TrainingInterrupted):
            run_exp(settings, TEXTS)
    with_evaluations(monkeypatch, [2.0, 0.0])
    metrics = run_exp(settings, TEXTS)
    assert metrics["steps"] == 4  # the second evaluation without a better one, the first of them before the restart
    assert metrics["best"]["step"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric_for_best_model": "eval_bits_per_byte_ko"}, f"It logs eval_loss, {JA}, eval_bits_per_byte_zh"),
        ({"metric_for_best_model": JA, **SFT}, "is not logged by this run. It logs eval_loss."),
        ({"load_best_model_at_end": True, "max_retention_loss": 0.02}, "max_retention_loss compares other languages"),
    ],
)
def test_a_metric_that_is_not_logged_is_refused_before_data_is_read(tiny_run, monkeypatch, settings, message):
    monkeypatch.setattr(loader, "get_dataset", None)
    with pytest.raises(UserError, match=message.replace(".", "\\.")):
        run_exp({**tiny_run, "save_strategy": "steps", **settings}, TEXTS)


def test_a_timed_save_is_early_enough(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("llmtuner.train.callbacks.time.perf_counter", lambda: now[0])
    trainer, control = type("Trainer", (), {"should_save": False}), type("Control", (), {"should_save": False})
    saver = TimedSave(trainer, minutes=2)
    saver.on_train_begin(None, None, control)
    states, saved = [0.0], []
    for _ in range(100):
        saver.on_step_begin(None, None, control)
        now[0] += 3
        trainer.should_save = saver.is_due()
        now[0] += 4
        saver.on_step_end(None, None, control)
        if control.should_save:
            states.append(now[0])
            now[0] += 15
            saved.append(now[0])
            saver.on_save(None, None, control)
            control.should_save = False
    assert 4 < len(saved) < 9
    # Killed just before a checkpoint is complete, a run loses what it has done since the state of the one before.
    assert all(end - state <= 120 for state, end in zip(states, saved, strict=False))


def test_minutes_make_checkpoints_beside_steps(tiny_run, tmp_path, monkeypatch):
    settings = {
        **tiny_run,
        **NO_FIGURES,
        "eval_strategy": "no",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    monkeypatch.setattr(TimedSave, "is_due", lambda self: self.trainer.state.global_step == 1)
    run_exp({**settings, "save_minutes": 60})
    assert sorted(path.name for path in (tmp_path / "adapter").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
