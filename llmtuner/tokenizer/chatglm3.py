"""ChatGLM3's sentencepiece model as a transformers fast tokenizer: same ids, no remote code, no special tokens from text.

transformers and tokenizers are imported inside functions: they take seconds, and a step's first message comes before.
"""

import itertools
import json
import re
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from llmtuner.console import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# ChatGLM3's added tokens, with the ids right after the base vocabulary, in this order.
SPECIAL_TOKENS = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
SPECIAL_TOKENS += ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
# What the original project put at these ids, so that the tokens added behind them keep clear: pieces that no text produces
PLACEHOLDERS = [f"vcxv{number}" for number in range(1, 10)]
UNK, BOS, EOS = "<unk>", "<s>", "</s>"  # ids 0, 1, 2; <unk> also pads
SPACE = "▁"  # sentencepiece's symbol for a space in a piece
# Piece types of sentencepiece's protobuf schema
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6

# Two noncharacters, which Unicode reserves for internal use. The chat template inserts them into the name of every special
# token in a message, so that it is not recognised there; the tokenizer then removes them from the text.
ESCAPE = "\ufdd0\ufdd1"

# Renders a conversation as ChatGLM3's `build_chat_input` does; only the template itself can produce roles.
CHAT_TEMPLATE = """\
{%- macro as_text(text) -%}
    {%- set safe = namespace(text=text) -%}
    {%- for name in NAMES -%}
        {%- set safe.text = safe.text | replace(name, name[0] + 'ESCAPE' + name[1:]) -%}
    {%- endfor -%}
    {{- safe.text -}}
{%- endmacro -%}
{{- '[gMASK]sop' -}}
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>' + as_text(message['metadata'] or '') + '\\n' -}}
    {%- set content = message['content'] -%}
    {%- if message['tools'] -%}{%- set content = content + '\\n' + message['tools'] | tojson(indent=4) -%}{%- endif -%}
    {%- if content -%}{{- ' ' + as_text(content) -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
""".replace("NAMES", repr([*SPECIAL_TOKENS, UNK, BOS, EOS])).replace("ESCAPE", ESCAPE)


def read_sentencepiece(model_file: Path) -> Any:
    """Reads a sentencepiece model as the protobuf message `ModelProto`.

    The placeholders of the original project's merge become those of `merge_vocab`: control pieces with the special tokens'
    names.

    Raises:
        UserError: if the file is missing or is not a sentencepiece model.
    """
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
    try:
        content = model_file.read_bytes()
        proto.ParseFromString(content)
    except OSError as error:
        raise UserError(f"cannot read the tokenizer model {model_file} ({error.strerror or error}).") from error
    except DecodeError as error:
        raise UserError(f"{model_file} is not a sentencepiece model ({error}). Download or create it again.") from error
    if not proto.pieces:
        raise UserError(f"{model_file} is not a sentencepiece model: it has no pieces. Download or create it again.")
    if PLACEHOLDERS[0].encode() in content:
        names = [piece.piece for piece in proto.pieces]
        first = names.index(PLACEHOLDERS[0]) if PLACEHOLDERS[0] in names else 0
        if names[first : first + len(PLACEHOLDERS)] == PLACEHOLDERS:
            for index, token in enumerate(SPECIAL_TOKENS, start=first):
                proto.pieces[index].piece, proto.pieces[index].type = token, CONTROL
    return proto


def has_tied_scores(proto: Any) -> bool:
    """Whether pieces share a score, as those that the original project added: sentencepiece merges the leftmost pair first.

    No order of merges says the same: 「いたい」 needs いた before たい, 「たいた」 the other way round.
    """
    scores = [piece.score for piece in proto.pieces if piece.type == NORMAL]
    return len(set(scores)) < len(scores)


