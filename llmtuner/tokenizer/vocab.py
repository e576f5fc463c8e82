"""A base tokenizer as steps 1 to 3 see it: what its tokens spell, how it segments text, and how tokens are appended to it.

Two encodings of a token stand behind one interface: sentencepiece's pieces and the tokens of a BPE `tokenizer.json`, which are
characters (metaspace with byte fallback) or bytes (byte-level BPE, where each byte is written as one printable character).
"""

import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtuner.console import UserError
from llmtuner.files import has_chatglm_tokenizer, read_json
from llmtuner.tokenizer.chatglm3 import (
    CONTROL,
    NORMAL,
    SPACE,
    SPECIAL_TOKENS,
    bare_processor,
    check_sentencepiece_spec,
    display_tokens,
    read_sentencepiece,
    save_tokenizer,
    set_tokenizer_class,
    special_token_ids,
    to_processor,
)
from llmtuner.tokenizer.encoding import (
    BYTE_TO_CHARACTER,
    CHARACTER_TO_BYTE,
    copy_tokenizer,
    display_bytes,
    encode_sentencepiece,
    without_added_tokens,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOUNDARY = 0  # separates what no token may span: <unk>, a control token or the byte "!", of which no new token is made
NUM_CONTROL_TOKENS = 3  # <unk> <s> </s>: the first pieces of ChatGLM3's sentencepiece model
CONTROL_SHAPE = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # of added tokens that are no text: <think>, [gMASK]


class Vocab(ABC):
    """The tokens of a BPE tokenizer by id, as its file writes them."""

    tokens: list[str]
    """"" stands for control tokens and single bytes of byte fallback."""
    unk_id: int | None
    unions_merge: bool
    """Whether any two tokens whose union is a token merge (sentencepiece), or only the listed pairs."""
    file_name: str
    """Of the file that holds the tokenizer, in a model directory."""

    @property
    @abstractmethod
    def first_new_id(self) -> int:
        """One past all ids, those of special tokens included."""

    @property
    @abstractmethod
    def base_range(self) -> range:
        """The ids of ordinary tokens, without control tokens around them."""

    @abstractmethod
    def text(self, token: str) -> str | None:
        """What a token spells, with ▁ for a space at its start; None if it begins or ends inside a character."""

    @abstractmethod
    def from_text(self, text: str) -> str:
        """The token that spells a text, the inverse of `text`."""

    def from_bytes(self, data: bytes) -> str:
        """The token that spells bytes which are no complete character; "" where tokens are characters."""
        return ""

    @abstractmethod
    def missing_characters(self, characters: Iterable[str]) -> list[str]:
        """Those characters for which text needs a token of their own before they can be part of a longer token."""

    @abstractmethod
    def segment(self, texts: list[str]) -> np.ndarray:
        """Ids of all texts in one int32 array, with `BOUNDARY` wherever no token may span two neighbours."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens and without recognising any in it."""

    @abstractmethod
    def display(self, ids: Sequence[int]) -> list[str]:
        """The tokens of ids as a reader sees them."""

    @abstractmethod
    def append(self, tokens: Sequence[str], after_special: bool = True) -> "Vocab":
        """Returns a copy with tokens that rank below all present ones, in the order given, and have the next ids.

        Args:
            after_special: the copy is complete: new ids come after those of the special tokens.
        """

    @abstractmethod
    def unreachable(self) -> set[str]:
        """The tokens that no text produces.

        A token is reachable if and only if its own characters alone produce it: as long as nothing merges across its ends,
        the merges between them are the same in any context.
        """

    @abstractmethod
    def spell(self, tokens: Sequence[str]) -> list[list[int]]:
        """The ids into which each of these tokens, which are not this tokenizer's, is split in the middle of a text."""

    @abstractmethod
    def special_ids(self) -> dict[str, int]:
        """Special and other added tokens, none of which text may become, with their ids."""

    @abstractmethod
    def save(self, file: Path) -> None:
        """Writes the tokenizer's own file."""

    @abstractmethod
    def save_model_files(self, directory: Path, base: Path) -> None:
        """Writes all tokenizer files of a model directory, settings and chat template as in the directory `base`."""

    def spell_new_tokens(self, merged: "Vocab") -> list[list[int]]:
        """The ids of this tokenizer that spell each token which `merged` has added, in the order of their ids.

        Raises:
            UserError: if `merged` does not keep this tokenizer's ids.
        """
        kept = merged.tokens[: len(self.tokens)] == self.tokens and merged.special_ids() == self.special_ids()
        if not kept:
            raise UserError(
                "the merged tokenizer does not begin with the tokens of the base tokenizer. Merge again with this base."
            )
        return self.spell(merged.tokens[self.first_new_id :])


def read_vocab(path: Path) -> Vocab:
    """Reads the tokenizer of a model directory, or a tokenizer file.

    Raises:
        UserError: if there is none, or it is of a kind that cannot be extended.
    """
    if is_base := path.is_dir():
        names = ["tokenizer.model"] if has_chatglm_tokenizer(path) else ["tokenizer.json", "tokenizer.model"]
        path = next((path / name for name in names if (path / name).is_file()), path / "tokenizer.json")
    return JsonVocab.read(path) if path.suffix == ".json" else SentencePieceVocab.read(path, is_base)


# -------------------------------------------------------------------------------------------------------- sentencepiece
class SentencePieceVocab(Vocab):
    """ChatGLM3's kind: the pair whose union has the highest score merges first, and special tokens lie behind the pieces."""

    unions_merge = True
    file_name = "tokenizer.model"

    def __init__(self, proto: Any) -> None:
        self.proto = proto
        self.tokens = [piece.piece if piece.type == NORMAL else "" for piece in proto.pieces]
        self.unk_id = 0
        if any(piece.type == NORMAL and not piece.piece for piece in proto.pieces):
            raise UserError("the sentencepiece model has an empty piece. Train it again.")

    @classmethod
    def read(cls, file: Path, spec: bool = False) -> "SentencePieceVocab":
        """Reads a `tokenizer.model`.

        Args:
            spec: whether it must follow ChatGLM3's spec, as a base does and a list of candidates need not.

        Raises:
            UserError: if it is unreadable, or has another spec.
        """
        proto = read_sentencepiece(file)
        if spec:
            check_sentencepiece_spec(proto, file)
        return cls(proto)

    @property
    def first_new_id(self) -> int:
        return max(len(self.tokens), *(index + 1 for index in self.special_ids().values()))

    @property
    def base_range(self) -> range:
        return range(NUM_CONTROL_TOKENS, min(self.special_ids().values()))

    @cached_property
    def processor(self) -> Any:
        return to_processor(self.proto)

    def text(self, token: str) -> str | None:
        return token

    def from_text(self, text: str) -> str:
        return text

    def missing_characters(self, characters: Iterable[str]) -> list[str]:
        known = {piece.piece for piece in self.proto.pieces}
        return [character for character in characters if character not in known]

    def segment(self, texts: list[str]) -> np.ndarray:
        return np.fromiter((index for ids in self.encode(texts) for index in (*ids, BOUNDARY)), np.int32)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return encode_sentencepiece(self.processor, texts)

    def display(self, ids: Sequence[int]) -> list[str]:
        return display_tokens(self.processor.id_to_piece(list(ids)))

    def append(self, tokens: Sequence[str], after_special: bool = True) -> "SentencePieceVocab":
        """Nine placeholders keep the ids of the special tokens: control pieces, which no text produces.

        Raises:
            UserError: if tokens have been appended before.
        """
        if any(piece.piece in SPECIAL_TOKENS for piece in self.proto.pieces):
            raise UserError(
                "the base tokenizer has been merged already. Set BASE_MODEL_DIR to the model before any merge."
            )
        merged = type(self.proto)()
        merged.CopyFrom(self.proto)
        if after_special:
            for token in SPECIAL_TOKENS:
                merged.pieces.add(piece=token, score=0.0, type=CONTROL)
        lowest = min(piece.score for piece in self.proto.pieces if piece.type == NORMAL)
        for rank, token in enumerate(tokens, start=1):
            merged.pieces.add(piece=token, score=lowest - rank, type=NORMAL)
        merged.trainer_spec.vocab_size = len(merged.pieces)
        return SentencePieceVocab(merged)

    def unreachable(self) -> set[str]:
        tokens = {index: token for index, token in enumerate(self.tokens) if token}
        encoded = bare_processor(self.proto).encode(list(tokens.values()))
        return {token for (index, token), ids in zip(tokens.items(), encoded, strict=True) if ids != [index]}

    def spell(self, tokens: Sequence[str]) -> list[list[int]]:
        prefix = self.processor.encode("\n")  # [▁, newline]: what follows is split as in the middle of a text
        encoded = self.processor.encode(["\n" + token.replace(SPACE, " ") for token in tokens])
        return [ids[len(prefix) :] for ids in encoded]

    def special_ids(self) -> dict[str, int]:
        return special_token_ids(self.proto)

    def save(self, file: Path) -> None:
        file.write_bytes(self.proto.SerializeToString())

    def save_model_files(self, directory: Path, base: Path) -> None:
        self.save(directory / self.file_name)
        save_tokenizer(directory / self.file_name, directory)


# ------------------------------------------------------------------------------------------------------- tokenizer.json
class JsonVocab(Vocab):
    """A BPE `tokenizer.json`: listed pairs merge by rank, within the parts into which the pre-tokenizer splits a text."""

    unions_merge = False
    file_name = "tokenizer.json"

    def __init__(self, content: dict[str, Any]) -> None:
        self.content, model = content, content["model"]
        self.byte_level = '"ByteLevel"' in json.dumps(content.get("pre_tokenizer"))
        self.added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        vocabulary: dict[str, int] = model["vocab"]
        self.tokens = [""] * (1 + max(*vocabulary.values(), *self.added.values()))
        for token, index in vocabulary.items():
            if token not in self.added and not (model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token)):
                self.tokens[index] = token
        self.unk_id = vocabulary.get(model.get("unk_token"))

    @property
    def first_new_id(self) -> int:
        return len(self.tokens)

    @property
    def base_range(self) -> range:
        ordinary = [index for token, index in self.content["model"]["vocab"].items() if token not in self.added]
        return range(min(ordinary), max(ordinary) + 1)

    @classmethod
    def read(cls, file: Path) -> "JsonVocab":
        """Reads a `tokenizer.json`.

        Raises:
            UserError: if it is unreadable, or of a kind that cannot be extended; lists every reason.
        """
        content = read_json(file)
        if problems := _unsupported(content):
            raise UserError(f"{file} cannot be extended: {'; '.join(problems)}.")
        return cls(content)

    @cached_property
    def backend(self) -> "Tokenizer":
        """Encodes text without recognising added tokens in it."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(json.dumps(without_added_tokens(self.content)))

    @cached_property
    def merger(self) -> Any:
        """The BPE model alone, which splits a string of token characters by its merges."""
        from tokenizers import models

        model = self.content["model"]
        options = {name: model[name] for name in ("unk_token", "fuse_unk", "byte_fallback") if model.get(name)}
        return models.BPE(model["vocab"], self.merges, **options)

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs that merge, by rank; files of before 2024 write a pair as one string."""
        pairs = self.content["model"]["merges"]
        return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs]

    def text(self, token: str) -> str | None:
        if not self.byte_level:
            return token
        try:
            text = bytes(CHARACTER_TO_BYTE[character] for character in token).decode()
        except (UnicodeDecodeError, KeyError):
            return None
        return SPACE + text[1:] if text.startswith(" ") else text

    def from_text(self, text: str) -> str:
        if not self.byte_level:
            return text
        return self.from_bytes((" " + text[1:] if text.startswith(SPACE) else text).encode())

    def from_bytes(self, data: bytes) -> str:
        return "".join(BYTE_TO_CHARACTER[byte] for byte in data) if self.byte_level else ""

    def missing_characters(self, characters: Iterable[str]) -> list[str]:
        known = {*self.tokens, *self.added}
        return [] if self.byte_level else [character for character in characters if character not in known]

    def segment(self, texts: list[str]) -> np.ndarray:
        parts: list[np.ndarray] = [np.zeros(0, np.int32)]
        for encoding in self.backend.encode_batch(texts, add_special_tokens=False):
            ids, words = np.array(encoding.ids, np.int32), np.array(encoding.word_ids, np.int32)
            parts += [np.insert(ids, np.nonzero(np.diff(words))[0] + 1, BOUNDARY), np.array([BOUNDARY], np.int32)]
        return np.concatenate(parts)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def display(self, ids: Sequence[int]) -> list[str]:
        tokens = [self.tokens[index] or str(self.backend.id_to_token(index)) for index in ids]
        return [display_bytes(token) for token in tokens] if self.byte_level else display_tokens(tokens)

    def append(self, tokens: Sequence[str], after_special: bool = True) -> "JsonVocab":
        """Each token is the union of the two parts that the merges so far leave of it; more parts make it unreachable.

        The special tokens enter the model's vocabulary as well: `tokenizers` takes their ids from there, and would
        otherwise give them the ids behind it. No merge leads to them, so no text produces them.
        """
        model = self.content["model"]
        vocabulary, merges = {**model["vocab"], **self.added}, self.merges
        ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
        for index, token in enumerate(tokens, start=self.first_new_id):
            if token in vocabulary:
                raise ValueError(f"the token {token!r} exists already")
            parts = apply_merges(token, ranks)
            if len(parts) == 2:
                ranks[parts[0], parts[1]] = len(merges)
                merges.append((parts[0], parts[1]))
            vocabulary[token] = index
        written = [list(pair) for pair in merges]
        return JsonVocab({**self.content, "model": {**model, "vocab": vocabulary, "merges": written}})

    def unreachable(self) -> set[str]:
        split = self.merger.tokenize
        return {token for index, token in enumerate(self.tokens) if token and [t.id for t in split(token)] != [index]}

    def spell(self, tokens: Sequence[str]) -> list[list[int]]:
        return [[part.id for part in self.merger.tokenize(token)] for token in tokens]

    def special_ids(self) -> dict[str, int]:
        return self.added

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(self.content, ensure_ascii=False), encoding="utf-8")

    def save_model_files(self, directory: Path, base: Path) -> None:
        copy_tokenizer(base, directory)
        (directory / "tokenizer.model").unlink(missing_ok=True)  # the base's: it lacks the new tokens
        self.save(directory / self.file_name)
        set_tokenizer_class(directory)


