"""Loads a tokenizer as transformers' fast one, and encodes text with it, in which nothing becomes a special token."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from llmtuner.console import UserError
from llmtuner.tokenizer.chatglm3 import (
    SPECIAL_TOKENS,
    build_fast_tokenizer,
    display_tokens,
    read_sentencepiece,
    save_tokenizer,
    to_processor,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILES = (  # what transformers reads
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
    "additional_chat_templates",  # a directory
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
PROCESSORS: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()
"""tokenizer -> the sentencepiece processor that encodes for it: same ids, at least twice as fast on Japanese and Chinese"""
PLAIN_BACKENDS: "WeakKeyDictionary[Any, dict[str, Any]]" = WeakKeyDictionary()
"""tokenizer -> backends of `encode_fast` that recognise no added token, by what the text follows"""

_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTE_TO_CHARACTER = {byte: chr(byte) for byte in _PRINTABLE}
BYTE_TO_CHARACTER |= {byte: chr(256 + i) for i, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))}
"""byte -> the character that stands for it in byte-level BPE, by GPT-2's rule: other bytes follow from U+0100 on"""
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copies the tokenizer of a model directory, if it has one; a lone tokenizer.model is converted."""
    if (source / "tokenizer.model").is_file() and not (source / "tokenizer.json").is_file():
        save_tokenizer(source / "tokenizer.model", destination)
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_dir():
            shutil.copytree(source / name, destination / name, dirs_exist_ok=True)
        elif (source / name).is_file():
            shutil.copyfile(source / name, destination / name)


def load_tokenizer(directory: Path | str) -> Any:
    """Loads the fast tokenizer of a model directory, from `tokenizer.model` if there is no `tokenizer.json`.

    The file is taken as it is: some tokenizer classes that `AutoTokenizer` chooses build another tokenizer from it. With
    ChatGLM3's special tokens and a `tokenizer.model`, `encode_batch` uses the latter (`PROCESSORS`).

    Raises:
        UserError: if the directory has neither, a file is damaged, or the two differ in their pieces.
    """
    from transformers import PreTrainedTokenizerFast

    path = Path(directory)
    model_file = path / "tokenizer.model"
    if (path / "tokenizer.json").is_file():
        try:
            tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # a damaged file raises almost anything
            raise UserError(
                f"the tokenizer in {path} cannot be loaded ({type(error).__name__}: {error}). Create or download "
                "tokenizer.json and tokenizer_config.json again."
            ) from error
    elif model_file.is_file():
        tokenizer = build_fast_tokenizer(model_file)
    else:
        raise UserError(
            f"{path} has no tokenizer.json or tokenizer.model. A model directory must contain its tokenizer."
        )
    vocabulary = tokenizer.get_vocab()
    if model_file.is_file() and vocabulary.keys() >= {*SPECIAL_TOKENS}:
        processor = to_processor(read_sentencepiece(model_file))
        ids = list(range(len(processor)))
        pieces = dict(zip(processor.id_to_piece(ids), ids, strict=True))
        differs = any(vocabulary.get(piece) != index for piece, index in pieces.items())
        if differs or vocabulary.keys() - {*pieces, *SPECIAL_TOKENS}:
            raise UserError(
                f"tokenizer.json and tokenizer.model in {path} differ in their pieces. Remove the one that is wrong."
            )
        PROCESSORS[tokenizer] = processor
    return tokenizer


def encode(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Encodes a text without adding special tokens or recognising any in it: "<|user|>" becomes ordinary tokens."""
    return encode_batch(tokenizer, [text])[0]


def encode_batch(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]) -> list[list[int]]:
    """`encode` for many texts at once, with sentencepiece if `load_tokenizer` found its model."""
    processor = PROCESSORS.get(tokenizer)
    return encode_sentencepiece(processor, texts) if processor else encode_fast(tokenizer, texts)


def encode_sentencepiece(processor: Any, texts: Sequence[str]) -> list[list[int]]:
    """Encodes texts with a sentencepiece processor, which never produces special tokens from text."""
    return processor.encode(list(texts), num_threads=min(len(texts), os.cpu_count() or 1) or 1)


def encode_fast(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], after: str = "") -> list[list[int]]:
    """Encodes texts with the fast tokenizer.

    Calls the backend as transformers' `__call__` does with `split_special_tokens=True`, but without computing offsets and
    masks. The flag is set for each call: saved with the tokenizer, it breaks `apply_chat_template`.

    Args:
        after: what the texts follow, for tokenizers that put a space before a text: nothing, a "token" that was added to
            the vocabulary, or "text".
    """
    backend = _plain_backend(tokenizer, after)
    backend.no_truncation()  # an earlier call with truncation or padding leaves both enabled
    backend.no_padding()
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


def _plain_backend(tokenizer: "PreTrainedTokenizerFast", after: str) -> Any:
    """The backend without its added tokens: `encode_special_tokens` still finds those that are not special (<think>)."""
    from tokenizers import Tokenizer

    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder().values()
    only_special = all(token.special for token in added)
    if not after and only_special:
        return backend
    if tokenizer not in PLAIN_BACKENDS:
        spec = without_added_tokens(json.loads(backend.to_str()))
        backends = {"": backend if only_special else Tokenizer.from_str(json.dumps(spec))}
        for follows in ("token", "text"):
            other = spec | {
                part: _without_space_before(spec[part], follows) for part in ("normalizer", "pre_tokenizer")
            }
            backends[follows] = backends[""] if other == spec else Tokenizer.from_str(json.dumps(other))
        PLAIN_BACKENDS[tokenizer] = backends
    return PLAIN_BACKENDS[tokenizer][after]


def without_added_tokens(spec: dict[str, Any]) -> dict[str, Any]:
    """The content of a tokenizer.json that recognises no added token in a text, and adds none to it."""
    model, names = spec["model"], {token["content"] for token in spec.get("added_tokens") or ()}
    if model["type"] == "BPE":  # no pre-token may be one of these tokens either (ignore_merges)
        names -= {model["unk_token"]}
        vocabulary = {token: index for token, index in model["vocab"].items() if token not in names}
        merges = [pair for pair in model["merges"] if not names & {*pair, "".join(pair)}]
        model = {**model, "vocab": vocabulary, "merges": merges}
    return {**spec, "model": model, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}


def _without_space_before(spec: Any, after: str) -> Any:
    """A normalizer or pre-tokenizer that puts no space where the text goes on: `after` an added token, or after text."""
    text = json.dumps(spec).replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    if after == "text":
        text = text.replace('"prepend_scheme": "always"', '"prepend_scheme": "never"')
        text = text.replace('"add_prefix_space": true', '"add_prefix_space": false')
        text = re.sub(r'("type": "Prepend", "prepend": )"[^"]*"', r'\1""', text)
    return json.loads(text)


def display_ids(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Tokens as they are shown to a reader: a space as such, a byte that is no character as `<0x0A>`."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    is_byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    return [display_bytes(token) for token in tokens] if is_byte_level else display_tokens(tokens)


def display_bytes(token: str) -> str:
    """A token of byte-level BPE as text; an added token is text already."""
    if not CHARACTER_TO_BYTE.keys() >= {*token}:
        return token
    text = bytes(CHARACTER_TO_BYTE[character] for character in token).decode(errors="surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda match: f"<0x{ord(match[0]) - 0xDC00:02X}>", text)
