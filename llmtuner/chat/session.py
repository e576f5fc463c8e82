"""A dialogue with a model: what was said so far, and answers that come piece by piece and can be stopped."""

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
from llmtuner.data.template import Message, Template
from llmtuner.eval.generation import GENERATION_DEFAULTS, GREEDY, generation_config

REPLACEMENT_CHARACTER = "\ufffd"  # what each byte decodes to while others of its character are missing
MAX_PARTIAL_BYTES = 3  # bytes of a character, all but its last
SAMPLING_ARGS = ("temperature", "top_p", "top_k")  # transformers warns of these where nothing is sampled


def load_generation_settings(directory: Path | str) -> dict[str, Any]:
    """The generation settings that a model's directory names as its own; greedy where it names none.

    Raises:
        UserError: if its generation_config.json cannot be read.
    """
    path = Path(directory) / "generation_config.json"
    try:
        named = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Mend it, or take it away to be answered greedily.") from error
    return {**GREEDY, **{name: named[name] for name in (*GREEDY, *GENERATION_DEFAULTS) if named.get(name) is not None}}


class ChatSession:
    """Questions and answers of one person and one model, answers being streamed.

    Args:
        model, tokenizer: as from `load_for_evaluation`.
        system: what the model is told before the dialogue; empty for nothing.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, system: str = "") -> None:
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.template = Template.from_tokenizer(tokenizer)
        self.messages: list[Message] = []  # user and assistant in turn
        self._stopped = False  # no Event: a signal handler may set this at any moment, and must not wait for a lock

    @property
    def context_length(self) -> int:
        """Tokens that the model can read at most."""
        return int(self.model.config.max_position_embeddings)

    def remaining_tokens(self, question: str = "") -> int:
        """Tokens that are left for an answer to `question`; not above 0 if there is no room for one."""
        return self.context_length - len(self._prompt(question))

    def ask(self, question: str, settings: Mapping[str, Any], max_new_tokens: int) -> Iterator[str]:
        """Yields the answer as far as it has come, again and again; what was said stays in the dialogue, also if stopped.

        A question to which nothing was said is forgotten. The answer ends early where the model can read no more.

        Args:
            settings: transformers' names; those of sampling may stay where do_sample is false.

        Raises:
            UserError: before anything is said, if the dialogue does not leave room for an answer.
        """
        self._stopped = False
        prompt = self._prompt(question)
        room = self.context_length - len(prompt)
        if room <= 0:
            raise UserError(
                f"the dialogue with this question is {len(prompt):,} tokens long, and the model reads at most "
                f"{self.context_length:,}. Ask more briefly, or forget what was said before."
            )
        if not settings.get("do_sample"):
            settings = {name: value for name, value in settings.items() if name not in SAMPLING_ARGS}
        return self._answer(question, prompt, generation_config(self.template, settings, min(max_new_tokens, room)))

    def _prompt(self, question: str) -> list[int]:
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return self.template.encode_prompt(
            self.tokenizer, [*system, *self.messages, {"role": "user", "content": question}]
        )

    def _answer(self, question: str, prompt: list[int], config: GenerationConfig) -> Iterator[str]:
        asked: Message = {"role": "user", "content": question}
        said: Message = {"role": "assistant", "content": ""}
        self.messages += [asked, said]
        tokens = TokenStreamer(len(prompt))
        worker = threading.Thread(target=self._generate, args=(prompt, config, tokens), daemon=True)
        worker.start()
        ids: list[int] = []
        try:
            for new in tokens:
                ids += [one for one in new if one not in self.template.stop_token_ids]
                text = self._decode(ids)
                if text != said["content"]:
                    said["content"] = text
                    yield text
        finally:  # also when whoever listens has gone
            self.stop()
            worker.join()
            if not said["content"]:
                self.messages[:] = [one for one in self.messages if one is not asked and one is not said]

    def _decode(self, ids: list[int]) -> str:
        """The text of an answer without the bytes at its end that are no character yet."""
        for missing in range(MAX_PARTIAL_BYTES + 1):
            text = self.tokenizer.decode(ids[: len(ids) - missing], skip_special_tokens=True)
            if not text.endswith(REPLACEMENT_CHARACTER):
                return text.strip()
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()  # bytes that will never be one

    @torch.no_grad()
    def _generate(self, prompt: list[int], config: GenerationConfig, tokens: "TokenStreamer") -> None:
        try:
            ids = torch.tensor([prompt], device=self.model.device)
            self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=tokens,
                stopping_criteria=StoppingCriteriaList([StopOnRequest(lambda: self._stopped)]),
            )
        except Exception as error:  # raised again where the answer is read
            tokens.fail(error)

    def stop(self) -> None:
        """Ends the answer that is being given, after the token at hand; may be called from another thread or a signal handler."""
        self._stopped = True

    def undo(self) -> bool:
        """Forgets the last question and its answer; false if there was none."""
        had = bool(self.messages)
        del self.messages[-2:]
        return had

    def clear(self) -> None:
        """Forgets what was said; what the model was told before stays."""
        self.messages.clear()


class TokenStreamer(BaseStreamer):
    """Tokens on their way from the thread that generates them to the one that reads them."""

    def __init__(self, prompt_length: int) -> None:
        self.to_skip = prompt_length  # generate hands over the prompt first
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
        while (one := self.queue.get()) is not None:
            if isinstance(one, Exception):
                raise one
            yield one


class StopOnRequest(StoppingCriteria):
    """Stops a generation once it is asked to."""

    def __init__(self, requested: Callable[[], bool]) -> None:
        self.requested = requested

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.requested(), device=input_ids.device)  # type: ignore[return-value]
