"""A chat session: the dialogue so far, and answers that stream and can be stopped."""

import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from llmtuner.console import UserError
from llmtuner.data.chat_template import get_template
from llmtuner.data.template import Message
from llmtuner.eval.generation import GENERATION_DEFAULTS, GREEDY, generation_config

REPLACEMENT_CHARACTER = "\ufffd"  # what an incomplete character decodes to
MAX_PARTIAL_BYTES = 3  # of a UTF-8 character
SAMPLING_ARGS = ("temperature", "top_p", "top_k")  # transformers warns about these under greedy decoding


def load_generation_settings(directory: Path | str) -> dict[str, Any]:
    """A model directory's own generation settings; greedy decoding if it has none.

    Raises:
        UserError: if its generation_config.json cannot be read.
    """
    path = Path(directory) / "generation_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Fix it, or delete it for greedy decoding.") from error
    settings = {name: config[name] for name in (*GREEDY, *GENERATION_DEFAULTS) if config.get(name) is not None}
    return {**GREEDY, **settings}


class ChatSession:
    """A dialogue of one user with one model.

    Args:
        model, tokenizer: as from `load_for_evaluation`.
        system: the system message; empty for none.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, system: str = "") -> None:
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.template = get_template(tokenizer)
        self.messages: list[Message] = []  # user and assistant in turn
        self._stopped = False  # not an Event: a signal handler sets it, and must not wait for a lock

    @property
    def context_length(self) -> int:
        """The model's context length in tokens."""
        return int(self.model.config.max_position_embeddings)

    def remaining_tokens(self, question: str = "") -> int:
        """Tokens left for an answer to `question`; 0 or less if the context is full."""
        return self.context_length - len(self._prompt(question))

    def ask(self, question: str, settings: Mapping[str, Any], max_new_tokens: int) -> Iterator[str]:
        """Yields the answer so far, again and again; it stays in the dialogue even if it is stopped.

        A question that gets no answer is dropped. An answer ends early where the context is full.

        Args:
            settings: transformers' names; those of sampling are ignored if do_sample is false.

        Raises:
            UserError: at once, if the context has no room for an answer.
        """
        self._stopped = False
        prompt = self._prompt(question)
        remaining = self.context_length - len(prompt)
        if remaining <= 0:
            raise UserError(
                f"the dialogue with this question has {len(prompt):,} tokens, and the model's context is "
                f"{self.context_length:,}. Shorten the question, or clear the dialogue."
            )
        if not settings.get("do_sample"):
            settings = {name: value for name, value in settings.items() if name not in SAMPLING_ARGS}
        config = generation_config(self.template, settings, min(max_new_tokens, remaining))
        return self._answer(question, prompt, config)

    def _prompt(self, question: str) -> list[int]:
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        messages: list[Message] = [*system, *self.messages, {"role": "user", "content": question}]
        return self.template.encode_prompt(self.tokenizer, messages)

    def _answer(self, question: str, prompt: list[int], config: GenerationConfig) -> Iterator[str]:
        answer: Message = {"role": "assistant", "content": ""}
        turn: list[Message] = [{"role": "user", "content": question}, answer]
        self.messages += turn
        streamer = TokenStreamer(len(prompt))
        worker = threading.Thread(target=self._generate, args=(prompt, config, streamer), daemon=True)
        worker.start()
        ids: list[int] = []
        try:
            for tokens in streamer:
                ids += [token for token in tokens if token not in self.template.stop_token_ids]
                text = self._decode(self.template.answer_ids(ids))
                if text != answer["content"]:
                    answer["content"] = text
                    yield text
        finally:  # also if the reader stops reading
            self.stop()
            worker.join()
            if not answer["content"] and self.messages[-1:] == [answer]:
                del self.messages[-2:]

    def _decode(self, ids: list[int]) -> str:
        """The text of an answer, without an incomplete character at its end."""
        for missing in range(MAX_PARTIAL_BYTES + 1):
            text = self.tokenizer.decode(ids[: len(ids) - missing], skip_special_tokens=True)
            if not text.endswith(REPLACEMENT_CHARACTER):
                return text.strip()
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()  # not UTF-8 at all

    @torch.no_grad()
    def _generate(self, prompt: list[int], config: GenerationConfig, streamer: "TokenStreamer") -> None:
        try:
            ids = torch.tensor([prompt], device=self.model.device)
            self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([StopOnRequest(lambda: self._stopped)]),
            )
        except Exception as error:  # raised again in the reader
            streamer.fail(error)

    def stop(self) -> None:
        """Stops the current answer after its next token; may be called from other threads and signal handlers."""
        self._stopped = True

    def undo(self) -> bool:
        """Removes the last question and its answer; false if there is none."""
        had = bool(self.messages)
        del self.messages[-2:]
        return had

    def clear(self) -> None:
        """Removes all messages; the system message stays."""
        self.messages.clear()


class TokenStreamer(BaseStreamer):
    """Passes tokens from the generating thread to the reading one."""

    def __init__(self, prompt_length: int) -> None:
        self.to_skip = prompt_length  # generate passes the prompt first
        self.queue: queue.SimpleQueue[list[int] | Exception | None] = queue.SimpleQueue()

    def put(self, value: torch.Tensor) -> None:
        ids = value.flatten().tolist()
        skipped = min(self.to_skip, len(ids))
        self.to_skip -= skipped
        if ids[skipped:]:
            self.queue.put(ids[skipped:])

    def end(self) -> None:
        self.queue.put(None)

    def fail(self, error: Exception) -> None:
        self.queue.put(error)

    def __iter__(self) -> Iterator[list[int]]:
        while (item := self.queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item


class StopOnRequest(StoppingCriteria):
    """Stops generation once `requested` returns true."""

    def __init__(self, requested: Callable[[], bool]) -> None:
        self.requested = requested

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.requested(), device=input_ids.device)  # type: ignore[return-value]