def apply_merges(token: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merges the characters of a token as BPE does: always the pair with the lowest rank, the leftmost first."""
    parts = list(token)
    while pairs := {pair: i for i, pair in reversed([*enumerate(itertools.pairwise(parts))]) if pair in ranks}:
        index = pairs[min(pairs, key=ranks.__getitem__)]
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts


def _unsupported(content: dict[str, Any]) -> list[str]:
    """Why a tokenizer.json cannot be extended by continued BPE."""
    model = content.get("model")
    if not isinstance(model, dict) or not model.get("vocab"):
        return ["it has no vocabulary; download it again"]
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    if kind != "BPE" or "merges" not in model:
        return [f"it is a {kind} tokenizer; only BPE has merges, behind which new ones can be ranked"]
    normalizer, added, tokens = content.get("normalizer"), content.get("added_tokens") or [], {*model["vocab"]}
    lossy = sorted(
        {*re.findall(r'"type": "(\w+)"', json.dumps(normalizer))} - {"Sequence", "NFC", "Replace", "Prepend"}
    )
    names = [token["content"] for token in added if not token["special"]]
    as_text = [name for name in names if not CONTROL_SHAPE.fullmatch(name)]
    ids = {*model["vocab"].values(), *(token["id"] for token in added)}
    byte_level = '"ByteLevel"' in json.dumps(content.get("pre_tokenizer"))
    alphabet = {*CHARACTER_TO_BYTE} if byte_level else {f"<0x{byte:02X}>" for byte in range(256)}
    problems = {
        f"its normalizer changes text beyond repair ({', '.join(lossy)})": lossy,
        f"it has added tokens that are text and cut words ({', '.join(map(repr, as_text[:3]))})": as_text,
        f"its {len(ids):,} ids have holes: the highest is {max(ids):,}": len(ids) != max(ids) + 1,
        "characters outside its vocabulary are lost (no bytes)": not byte_level and not model.get("byte_fallback"),
        "it lacks some of the 256 bytes": not alphabet <= tokens,
        "it marks parts of words": model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"),
        "it drops merges at random (dropout)": model.get("dropout"),
    }
    return [problem for problem, found in problems.items() if found]
