"""What tests of the suites share: a tiny model that writes readable text, and a short list of task files."""

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch

from llmtuner.model.loading import load_model
from llmtuner.tokenizer.encoding import load_tokenizer


@pytest.fixture(scope="module")
def lively_dir(tiny_model_dir, tmp_path_factory):
    """The tiny model with other random weights: what it writes depends on all that it has read, and is readable."""
    model, tokenizer = load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)
    directory = tmp_path_factory.mktemp("lively")
    shutil.copytree(tiny_model_dir, directory, dirs_exist_ok=True)
    gains = {"embed_tokens": 0.1 * 32**0.5, "q_proj": 3.0, "o_proj": 2.0}  # small embeddings, sharp attention
    torch.manual_seed(0)
    with torch.no_grad():
        for name, values in model.named_parameters():
            gain = next((gain for part, gain in gains.items() if part in name), 1.0)
            fixed = 1.0 if "norm" in name else 0.0
            torch.nn.init.normal_(values, std=gain / values.shape[-1] ** 0.5) if values.dim() > 1 else values.fill_(
                fixed
            )
        rows = model.lm_head.weight
        rows /= rows.norm(dim=1, keepdim=True)
        words = [index for piece, index in tokenizer.get_vocab().items() if len(piece.strip("▁")) and "<" not in piece]
        rows[[index for index in range(len(rows)) if index not in words or index in tokenizer.all_special_ids]] = 0
    model.save_pretrained(str(directory))
    return directory


@cache
def read_task_files(manager_class, *paths):
    return manager_class(include_path=paths, include_defaults=False)


@pytest.fixture
def few_tasks(monkeypatch):
    """Stands in for the harness's own 14,000 task files, whose reading takes 10 seconds: those of the suites, read once."""
    import lm_eval.tasks

    room, manager_class = Path(lm_eval.tasks.__file__).parent, lm_eval.tasks.TaskManager
    names = ["japanese_leaderboard", "ceval", "cmmlu", "mmlu/default", "gsm8k", "hellaswag"]
    own = [room / name for name in (*names, "mmlu_prox/ja", "mmlu_prox/zh", "mmlu_prox/en")]

    def few(include_path=None, include_defaults=True):
        if include_defaults and not include_path:
            return read_task_files(manager_class, *own)
        paths = [*(own if include_defaults else []), *([include_path] if include_path else [])]
        return manager_class(include_path=paths, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