def check_sentencepiece_spec(proto: Any, model_file: Path, allow_ties: bool = False) -> None:
    """Makes sure that a model tokenizes by ChatGLM3's spec; any other would be converted incorrectly.

    Args:
        allow_ties: pieces may share a score (`has_tied_scores`).

    Raises:
        UserError: lists every difference.
    """
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    pieces = {piece.piece for piece in proto.pieces if piece.type == NORMAL}
    kinds = {piece.type for piece in proto.pieces}
    problems = [
        problem
        for broken, problem in [
            (trainer.model_type != 2, "it is not a BPE model"),
            (not trainer.byte_fallback, "it has no byte fallback"),
            (normalizer.precompiled_charsmap not in (b"", _escape_rule()), f"it normalizes text ({normalizer.name})"),
            (not normalizer.add_dummy_prefix, "it adds no space before a text"),
            (normalizer.remove_extra_whitespaces, "it removes whitespace"),
            ([piece.piece for piece in proto.pieces[:3]] != [UNK, BOS, EOS], f"ids 0, 1, 2 are not {UNK} {BOS} {EOS}"),
            (bool(kinds - {NORMAL, UNKNOWN, CONTROL, BYTE}), "it has user-defined or unused pieces"),
            (
                not allow_ties and has_tied_scores(proto),
                "pieces have the same score, as in the original project's models, whose vocabulary is extended already",
            ),
            # sentencepiece can merge a character that is not a piece; ordered merges cannot
            (not set().union(*pieces) <= pieces, "some pieces contain a character that is not a piece"),
        ]
        if broken
    ]
    if problems:
        raise UserError(
            f"{model_file} does not follow ChatGLM3's spec: {'; '.join(problems)}. "
            "Use ChatGLM3's own tokenizer.model, or train one with this spec."
        )


@cache
def _escape_rule() -> bytes:
    """The rule by which a sentencepiece model removes `ESCAPE` from text."""
    sentencepiece.set_min_log_level(1)  # compiling it is no news
    spec = sentencepiece.SentencePieceNormalizer(norm_map=[(ESCAPE, "")]).serialized_normalizer_spec()
    return sentencepiece_model_pb2.NormalizerSpec.FromString(spec).precompiled_charsmap  # type: ignore[attr-defined]


def special_token_ids(proto: Any) -> dict[str, int]:
    """Ids of the nine special tokens: those of their placeholders, or right after the pieces if there are none.

    Raises:
        UserError: if only some placeholders exist, or a normal piece has the name of a special token.
    """
    found = {piece.piece: index for index, piece in enumerate(proto.pieces) if piece.piece in SPECIAL_TOKENS}
    if not found:
        return {token: len(proto.pieces) + index for index, token in enumerate(SPECIAL_TOKENS)}
    first = min(found.values())
    expected = {token: first + index for index, token in enumerate(SPECIAL_TOKENS)}
    if found != expected or any(proto.pieces[index].type != CONTROL for index in found.values()):
        raise UserError(
            f"the sentencepiece model has pieces named like special tokens ({', '.join(found)}), but not all nine as "
            "control pieces in ChatGLM3's order. Remove them, or merge again with step2_merge_tokenizer.py."
        )
    return expected


def build_fast_tokenizer(model_file: Path) -> "PreTrainedTokenizerFast":
    """Converts a sentencepiece BPE model with ChatGLM3's spec to a fast tokenizer with the same ids.

    sentencepiece merges the adjacent pair whose union has the highest score. An ordered list of merges is equivalent: all
    splits of a piece into two pieces, by descending score of the piece. The nine special tokens come after the pieces of a
    base model; in a merged one they keep these ids. A model with tied scores splits the text itself, which cannot be saved.

    Args:
        model_file: `tokenizer.model`, base or merged.

    Raises:
        UserError: if the file is unreadable, has another spec or misplaced special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    proto = read_sentencepiece(model_file)
    check_sentencepiece_spec(proto, model_file, allow_ties=True)
    specials, tied = special_token_ids(proto), has_tied_scores(proto)
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    merges = [] if tied else ordered_merges(proto)
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=UNK, fuse_unk=True, byte_fallback=True, ignore_merges=tied)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace(ESCAPE, ""), normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    backend.decoder = _sentencepiece_decoder()
    # "sop" occurs in words: single_word keeps "philosophy" intact where text is parsed for special tokens.
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, single_word=token in ("sop", "eop"))
            for token in SPECIAL_TOKENS
        ]
    )
    for token, index in specials.items():
        assert backend.token_to_id(token) == index
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNK,
        pad_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=SPECIAL_TOKENS,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    if tied:  # only now: the class copies its backend, and Python code cannot be copied
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(_SentencePieceSplit(proto))
    return tokenizer


class _SentencePieceSplit:
    """Splits normalized text into the tokens of a sentencepiece model; a character that becomes bytes is one part."""

    def __init__(self, proto: Any):
        self.processor = bare_processor(proto)  # the text has the space already

    def pre_tokenize(self, text: Any) -> None:
        """Splits a `PreTokenizedString` in place; tokenizers calls this method."""
        text.split(self._split)

    def _split(self, _: int, text: Any) -> list[Any]:
        tokens = self.processor.encode(str(text), out_type="proto").pieces
        bounds = itertools.accumulate((len(token.surface) for token in tokens), initial=0)
        return [text[start:end] for start, end in itertools.pairwise(bounds) if start < end]


def _sentencepiece_decoder() -> Any:
    """Decodes as sentencepiece does: without the spaces that it added before the text and after a special token, and </s>.

    After ▁ has been replaced by a space, it serves to mark the end of a special token.
    """
    from tokenizers import Regex, decoders

    names = "|".join(map(re.escape, SPECIAL_TOKENS))
    return decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.Replace(Regex(rf"(?<=\A(?:{names}))\Z"), SPACE),
            decoders.Replace(Regex(rf"\A(?:{BOS}|{EOS})\Z"), ""),
            decoders.Replace(Regex(rf"\A{UNK}\Z"), f"{SPACE}  ⁇ "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
            decoders.Replace(f"{SPACE} ", ""),
            decoders.Replace(SPACE, ""),
        ]
    )


def ordered_merges(proto: Any) -> list[tuple[str, str]]:
    """All pairs of normal pieces whose union is a normal piece, by descending score of the union."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, cut, left, right))
    return [(left, right) for _, _, left, right in sorted(merges)]


