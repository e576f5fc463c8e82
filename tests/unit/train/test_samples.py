"""Prompts answered during training: by the model as it is, in every file once, without a trace in the training."""

import json
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmtuner.console import TrainingInterrupted, UserError
from llmtuner.data.template import Template
from llmtuner.eval.generation import GREEDY, generate_answers, generate_batch, generation_config
from llmtuner.model.loading import load_for_evaluation
from llmtuner.tokenizer.encoding import encode_batch
from llmtuner.train.samples import MAX_NEW_TOKENS
from llmtuner.train.tuner import run_exp
from tests.training import SFT, ended_at, log_of

PROMPTS = ["小镇", "The ferry leaves at 9, and"]
SAMPLES = {"sample_steps": 5, "sample_prompts": PROMPTS}


def trained_model(run):
    model, tokenizer = load_for_evaluation(run["model_name_or_path"])
    return PeftModel.from_pretrained(model.float(), run["output_dir"]), tokenizer


def test_samples_leave_no_trace_and_resume(saving_run, tmp_path, monkeypatch):
    plain = {**saving_run, "output_dir": str(tmp_path / "plain"), "eval_on_start": False}
    run_exp(plain)
    sampled = {**plain, **SAMPLES, "output_dir": str(tmp_path / "sampled"), "report_to": "tensorboard"}
    with monkeypatch.context() as patch:
        ended_at(patch, 8, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted):
            run_exp(sampled)
    file = Path(sampled["output_dir"], "samples.jsonl")
    lost = {"step": 10, "prompt": "of a lost step", "answer": ""}
    file.write_text(file.read_text() + json.dumps(lost) + '\n{"step": 1', encoding="utf-8")
    samples = run_exp(sampled)["samples"]

    assert [(sample["step"], sample["prompt"]) for sample in samples] == [
        (step, prompt) for step in (0, 5, 10, 14) for prompt in PROMPTS
    ]
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == samples
    assert log_of(sampled["output_dir"]) == log_of(plain["output_dir"])
    weights = [load_file(Path(run["output_dir"], "adapter_model.safetensors")) for run in (plain, sampled)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    model, tokenizer = trained_model(sampled)
    config = generation_config(Template.from_tokenizer(tokenizer), GREEDY, MAX_NEW_TOKENS)
    prefix = Template.from_tokenizer(tokenizer).prefix
    expected = [
        tokenizer.decode(generate_batch(model, tokenizer, [[*prefix, *ids]], config)[0], skip_special_tokens=True)
        for ids in encode_batch(tokenizer, PROMPTS)
    ]
    assert [sample["answer"] for sample in samples[-2:]] == [text.strip().rstrip("\ufffd") for text in expected]

    texts = {}
    for events in Path(sampled["output_dir"]).rglob("events.out.tfevents.*"):
        accumulator = EventAccumulator(str(events))
        accumulator.Reload()
        tag = f"samples/{PROMPTS[0]}/text_summary"
        if tag in accumulator.Tags()["tensors"]:
            texts |= {event.step: event.tensor_proto.string_val[0].decode() for event in accumulator.Tensors(tag)}
    assert texts == {sample["step"]: sample["answer"] for sample in samples if sample["prompt"] == PROMPTS[0]}


def test_questions_are_asked_as_in_a_chat(tiny_run):
    run = {**tiny_run, **SFT, **SAMPLES, "max_steps": 2, "eval_on_start": False, "plot_loss": False}
    samples = run_exp(run)["samples"]
    assert [sample["step"] for sample in samples] == [0, 0, 2, 2]
    expected = generate_answers(*trained_model(run), PROMPTS, MAX_NEW_TOKENS)
    assert [sample["answer"] for sample in samples[2:]] == [text.rstrip("\ufffd") for text in expected.texts]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_steps": 5}, "no sample_prompts"),
        ({"sample_prompts": "a"}, "sample_steps does not say"),
        ({"sample_steps": 0, "sample_prompts": "a"}, "at least 1"),
        ({"sample_steps": 5, "sample_prompts": ["long " * 300]}, "exceeds the model's context"),
    ],
)
def test_what_cannot_be_sampled_is_refused(tiny_run, settings, message):
    with pytest.raises(UserError, match=message):
        run_exp({**tiny_run, **settings})
    assert not Path(tiny_run["output_dir"]).exists()
