"""ChatGLM3's sentencepiece model as a transformers fast tokenizer: same ids, no remote code, no text read as a role."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtuner.console import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# ChatGLM3's added tokens; they take the ids right behind the native pieces, in this order.
SPECIAL_TOKENS = [
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
]
UNK, BOS, EOS = "<unk>", "<s>", "</s>"  # ids 0, 1, 2; <unk> also pads
SPACE = "▁"  # how sentencepiece writes a space inside a piece
BYTE_TOKEN = re.compile(r"^<0x([0-9A-F]{2})>$")

# Piece types of sentencepiece's protobuf schema
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6

# Two characters that Unicode keeps free for uses like this one. The chat template puts them into every name of a special
# token that a message holds, so that it is not found there; the tokenizer then takes them out of the text again.
ESCAPE = "\ufdd0\ufdd1"

# What ChatGLM3's `build_chat_input` makes of a conversation, roles being read from the template's own text alone.
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

    Raises:
        UserError: if the file is missing or is no sentencepiece model.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
    try:
        proto.ParseFromString(model_file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the tokenizer model {model_file} ({error.strerror or error}).") from error
    except DecodeError as error:
        raise UserError(f"{model_file} is not a sentencepiece model ({error}). Fetch or make it again.") from error
    if not proto.pieces:
        raise UserError(f"{model_file} is not a sentencepiece model: it has no piece. Fetch or make it again.")
    return proto


def check_sentencepiece_spec(proto: Any, model_file: Path) -> None:
    """Makes sure that a model splits text by ChatGLM3's rules; others would be translated wrongly.

    Raises:
        UserError: lists every rule that differs.
    """
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    kinds = {piece.type for piece in proto.pieces}
    problems = [
        problem
        for broken, problem in [
            (trainer.model_type != 2, "it is not a BPE model"),
            (not trainer.byte_fallback, "it has no byte fallback"),
            (bool(normalizer.precompiled_charsmap), f"it normalizes text ({normalizer.name})"),
            (not normalizer.add_dummy_prefix, "it puts no blank before a text"),
            (normalizer.remove_extra_whitespaces, "it removes white space"),
            ([piece.piece for piece in proto.pieces[:3]] != [UNK, BOS, EOS], f"ids 0, 1, 2 are not {UNK} {BOS} {EOS}"),
            (bool(kinds - {NORMAL, UNKNOWN, CONTROL, BYTE}), "it has user-defined or unused pieces"),
            (
                len(set(scores.values())) < len(scores),
                "pieces have the same score, so the order of merges is undefined",
            ),
            # sentencepiece can merge a character that is no piece into one; ordered merges cannot
            (not set().union(*scores) <= scores.keys(), "some pieces hold a character that is no piece"),
        ]
        if broken
    ]
    if problems:
        raise UserError(
            f"{model_file} does not follow ChatGLM3's rules: {'; '.join(problems)}. "
            "Use ChatGLM3's own tokenizer.model, or train one with those rules."
        )


def special_token_ids(proto: Any) -> dict[str, int]:
    """Ids of the nine special tokens: where their placeholders stand, or right behind the pieces if there are none.

    Raises:
        UserError: if only some placeholders are there, or an ordinary piece has the name of a special token.
    """
    places = {piece.piece: index for index, piece in enumerate(proto.pieces) if piece.piece in SPECIAL_TOKENS}
    if not places:
        return {token: len(proto.pieces) + index for index, token in enumerate(SPECIAL_TOKENS)}
    first = min(places.values())
    expected = {token: first + index for index, token in enumerate(SPECIAL_TOKENS)}
    if places != expected or any(proto.pieces[index].type != CONTROL for index in places.values()):
        raise UserError(
            f"the sentencepiece model has pieces named like special tokens ({', '.join(places)}), but not all nine as "
            "control pieces in ChatGLM3's order. Take them out, or merge again with step2_merge_tokenizer.py."
        )
    return expected


def build_fast_tokenizer(model_file: Path) -> "PreTrainedTokenizerFast":
    """Translates a sentencepiece BPE model under ChatGLM3's rules into a fast tokenizer with the same ids.

    sentencepiece merges the adjacent pair whose union has the highest score. An ordered list of merges says the same:
    all splits of a piece into two pieces, the pieces in order of falling score. The nine special tokens come behind the
    pieces of a base model and keep their ids in the middle of a merged one.

    Args:
        model_file: `tokenizer.model`, base or merged.

    Raises:
        UserError: if the file is unreadable, follows other rules or holds special tokens in a wrong place.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    proto = read_sentencepiece(model_file)
    check_sentencepiece_spec(proto, model_file)
    specials = special_token_ids(proto)
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    backend = Tokenizer(models.BPE(vocabulary, ordered_merges(proto), unk_token=UNK, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace(ESCAPE, ""), normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    # Decoding as sentencepiece does: the blanks before the text and behind a special token are the tokenizer's own
    # and go; </s> leaves no trace. Once ▁ has become a blank, it is free to mark the end of a special token meanwhile.
    names = "|".join(map(re.escape, SPECIAL_TOKENS))
    backend.decoder = decoders.Sequence(
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
    # "sop" is part of words too: single_word keeps "philosophy" whole where text is parsed for special tokens.
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, single_word=token in ("sop", "eop"))
            for token in SPECIAL_TOKENS
        ]
    )
    for token, index in specials.items():
        assert backend.token_to_id(token) == index
    return PreTrainedTokenizerFast(
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


def ordered_merges(proto: Any) -> list[tuple[str, str]]:
    """All pairs of normal pieces whose union is a normal piece; the union with the highest score first."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, cut, left, right))
    return [(left, right) for _, _, left, right in sorted(merges)]


def save_tokenizer(model_file: Path, directory: Path) -> "PreTrainedTokenizerFast":
    """Writes everything that `AutoTokenizer.from_pretrained(directory)` and step 2 need, and returns the tokenizer.

    Files: tokenizer.json, tokenizer_config.json, chat_template.jinja and `tokenizer.model`, the sentencepiece model.

    Raises:
        UserError: as `build_fast_tokenizer`.
    """
    tokenizer = build_fast_tokenizer(model_file)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    if model_file.resolve() != (directory / "tokenizer.model").resolve():
        shutil.copyfile(model_file, directory / "tokenizer.model")
    return tokenizer


def load_tokenizer(directory: Path | str) -> Any:
    """The fast tokenizer of a model directory; made from `tokenizer.model` where there is no `tokenizer.json`.

    Where there is a `tokenizer.model`, `encode_batch` uses it: same ids, on Japanese and Chinese at least twice as fast.

    Raises:
        UserError: if the directory has neither, a file is damaged, or the two do not hold the same pieces.
    """
    from transformers import AutoTokenizer

    path = Path(directory)
    model_file = path / "tokenizer.model"
    if not (path / "tokenizer.json").is_file():
        if not model_file.is_file():
            raise UserError(
                f"{path} has no tokenizer.json or tokenizer.model. A model directory holds its tokenizer too."
            )
        tokenizer: Any = build_fast_tokenizer(model_file)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a damaged file raises almost anything
            raise UserError(
                f"the tokenizer in {path} cannot be loaded ({type(error).__name__}: {error}). Make or fetch tokenizer.json, "
                "tokenizer_config.json and config.json again."
            ) from error
    if model_file.is_file():
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=read_sentencepiece(model_file).SerializeToString())
        pieces = dict(zip(processor.id_to_piece(list(range(len(processor)))), range(len(processor)), strict=True))
        vocabulary = tokenizer.get_vocab()
        if any(vocabulary.get(piece) != index for piece, index in pieces.items()) or vocabulary.keys() - {
            *pieces,
            *SPECIAL_TOKENS,
        }:
            raise UserError(
                f"tokenizer.json and tokenizer.model in {path} do not hold the same pieces. Take away the one that is wrong."
            )
        tokenizer.sentencepiece = processor
    return tokenizer


def encode(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Ids of a text, with no special token added and none read out of the text: "<|user|>" becomes ordinary pieces."""
    return encode_batch(tokenizer, [text])[0]


def encode_batch(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]) -> list[list[int]]:
    """`encode` for many texts at once, by sentencepiece itself if `load_tokenizer` found its model."""
    processor = getattr(tokenizer, "sentencepiece", None)
    return encode_sentencepiece(processor, texts) if processor else encode_fast(tokenizer, texts)


def encode_sentencepiece(processor: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts by a sentencepiece processor, which knows no special token but those it must not produce."""
    return processor.encode(list(texts), num_threads=min(len(texts), os.cpu_count() or 1) or 1)


def encode_fast(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts by the fast tokenizer.

    Calls the backend as transformers' `__call__` does with `split_special_tokens=True`, but without making offsets and
    masks. The switch is set for each call: saved with the tokenizer, it breaks `apply_chat_template`.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # an earlier call with truncation or padding leaves both switched on
    backend.no_padding()
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


def tokenize_for_display(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[str]:
    """The text of each token of a text, `display_tokens`."""
    return display_tokens(tokenizer.convert_ids_to_tokens(encode(tokenizer, text)))


def display_tokens(pieces: Sequence[str]) -> list[str]:
    """Pieces as a person would want to see them: spaces as such, a single byte like ‹E9›."""
    return [BYTE_TOKEN.sub(r"‹\1›", piece).replace(SPACE, " ") for piece in pieces]
