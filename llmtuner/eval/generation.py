"""Batched generation: greedy or sampled answers, their cost, and whether each one finished."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from llmtuner.console import UserError
from llmtuner.data.chat_template import ChatTemplate, get_template
from llmtuner.data.template import Message, Template

GREEDY: dict[str, Any] = {"do_sample": False}
# transformers fills in whatever a call leaves unset from the model's generation_config; a measurement must not depend on it.
GENERATION_DEFAULTS = dict(temperature=1.0, top_p=1.0, top_k=50, repetition_penalty=1.0, no_repeat_ngram_size=0)


@dataclass(frozen=True)
class GeneratedAnswer:
    """A model's answer to one question."""

    text: str
    num_tokens: int
    """Generated tokens, including the end-of-turn token."""
    finished: bool
    """False if the answer was cut off at `max_new_tokens`."""


@dataclass(frozen=True)
class GeneratedAnswers:
    """A model's answers to several questions."""

    answers: list[GeneratedAnswer]
    seconds: float

    @property
    def texts(self) -> list[str]:
        return [answer.text for answer in self.answers]

    @property
    def tokens_per_second(self) -> float:
        """Throughput over all answers; those of one batch are generated in parallel."""
        return round(sum(answer.num_tokens for answer in self.answers) / max(self.seconds, 1e-9), 1)


def generation_config(
    template: Template | ChatTemplate, settings: Mapping[str, Any], max_new_tokens: int
) -> GenerationConfig:
    """A complete configuration for one assistant turn: nothing is left to a model's own generation_config."""
    ends = {"eos_token_id": template.stop_token_ids, "pad_token_id": template.pad_token_id}
    return GenerationConfig(**{**GENERATION_DEFAULTS, **settings, **ends, "max_new_tokens": max_new_tokens})


def batches_by_length(
    sequences: Sequence[Sequence[int]], batch_size: int, longest_first: bool = False
) -> list[list[int]]:
    """Indices of `sequences` in batches of similar length, with little padding.

    Args:
        longest_first: makes the first batch the largest, so that too little memory shows at once.
    """
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]), reverse=longest_first)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.no_grad()
def generate_batch(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], config: GenerationConfig, stop_texts: Sequence[str] = ()
) -> list[list[int]]:
    """Continues token ids in one left-padded batch.

    Args:
        config: as from `generation_config`.
        stop_texts: a continuation also ends once it contains one of these.

    Returns:
        The new token ids of each prompt, up to and including the first end-of-turn token.
    """
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    padded = [[config.pad_token_id] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
    generated = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=model.device),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([StopOnText(tokenizer, stop_texts, longest)] if stop_texts else []),
    )
    continuations = generated[:, longest:].tolist()
    ends = ([end for end, token in enumerate(ids, 1) if token in config.eos_token_id] for ids in continuations)
    return [ids[: end[0]] if end else ids for ids, end in zip(continuations, ends, strict=True)]


class StopOnText(StoppingCriteria):
    """Stops a sequence once its continuation contains one of several texts.

    Args:
        prompt_length: tokens of the padded prompts, in which the texts are not searched for.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.texts, self.prompt_length = tokenizer, texts, prompt_length
        self.lookback = max(len(text.encode("utf-8")) for text in texts) + 2  # tokens; each is one byte at least

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # type: ignore[override]
        ends = input_ids[:, max(self.prompt_length, input_ids.shape[1] - self.lookback) :].tolist()
        decoded = self.tokenizer.batch_decode(ends, skip_special_tokens=True)
        return torch.tensor([any(text in end for text in self.texts) for end in decoded], device=input_ids.device)


def generate_answers(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[str],
    max_new_tokens: int = 48,
    settings: Mapping[str, Any] = GREEDY,
    batch_size: int = 64,
    seed: int = 0,
    on_progress: Callable[[float], Any] | None = None,
) -> GeneratedAnswers:
    """Answers questions, each in a dialogue of its own; at once, where the chat template leaves room for thoughts.

    Args:
        settings: transformers' generation settings (do_sample, temperature, ...); samples depend on `seed` alone.
        on_progress: called with the number of questions answered since the last call.

    Raises:
        UserError: if a question and its answer do not fit the model's context.
    """
    template = get_template(tokenizer)
    config = generation_config(template, settings, max_new_tokens)
    dialogues: list[list[Message]] = [[{"role": "user", "content": question}] for question in questions]
    prompts = [template.encode_prompt(tokenizer, dialogue, template.answer_start) for dialogue in dialogues]
    _check_prompt_lengths(model, prompts, questions, max_new_tokens)
    answers: dict[int, GeneratedAnswer] = {}
    start = time.perf_counter()
    with torch.random.fork_rng(
        devices=[model.device] if model.device.type == "cuda" else []
    ):  # by default, of all GPUs
        torch.manual_seed(seed)
        for batch in batches_by_length(prompts, batch_size):
            continuations = generate_batch(model, tokenizer, [prompts[index] for index in batch], config)
            for index, ids in zip(batch, continuations, strict=True):
                finished = ids[-1] in template.stop_token_ids
                text = tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True).strip()
                answers[index] = GeneratedAnswer(text, len(ids), finished)
            if on_progress:
                on_progress(len(batch))
    return GeneratedAnswers([answers[index] for index in range(len(prompts))], time.perf_counter() - start)


def _check_prompt_lengths(
    model: PreTrainedModel, prompts: list[list[int]], questions: Sequence[str], max_new_tokens: int
) -> None:
    context_length = model.config.max_position_embeddings
    for prompt, question in zip(prompts, questions, strict=True):
        if len(prompt) + max_new_tokens > context_length:
            raise UserError(
                f"the question {question[:40]!r}... has {len(prompt):,} tokens; with {max_new_tokens} tokens for the answer "
                f"it exceeds the model's context of {context_length:,} tokens. Shorten it."
            )
