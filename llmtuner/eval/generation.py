"""Answers of a model: greedy or sampled, many at once, with what they cost and whether they came to an end."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from llmtuner.console import UserError, progress
from llmtuner.data.template import Template

GREEDY: dict[str, Any] = {"do_sample": False}
# transformers fills what a call leaves open from the model's own defaults; a measurement must not depend on those.
GENERATION_DEFAULTS = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


@dataclass(frozen=True)
class GeneratedAnswer:
    """What a model said."""

    text: str
    num_tokens: int
    """Tokens that were generated, the end mark included."""
    finished: bool
    """Whether it ended by itself and not for want of room."""


@dataclass(frozen=True)
class GeneratedAnswers:
    """What a model said to several questions."""

    answers: list[GeneratedAnswer]
    seconds: float

    @property
    def texts(self) -> list[str]:
        return [answer.text for answer in self.answers]

    @property
    def tokens_per_second(self) -> float:
        """Of all answers together, those of a batch at the same time."""
        return round(sum(answer.num_tokens for answer in self.answers) / max(self.seconds, 1e-9), 1)


def generation_config(template: Template, settings: Mapping[str, Any], max_new_tokens: int) -> GenerationConfig:
    """transformers' settings for one turn of an assistant, complete, so that no default of a model gets in."""
    return GenerationConfig(
        **{**GENERATION_DEFAULTS, **settings},
        max_new_tokens=max_new_tokens,
        eos_token_id=template.stop_token_ids,
        pad_token_id=0,
    )


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[str],
    max_new_tokens: int = 48,
    settings: Mapping[str, Any] = GREEDY,
    batch_size: int = 64,
    name: str = "",
    seed: int = 0,
) -> GeneratedAnswers:
    """Answers to questions, each in a dialogue of its own; an answer ends at an end mark or after `max_new_tokens`.

    Args:
        settings: transformers' names, do_sample, temperature and so on; what is sampled depends on `seed` alone.
        name: stands on the progress bar.
    """
    template = Template.from_tokenizer(tokenizer)
    config = generation_config(template, settings, max_new_tokens)
    prompts = [template.encode_prompt(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    _check_prompt_lengths(model, prompts, questions, max_new_tokens)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    answers = [GeneratedAnswer("", 0, False)] * len(prompts)
    start = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in progress(batches, f"answers {name}".strip(), unit="batch"):
            longest = max(len(prompts[index]) for index in batch)
            padded = [[0] * (longest - len(prompts[index])) + prompts[index] for index in batch]
            mask = [[0] * (longest - len(prompts[index])) + [1] * len(prompts[index]) for index in batch]
            generated = model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=config,
            )
            for index, ids in zip(batch, generated[:, longest:].tolist(), strict=True):
                end = next((place for place, one in enumerate(ids) if one in template.stop_token_ids), None)
                text = tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
                answers[index] = GeneratedAnswer(text, len(ids) if end is None else end + 1, end is not None)
    return GeneratedAnswers(answers, time.perf_counter() - start)


def _check_prompt_lengths(
    model: PreTrainedModel, prompts: list[list[int]], questions: Sequence[str], max_new_tokens: int
) -> None:
    context = model.config.max_position_embeddings
    for prompt, question in zip(prompts, questions, strict=True):
        if len(prompt) + max_new_tokens > context:
            raise UserError(
                f"the question {question[:40]!r}... is {len(prompt):,} tokens long; with {max_new_tokens} for the answer "
                f"that is more than the {context:,} that the model reads. Make it shorter."
            )
