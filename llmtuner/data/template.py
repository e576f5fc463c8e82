"""ChatGLM3's chat format, built from ids so that no text can ever become a role or an end mark."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from llmtuner.console import UserError
from llmtuner.tokenizer.fast import PROCESSORS, encode_batch, encode_fast

ROLES = ("system", "user", "assistant", "observation")
IGNORE_INDEX = -100  # label of a token that is read but not trained
# {"role": system | user | assistant | observation, "content": text}; a call of a tool is an assistant's message that has
# the tool's name under "metadata" too.
Message = dict[str, str]
Ids = numpy.ndarray  # int32, one dimension


@dataclass(frozen=True)
class Template:
    """The ids around a document or a dialogue.

    A document is `[gMASK] sop text </s>`. A dialogue is `[gMASK] sop`, then for each message its role's id, a metadata
    line (empty, or the name of the tool that is called), the content; an assistant's message ends where the next role's
    id stands, the last one with `</s>`, or with `<|observation|>` if it calls a tool.
    """

    gmask: int
    sop: int
    eos: int
    roles: dict[str, int]

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "Template":
        """Looks up the ids of the template's special tokens.

        Raises:
            UserError: if the tokenizer lacks one of them, or two of them share an id.
        """
        ids: dict[str, Any] = {
            name: _special_id(tokenizer, name) for name in ("[gMASK]", "sop", *(f"<|{role}|>" for role in ROLES))
        }
        ids["end-of-sequence (eos_token)"] = tokenizer.eos_token_id
        missing = [name for name, index in ids.items() if index is None]
        problems = [f"it has no special token {', '.join(missing)}"] if missing else []
        for index, count in Counter(ids.values()).items():
            if index is not None and count > 1:
                problems.append(
                    f"{' and '.join(name for name, own in ids.items() if own == index)} share the id {index}"
                )
        if problems:
            where = getattr(tokenizer, "name_or_path", "")
            raise UserError(
                f"the tokenizer {where or type(tokenizer).__name__} does not fit the chatglm3 template: "
                f"{'; '.join(problems)}. Documents and dialogues are wrapped in these tokens. Use a model with ChatGLM3's "
                "tokenizer: convert ChatGLM3-6B (python -m llmtuner convert), or take the result of "
                "step2_merge_tokenizer.py or a later step."
            )
        gmask, sop, *roles, eos = ids.values()
        return cls(gmask, sop, eos, dict(zip(ROLES, roles, strict=True)))

    @property
    def prefix(self) -> list[int]:
        return [self.gmask, self.sop]

    @property
    def stop_token_ids(self) -> list[int]:
        """What ends an assistant's turn."""
        return [self.eos, self.roles["user"], self.roles["observation"]]

    def encode_documents(self, tokenizer: Any, texts: list[str] | list[bytes], threads: int = 1) -> list[Ids]:
        """Ids of whole documents, end mark included; texts in UTF-8 are encoded without being made anew."""
        prefix, end = _ids(self.prefix), _ids([self.eos])
        parts = [part for ids in _encode(tokenizer, texts, threads) for part in (prefix, ids, end)]
        ids, places = _concatenate(parts, range(0, len(parts) + 1, 3))
        return [ids[start:stop] for start, stop in itertools.pairwise(places)]

    def encode_prompt(self, tokenizer: Any, messages: list[Message]) -> list[int]:
        """Ids of a dialogue so far, ready for the assistant to speak."""
        texts = [text for message in messages for text in (f"{message.get('metadata', '')}\n", message["content"])]
        encoded = iter(encode_batch(tokenizer, texts))
        ids = list(self.prefix)
        for message in messages:
            ids += [self.roles[message["role"]], *next(encoded), *next(encoded)]
        return [*ids, self.roles["assistant"]]

    def encode_dialogues(
        self,
        tokenizer: Any,
        dialogues: list[list[Message]],
        mask_history: bool = False,
        train_on_prompt: bool = False,
        threads: int = 1,
    ) -> list[tuple[Ids, Ids]]:
        """Ids and labels of whole dialogues; target tokens are the assistant's words and what ends each of its turns.

        Its words are metadata and content: to call a tool is to write the tool's name and the call.

        Args:
            mask_history: only the last turn is trained.
            train_on_prompt: the other side's words and all roles are trained too; the prefix never is.
        """
        texts = [message["content"] for messages in dialogues for message in messages]
        tools = sorted({message["metadata"] for messages in dialogues for message in messages if "metadata" in message})
        newline, *encoded = _encode(tokenizer, ["\n", *(f"{tool}\n" for tool in tools), *texts], threads)
        metadata = dict(zip(["", *tools], [newline, *encoded], strict=False))
        contents = iter(encoded[len(tools) :])
        prefix, eos = _ids(self.prefix), _ids([self.eos])
        roles = {role: _ids([one]) for role, one in self.roles.items()}
        parts: list[Ids] = []
        trained_parts: list[bool] = []
        ends = [0]  # of the parts of each dialogue
        for messages in dialogues:
            first = len(messages) - (2 if train_on_prompt else 1) if mask_history else 0  # message that is trained
            parts.append(prefix)
            trained_parts.append(False)
            ends_trained = False  # an id that ends a trained answer is trained
            for number, message in enumerate(messages):
                trained = number >= first and (train_on_prompt or message["role"] == "assistant")
                parts += (roles[message["role"]], metadata[message.get("metadata", "")], next(contents))
                trained_parts += (ends_trained or (trained and train_on_prompt), trained, trained)
                ends_trained = trained
            parts.append(roles["observation"] if "metadata" in messages[-1] else eos)
            trained_parts.append(ends_trained)
            ends.append(len(parts))
        ids, places = _concatenate(parts, ends)
        trained_ids = numpy.repeat(numpy.array(trained_parts, dtype=bool), [len(part) for part in parts])
        labels = numpy.where(trained_ids, ids, numpy.int32(IGNORE_INDEX))
        return [(ids[start:stop], labels[start:stop]) for start, stop in itertools.pairwise(places)]


def _special_id(tokenizer: Any, name: str) -> int | None:
    """The id of a special token; None where it is unknown, for which tokenizers give None, 0 or the id of <unk>."""
    index = tokenizer.convert_tokens_to_ids(name)
    is_special = index in tokenizer.all_special_ids and tokenizer.convert_ids_to_tokens(index) == name
    return index if is_special else None


def _ids(ids: Sequence[int]) -> Ids:
    return numpy.array(ids, dtype=numpy.int32)


def _concatenate(parts: list[Ids], bounds: Sequence[int]) -> tuple[Ids, list[int]]:
    """All parts in one array, of which each document or dialogue is a view, and where in it some of them begin."""
    ends = list(itertools.accumulate(map(len, parts), initial=0))
    return numpy.concatenate([numpy.zeros(0, dtype=numpy.int32), *parts]), [ends[bound] for bound in bounds]


def _encode(tokenizer: Any, texts: list[str] | list[bytes], threads: int) -> list[Ids]:
    """As `encode_batch`, but in arrays, which sentencepiece fills without making a Python number of every id."""
    processor = PROCESSORS.get(tokenizer)
    if processor:
        return processor.encode(texts, num_threads=threads, out_type="numpy")
    strings = [text.decode() if isinstance(text, bytes) else text for text in texts]
    return [_ids(ids) for ids in encode_fast(tokenizer, strings)]
