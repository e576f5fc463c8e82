"""Batched generation: answers depend on neither batch nor the model's own settings."""

from types import SimpleNamespace

import pytest
import torch

from llmtuner.console import UserError
from llmtuner.data.template import Template
from llmtuner.eval.generation import GeneratedAnswer, generate_answers
from llmtuner.model.loading import load_model
from llmtuner.tokenizer.encoding import encode, load_tokenizer
from tests.tiny_models import tiny_tokenizer


def test_answers_do_not_depend_on_the_batch(tiny_model_dir):
    model, tokenizer = load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)
    questions = ["一座山？", "When does the ferry leave the old harbour?", "河"]
    together = generate_answers(model, tokenizer, questions, max_new_tokens=6)
    alone = [generate_answers(model, tokenizer, [question], max_new_tokens=6).answers[0] for question in questions]
    assert together.answers == alone
    assert all(1 <= answer.num_tokens <= 6 and answer.finished == (answer.num_tokens < 6) for answer in alone)


def test_an_answer_ends_at_an_end_mark_and_costs_what_came_before(tiny_tokenizer_dir):
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    user = Template.from_tokenizer(tokenizer).roles["user"]
    river, mountain = (encode(tokenizer, text)[-1] for text in ("河", "山"))
    written = torch.tensor([[river, user, 0, 0], [mountain, river, mountain, river]])
    model = SimpleNamespace(
        device=torch.device("cpu"),
        config=SimpleNamespace(max_position_embeddings=99),
        generate=lambda input_ids, **_: torch.cat([input_ids, written], dim=1),
    )
    told = generate_answers(model, tokenizer, ["河", "一座山，一座小镇"], 4).answers
    assert told == [GeneratedAnswer("河", 2, True), GeneratedAnswer("山河山河", 4, False)]


def test_a_base_that_thinks_answers_at_once():
    tokenizer = tiny_tokenizer("qwen3")
    prompts = []
    written = torch.tensor([[*encode(tokenizer, "河"), tokenizer.eos_token_id]] * 2)

    def generate(input_ids, attention_mask, generation_config, **_):
        prompts.extend(zip(input_ids.tolist(), attention_mask.tolist(), strict=True))
        assert generation_config.pad_token_id == tokenizer.pad_token_id
        assert generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
        return torch.cat([input_ids, written], dim=1)

    config = SimpleNamespace(max_position_embeddings=99)
    model = SimpleNamespace(device=torch.device("cpu"), config=config, generate=generate)
    answers = generate_answers(model, tokenizer, ["河?", "一座山?"], 4).answers
    assert [(answer.text, answer.finished) for answer in answers] == [("河", True)] * 2
    for question, (ids, mask) in zip(["河?", "一座山?"], prompts, strict=True):
        padding = mask.count(0)
        assert ids[:padding] == [tokenizer.pad_token_id] * padding
        text = tokenizer.decode(ids[padding:])
        head = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        assert text == f"<|im_start|>user\n{question}{head}"


def test_what_is_drawn_depends_on_the_seed_alone(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # none of which is touched
    model, tokenizer = load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)
    sampled = {"do_sample": True, "temperature": 1.0}

    def draw(seed):
        torch.rand(1)  # what was drawn before does not matter
        return generate_answers(model, tokenizer, ["河", "山"], 12, sampled, seed=seed).texts

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_models_own_settings_do_not_change_a_measurement(tiny_model_dir):
    model, tokenizer = load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)
    before = generate_answers(model, tokenizer, ["河", "一座山"], 20).texts
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    assert generate_answers(model, tokenizer, ["河", "一座山"], 20).texts == before
    penalty = {"do_sample": False, "repetition_penalty": 5.0}
    assert generate_answers(model, tokenizer, ["河", "一座山"], 20, penalty).texts != before


def test_a_question_longer_than_the_context(tiny_model_dir):
    model, tokenizer = load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)
    with pytest.raises(UserError, match=r"tokens; with 6 tokens for the answer it exceeds the model's context of 256"):
        generate_answers(model, tokenizer, ["河", "河" * 300], max_new_tokens=6)
