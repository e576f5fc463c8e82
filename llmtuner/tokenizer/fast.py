"""ChatGLM3's sentencepiece model as a transformers fast tokenizer: same ids, no remote code, no special tokens from text.

transformers and tokenizers are imported inside functions: they take seconds, and a step's first message comes before.
"""

import itertools
import json
import os
import re
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

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
        bare = type(proto)()
        bare.CopyFrom(proto)
        bare.normalizer_spec.add_dummy_prefix = False  # the text has it already
        self.processor = to_processor(bare)

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
    config_file = directory / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of transformers knows
    config_file.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    if model_file.resolve() != (directory / "tokenizer.model").resolve():
        shutil.copyfile(model_file, directory / "tokenizer.model")
    return tokenizer


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


def to_processor(proto: Any) -> Any:
    """A `SentencePieceProcessor` for a model in memory."""
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


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


def display_tokens(tokens: Sequence[str]) -> list[str]:
    """Tokens as they are shown to a reader: ▁ as a space, a byte as `<0x0A>`."""
    return [token.replace(SPACE, " ") for token in tokens]
