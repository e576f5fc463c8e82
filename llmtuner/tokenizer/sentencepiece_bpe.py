"""Trains a sentencepiece BPE model on texts, with ChatGLM3's spec or as the original project did."""

import io
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from llmtuner.console import UserError

# sentencepiece silently skips every sentence that is longer, or that contains its symbol for unknown characters.
MAX_SENTENCE_BYTES = 4192
UNK_MARK = "▅"

_SENTENCE = re.compile(
    r"""
      [^。！？!?\r\n▅]+ (?: [。！？!?]+ [」』）)】”’"']* )?  # with its end mark and closing quotes, if any
    | [。！？!?]+ [」』）)】”’"']*                           # only an end mark
    """,
    re.VERBOSE,
)
CHATGLM3_SPEC: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": False,
    "split_digits": True,
    "byte_fallback": True,
}
_NUM_CONTROL_AND_BYTE_PIECES = 3 + 256  # <unk> <s> </s> and the bytes


@dataclass(frozen=True)
class TrainingResult:
    """What `train_bpe` read and trained."""

    vocab_size: int
    input_bytes: int
    """UTF-8 bytes of the sentences read."""
    sentences: int
    skipped: int
    """Sentences that sentencepiece skipped; 0 for those of `split_sentences`."""


def split_sentences(text: str) -> Iterator[str]:
    """Splits after 。！？!? and closing quotes and at line ends, so that no sentence is too long for sentencepiece.

    Yields:
        non-blank sentences of at most `MAX_SENTENCE_BYTES` UTF-8 bytes; a longer one is split into parts.
    """
    max_characters = MAX_SENTENCE_BYTES // 4  # fit even if each takes four bytes
    for match in _SENTENCE.finditer(text):
        sentence = match.group()
        if sentence.isspace():
            continue
        if len(sentence) <= max_characters or len(sentence.encode()) <= MAX_SENTENCE_BYTES:
            yield sentence
        else:
            yield from (sentence[start : start + max_characters] for start in range(0, len(sentence), max_characters))


def short_sentences(texts: Iterable[str], count: int, shortest: int = 20, longest: int = 80) -> list[str]:
    """Picks up to `count` examples: of each text the first sentence with `shortest` to `longest` characters."""
    found: list[str] = []
    for text in texts:
        stripped = (sentence.strip() for sentence in split_sentences(text))
        sentence = next((sentence for sentence in stripped if shortest <= len(sentence) <= longest), None)
        if sentence and sentence not in found:
            found.append(sentence)
        if len(found) == count:
            break
    return found


def interleave_by_bytes(
    streams: Mapping[str, Iterable[str]], ratios: Mapping[str, float], max_bytes: int
) -> Iterator[tuple[str, str]]:
    """Interleaves streams of texts by ratios of UTF-8 bytes: the next text always comes from the stream furthest behind.

    Stops at `max_bytes`, or when the stream whose turn it is has ended, since the ratios could not be kept without it.

    Yields:
        (name of the stream, text)
    """
    iterators = {name: iter(stream) for name, stream in streams.items()}
    used = dict.fromkeys(iterators, 0)
    while sum(used.values()) < max_bytes:
        name = min(used, key=lambda name: used[name] / ratios[name])
        text = next(iterators[name], None)
        if text is None:
            return
        used[name] += len(text.encode())
        yield name, text


def train_bpe(
    sentences: Iterable[str],
    model_file: Path,
    vocab_size: int,
    character_coverage: float = 0.9995,
    required_characters: str = "",
    threads: int | None = None,
    chatglm3_spec: bool = True,
) -> TrainingResult:
    """Trains a sentencepiece BPE model that tokenizes by ChatGLM3's spec, so that its pieces can be merged.

    The spec: text is not normalized, a space is added before it; whitespace is kept and never inside a piece; digits are
    single pieces; characters without a piece are encoded as bytes. Where the text has fewer than `vocab_size` pieces, the
    model is smaller; where its characters alone exceed `vocab_size`, it is larger: the characters and as many merges.

    The sentences are first written to a file beside the model, because an error while reading them must not occur inside
    sentencepiece.

    Args:
        sentences: read once; memory grows with the number of distinct words, as sentencepiece's does.
        model_file: appears complete or not at all; its directory must exist.
        vocab_size: including the 259 control and byte pieces.
        character_coverage: fraction of the text whose characters become pieces; rarer ones are encoded as bytes.
        required_characters: become pieces even if they do not occur in the text.
        threads: all cores by default; the result does not depend on it.
        chatglm3_spec: False trains with sentencepiece's default spec, as the original project did; for comparison only.

    Raises:
        UserError: if there are no sentences, or sentencepiece rejects the settings.
    """
    input_bytes = count = skipped = 0
    characters: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix=".sentences-", dir=model_file.parent) as scratch:
        corpus = Path(scratch) / "sentences.txt"
        with corpus.open("w", encoding="utf-8", newline="") as lines:
            for sentence in sentences:
                size = len(sentence.encode())
                input_bytes += size
                count += 1
                skipped += size > MAX_SENTENCE_BYTES or UNK_MARK in sentence
                characters.update(sentence)
                lines.write(f"{sentence}\n")
        if count == skipped:
            raise UserError("there are no sentences to train the tokenizer on. Put text into CORPUS_DIR.")
        needed = _num_characters_for_coverage(characters, character_coverage)
        if _NUM_CONTROL_AND_BYTE_PIECES + needed >= vocab_size:
            vocab_size = _NUM_CONTROL_AND_BYTE_PIECES + 2 * needed
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                input=str(corpus),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                character_coverage=character_coverage,
                required_chars=required_characters,
                **(CHATGLM3_SPEC if chatglm3_spec else {}),
                max_sentence_length=MAX_SENTENCE_BYTES,
                num_threads=threads or os.cpu_count() or 1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(f"sentencepiece cannot train {vocab_size} pieces on this text: {error}") from error
    partial = model_file.with_name(f"{model_file.name}.partial")
    partial.write_bytes(model.getvalue())
    partial.replace(model_file)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    return TrainingResult(pieces, input_bytes, count, skipped)


def _num_characters_for_coverage(characters: Counter[str], coverage: float) -> int:
    """How many of the most frequent characters make up `coverage` of the text."""
    required = coverage * characters.total()
    covered = count = 0
    for _, frequency in characters.most_common():
        if covered >= required:
            break
        covered += frequency
        count += 1
    return count
