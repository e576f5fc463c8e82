"""Evaluation of a model: what is counted, and the choice of generation settings."""

import json
import shutil

import pytest
import torch

from llmtuner.eval import evaluate
from llmtuner.eval.evaluate import save_generation_config, select_generation_config
from llmtuner.eval.generation import GeneratedAnswer, GeneratedAnswers
from llmtuner.eval.questions import Question
from llmtuner.eval.repetition import repetition_metrics
from llmtuner.model.loading import load_model
from llmtuner.tokenizer.encoding import load_tokenizer


def test_free_answers_are_described_by_repetition_loops_ends_and_speed():
    said = [GeneratedAnswer("abcdefghabcdefgh", 6, True), GeneratedAnswer("12345", 4, False)]
    assert repetition_metrics(GeneratedAnswers(said, 2.0)) == {
        "repeated_4gram_ratio": round(5 / 15, 4),
        "longest_loop": 8,
        "mean_loop": 4.0,
        "finished_ratio": 0.5,
        "tokens_per_second": 5.0,
    }


def test_settings_are_chosen_by_repetition_among_those_that_cost_little(monkeypatch):
    questions = [Question("zh", "zh", "?", "茶"), Question("ja_free", "ja", "？")]
    measured = {  # name: (repetition, right)
        "greedy": (0.5, 0.9),
        "greedy, penalty 1.05": (0.3, 0.89),
        "greedy, penalty 1.1": (0.2, 0.87),
        "sampled": (0.3, 0.91),
        "sampled, penalty 1.05": (0.25, 0.88),
        "sampled, penalty 1.1": (0.1, 0.0),
    }
    names = {json.dumps(settings): name for name, settings in evaluate.GENERATION_CANDIDATES.items()}
    num_prompts, progress = {}, []

    def answer(model, tokenizer, prompts, max_new_tokens, settings, on_progress):
        name = names[json.dumps(settings)]
        num_prompts.setdefault(name, []).append(len(prompts))
        on_progress(len(prompts))
        return GeneratedAnswers([GeneratedAnswer(name, 1, True)] * len(prompts), 1.0)

    monkeypatch.setattr(evaluate, "generate_answers", answer)
    monkeypatch.setattr(
        evaluate, "repetition_metrics", lambda answers: {"repeated_4gram_ratio": measured[answers.texts[0]][0]}
    )
    monkeypatch.setattr(
        evaluate, "accuracy", lambda known, texts, group: measured[texts[0]][1] if group == "zh" else None
    )
    selection = select_generation_config(None, None, questions, 9, progress.append)
    assert selection["chosen"] == "sampled, penalty 1.05"
    assert selection["candidates"]["sampled"] == {
        "settings": evaluate.SAMPLED,
        "repeated_4gram_ratio": 0.3,
        "accuracy": 0.91,
        "accuracy_by_group": {"zh": 0.91},
    }
    assert num_prompts["greedy"] == [1, 1]
    assert num_prompts["sampled"] == [evaluate.NUM_SAMPLES, 1]
    assert sum(progress) == evaluate.num_progress_items(questions, {}, num_models=0)


def test_settings_that_lose_one_language_are_not_chosen(monkeypatch):
    """The mean of both languages would allow it."""
    questions = [Question("zh", "zh", "?", "茶"), Question("ja", "ja", "?", "茶"), Question("ja_free", "ja", "？")]
    measured = {
        "greedy": (0.5, 0.9, 0.9),
        "greedy, penalty 1.05": (0.3, 0.88, 0.88),
        "greedy, penalty 1.1": (0.1, 1.0, 0.87),
    }
    monkeypatch.setattr(
        evaluate, "GENERATION_CANDIDATES", {name: {"do_sample": False, "name": name} for name in measured}
    )
    monkeypatch.setattr(
        evaluate,
        "generate_answers",
        lambda model, tokenizer, prompts, length, settings, **_: GeneratedAnswers(
            [GeneratedAnswer(settings["name"], 1, True)], 1.0
        ),
    )
    monkeypatch.setattr(
        evaluate, "repetition_metrics", lambda answers: {"repeated_4gram_ratio": measured[answers.texts[0]][0]}
    )
    places = {"zh": 1, "ja": 2}
    monkeypatch.setattr(
        evaluate, "accuracy", lambda known, texts, group: measured[texts[0]][places[group]] if group in places else None
    )
    assert select_generation_config(None, None, questions, 9)["chosen"] == "greedy, penalty 1.05"


def test_progress_of_an_evaluation_adds_up(tiny_model_dir):
    model, tokenizer = load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)
    questions = [Question("zh", "zh", "河？", "河"), Question("ja_free", "ja", "山"), Question("ja", "ja", "川")]
    texts = {"zh": ["小镇的东边是一条河。" * 9, "山"], "en": ["The ferry leaves at 9:30."]}
    progress = []
    metrics, answers = evaluate.evaluate_model(model, tokenizer, questions, texts, 16, 4, progress.append)
    assert len(answers) == len(questions)
    assert metrics["bits_per_byte"].keys() == texts.keys()
    assert len(progress) >= 4
    selection = evaluate.num_progress_items(questions, texts, num_models=0)
    assert sum(progress) == pytest.approx(evaluate.num_progress_items(questions, texts, num_models=1) - selection)


def test_settings_become_the_models_own(tiny_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM, GenerationConfig

    directory = tmp_path / "model"
    shutil.copytree(tiny_model_dir, directory)
    save_generation_config(directory, {"do_sample": True, "temperature": 0.8, "top_p": 0.8, "repetition_penalty": 1.1})
    own = AutoModelForCausalLM.from_pretrained(directory).generation_config
    assert (own.do_sample, own.temperature, own.top_p, own.repetition_penalty) == (True, 0.8, 0.8, 1.1)
    save_generation_config(directory, {"do_sample": False, "repetition_penalty": 1.05})
    own = GenerationConfig.from_pretrained(directory)
    assert (own.do_sample, own.temperature, own.top_p, own.repetition_penalty) == (False, None, None, 1.05)
    assert own.eos_token_id == 2  # what else was there stays