def save_tokenizer(model_file: Path, directory: Path) -> "PreTrainedTokenizerFast":
    """Saves the fast tokenizer, its chat template and `tokenizer.model` for `AutoTokenizer` and step 2, and returns it.

    With tied scores, `AutoTokenizer` loads a slow tokenizer with `tokenizer.model` as its encoder instead.

    Raises:
        UserError: as `build_fast_tokenizer`.
    """
    tokenizer = build_fast_tokenizer(model_file)
    directory.mkdir(parents=True, exist_ok=True)
    proto = read_sentencepiece(model_file)
    if has_tied_scores(proto):
        _save_slow_tokenizer(proto, directory)
        return tokenizer
    tokenizer.save_pretrained(directory)
    set_tokenizer_class(directory)
    if model_file.resolve() != (directory / "tokenizer.model").resolve():
        shutil.copyfile(model_file, directory / "tokenizer.model")
    return tokenizer


def set_tokenizer_class(directory: Path) -> None:
    """Makes transformers take tokenizer.json as it is: other classes build a tokenizer of their own from its vocabulary."""
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of transformers knows
    file.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _save_slow_tokenizer(proto: Any, directory: Path) -> None:
    """Saves a tokenizer whose text `AutoTokenizer` encodes by sentencepiece, without remote code.

    `Speech2TextTokenizer` is the one class of transformers that encodes and decodes by a sentencepiece model and leaves the
    text as it is; no speech is meant. For Glm, `AutoTokenizer` overrules `tokenizer_class` unless `auto_map` names code of
    the directory, which it runs only if it is told to trust it. There is none, and its name says what to do.
    """
    config = {
        "tokenizer_class": "Speech2TextTokenizer",
        "auto_map": {"AutoTokenizer": ["load_without.trust_remote_code", None]},
        **{"unk_token": UNK, "pad_token": UNK, "bos_token": BOS, "eos_token": EOS},
        "extra_special_tokens": SPECIAL_TOKENS,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)} | special_token_ids(proto)
    proto.normalizer_spec.precompiled_charsmap = _escape_rule()
    (directory / "tokenizer.json").unlink(missing_ok=True)  # of a run before
    (directory / "tokenizer.model").write_bytes(proto.SerializeToString())
    (directory / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def bare_processor(proto: Any) -> Any:
    """A `SentencePieceProcessor` that puts no space before a text."""
    bare = type(proto)()
    bare.CopyFrom(proto)
    bare.normalizer_spec.add_dummy_prefix = False
    return to_processor(bare)


def to_processor(proto: Any) -> Any:
    """A `SentencePieceProcessor` for a model in memory."""
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def display_tokens(tokens: Sequence[str]) -> list[str]:
    """Tokens as they are shown to a reader: ▁ as a space, a byte as `<0x0A>`."""
    return [token.replace(SPACE, " ") for token in tokens]
