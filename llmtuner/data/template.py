"""ChatGLM3's chat template, built from ids so that no text can become a role or an end-of-turn token."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from llmtuner.console import UserError, llmtuner_command
from llmtuner.tokenizer.encoding import PROCESSORS, encode, encode_batch, encode_fast

ROLES = ("system", "user", "assistant", "observation")
IGNORE_INDEX = -100  # label of a token without loss
# {"role": system | user | assistant | observation, "content": text}; a call of a tool is an assistant's message that also
# has the tool's name under "metadata".
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
    # As of `ChatTemplate`, whose attributes say what they are for.
    calls_as_json, answer_start, pad_token_id, fingerprint = False, None, 0, "chatglm3"

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
                    f"{' and '.join(name for name, other in ids.items() if other == index)} share the id {index}"
                )
        if problems:
            where = getattr(tokenizer, "name_or_path", "")
            raise UserError(
                f"the tokenizer {where or type(tokenizer).__name__} does not support the chatglm3 template: "
                f"{'; '.join(problems)}. Documents and dialogues are wrapped in these tokens. Use a model with ChatGLM3's "
                f"tokenizer: convert ChatGLM3-6B ({llmtuner_command()} convert), or take the result of "
                "step2_merge_tokenizer.py or a later step."
            )
        gmask, sop, *roles, eos = ids.values()
        return cls(gmask, sop, eos, dict(zip(ROLES, roles, strict=True)))

    @property
    def prefix(self) -> list[int]:
        return [self.gmask, self.sop]

    @property
    def eval_prefix(self) -> list[int]:
        """What stands before a text that is scored."""
        return self.prefix

    @property
    def dialogue_prefix(self) -> list[int]:
        """What a dialogue begins with, before its first message."""
        return self.prefix

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an assistant's turn."""
        return [self.eos, self.roles["user"], self.roles["observation"]]

    def encode_documents(self, tokenizer: Any, texts: list[str] | list[bytes], threads: int = 1) -> list[Ids]:
        """Encodes documents, including prefix and end-of-sequence token; texts in UTF-8 are encoded without a copy."""
        return wrap_documents(encode_arrays(tokenizer, texts, threads), self.prefix, self.eos)

    def encode_prompt(self, tokenizer: Any, messages: list[Message], begun: str | None = None) -> list[int]:
        """Encodes a dialogue up to the role of the assistant, who speaks next.

        Args:
            begun: the beginning of what the assistant says; "" ends the prompt right before its first word.
        """
        texts = [text for message in messages for text in (f"{message.get('metadata', '')}\n", message["content"])]
        encoded = iter(encode_batch(tokenizer, texts))
        ids = list(self.prefix)
        for message in messages:
            ids += [self.roles[message["role"]], *next(encoded), *next(encoded)]
        answer = [] if begun is None else [token for text in ("\n", begun) for token in encode(tokenizer, text)]
        return [*ids, self.roles["assistant"], *answer]

    def answer_ids(self, ids: list[int]) -> list[int]:
        """The ids of an answer that are meant for its reader."""
        return ids

    def find_turns(self, ids: Ids) -> tuple[Ids, int]:
        """Where the user's turns begin in a dialogue, and where its last answer does."""
        return numpy.flatnonzero(ids == self.roles["user"]), int(numpy.flatnonzero(ids == self.roles["assistant"])[-1])

    def encode_dialogues(
        self,
        tokenizer: Any,
        dialogues: list[list[Message]],
        mask_history: bool = False,
        train_on_prompt: bool = False,
        threads: int = 1,
    ) -> list[tuple[Ids, Ids]]:
        """Encodes complete dialogues. Loss is computed only on assistant tokens and on the token that ends each answer.

        Assistant tokens are metadata and content: calling a tool means to write its name and the call.

        Args:
            mask_history: compute loss only on the last turn.
            train_on_prompt: compute loss also on the user's tokens and on all roles; never on the prefix.

        Returns:
            Ids and labels of each dialogue, aligned, int32.
        """
        texts = [message["content"] for messages in dialogues for message in messages]
        tools = sorted({message["metadata"] for messages in dialogues for message in messages if "metadata" in message})
        newline, *encoded = encode_arrays(tokenizer, ["\n", *(f"{tool}\n" for tool in tools), *texts], threads)
        metadata = dict(zip(["", *tools], [newline, *encoded], strict=False))
        contents = iter(encoded[len(tools) :])
        prefix, eos = to_ids(self.prefix), to_ids([self.eos])
        roles = {role: to_ids([role_id]) for role, role_id in self.roles.items()}
        parts: list[Ids] = []
        is_target: list[bool] = []  # of each part
        ends = [0]  # index of the part after each dialogue
        for messages in dialogues:
            first = len(messages) - (2 if train_on_prompt else 1) if mask_history else 0  # message with loss
            parts.append(prefix)
            is_target.append(False)
            end_is_target = False  # of the id that ends the previous message
            for number, message in enumerate(messages):
                has_loss = number >= first and (train_on_prompt or message["role"] == "assistant")
                parts += (roles[message["role"]], metadata[message.get("metadata", "")], next(contents))
                is_target += (end_is_target or (has_loss and train_on_prompt), has_loss, has_loss)
                end_is_target = has_loss
            parts.append(roles["observation"] if "metadata" in messages[-1] else eos)
            is_target.append(end_is_target)
            ends.append(len(parts))
        return with_labels(parts, is_target, ends)


