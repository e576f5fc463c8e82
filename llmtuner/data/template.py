"""ChatGLM3's chat format, built from ids so that no text can ever become a role or an end mark."""

from dataclasses import dataclass
from typing import Any

from llmtuner.tokenizer.fast import encode_batch

IGNORE = -100  # label of a token that is read but not trained
Message = dict[str, str]  # {"role": system | user | assistant | observation, "content": text}


@dataclass(frozen=True)
class Template:
    """The ids around a document or a dialogue.

    A document is `[gMASK] sop text </s>`. A dialogue is `[gMASK] sop`, then for each message its role's id, an empty
    metadata line, the content; an assistant's message ends where the next role's id stands, the last one with `</s>`.
    """

    gmask: int
    sop: int
    eos: int
    roles: dict[str, int]

    @classmethod
    def of(cls, tokenizer: Any) -> "Template":
        """Looks the ids up in a tokenizer with ChatGLM3's special tokens."""
        ids = tokenizer.convert_tokens_to_ids
        roles = {role: ids(f"<|{role}|>") for role in ("system", "user", "assistant", "observation")}
        return cls(ids("[gMASK]"), ids("sop"), tokenizer.eos_token_id, roles)

    @property
    def prefix(self) -> list[int]:
        return [self.gmask, self.sop]

    @property
    def stop_ids(self) -> list[int]:
        """What ends an assistant's turn."""
        return [self.eos, self.roles["user"], self.roles["observation"]]

    def documents(self, tokenizer: Any, texts: list[str]) -> list[list[int]]:
        """Ids of whole documents, end mark included."""
        return [[*self.prefix, *ids, self.eos] for ids in encode_batch(tokenizer, texts)]

    def prompt(self, tokenizer: Any, messages: list[Message]) -> list[int]:
        """Ids of a dialogue so far, ready for the assistant to speak."""
        metadata, *contents = encode_batch(tokenizer, ["\n", *(message["content"] for message in messages)])
        ids = list(self.prefix)
        for message, content in zip(messages, contents, strict=True):
            ids += [self.roles[message["role"]], *metadata, *content]
        return [*ids, self.roles["assistant"]]

    def dialogues(self, tokenizer: Any, dialogues: list[list[Message]]) -> list[tuple[list[int], list[int]]]:
        """Ids and labels of whole dialogues; trained are the assistant's words and what ends each of its turns."""
        texts = [message["content"] for messages in dialogues for message in messages]
        metadata, *contents = encode_batch(tokenizer, ["\n", *texts])
        remaining = iter(contents)
        encoded = []
        for messages in dialogues:
            ids, labels = list(self.prefix), [IGNORE] * len(self.prefix)
            after_assistant = False
            for message in messages:
                spoken = [*metadata, *next(remaining)]
                trained = message["role"] == "assistant"
                role = self.roles[message["role"]]
                ids += [role, *spoken]
                labels += [role if after_assistant else IGNORE, *(spoken if trained else [IGNORE] * len(spoken))]
                after_assistant = trained
            ids.append(self.eos)
            labels.append(self.eos if after_assistant else IGNORE)
            encoded.append((ids, labels))
        return encoded