def _special_id(tokenizer: Any, name: str) -> int | None:
    """The id of a special token; None if it is unknown, for which tokenizers return None, 0 or the id of <unk>."""
    index = tokenizer.convert_tokens_to_ids(name)
    is_special = index in tokenizer.all_special_ids and tokenizer.convert_ids_to_tokens(index) == name
    return index if is_special else None


def to_ids(ids: Sequence[int]) -> Ids:
    return numpy.array(ids, dtype=numpy.int32)


def _concatenate(parts: list[Ids], bounds: Sequence[int]) -> tuple[Ids, list[int]]:
    """All parts in one array, of which each document or dialogue is a view; and the offsets of the parts `bounds` in it."""
    offsets = list(itertools.accumulate(map(len, parts), initial=0))
    return numpy.concatenate([numpy.zeros(0, dtype=numpy.int32), *parts]), [offsets[bound] for bound in bounds]


def wrap_documents(documents: list[Ids], prefix: list[int], end: int) -> list[Ids]:
    """Documents with what they begin and end with."""
    parts = [part for ids in documents for part in (to_ids(prefix), ids, to_ids([end]))]
    ids, bounds = _concatenate(parts, range(0, len(parts) + 1, 3))
    return [ids[start:stop] for start, stop in itertools.pairwise(bounds)]


def with_labels(parts: list[Ids], is_target: list[bool], ends: list[int]) -> list[tuple[Ids, Ids]]:
    """Ids and labels of dialogues that consist of parts with or without loss; `ends` are 0 and the part after each."""
    ids, bounds = _concatenate(parts, ends)
    target_mask = numpy.repeat(numpy.array(is_target, dtype=bool), [len(part) for part in parts])
    labels = numpy.where(target_mask, ids, numpy.int32(IGNORE_INDEX))
    return [(ids[start:stop], labels[start:stop]) for start, stop in itertools.pairwise(bounds)]


def encode_arrays(tokenizer: Any, texts: list[str] | list[bytes], threads: int = 1, after: str = "") -> list[Ids]:
    """As `encode_batch`, but in arrays, which sentencepiece fills without making a Python number of every id."""
    processor = PROCESSORS.get(tokenizer)
    if processor:
        return processor.encode(texts, num_threads=threads, out_type="numpy")
    strings = [text.decode() if isinstance(text, bytes) else text for text in texts]
    return [to_ids(ids) for ids in encode_fast(tokenizer, strings, after)]
