"""Every path and number that several steps share, for the profile that the environment selects.

Nothing has to be edited to try something. These variables are read:

    PROFILE         mini (default: the miniature in this repository) or chatglm3-6b
    WORK_DIR        where all results go; default runs/<PROFILE>
    CORPUS_DIR      directory of texts and instruction sets; default: mini writes its own, chatglm3-6b reads the hub
    BASE_MODEL_DIR  the model to extend; default mini/base or models/chatglm3-6b
    OVERWRITE=1     let a step replace its finished result
    SKIP_COMPLETED=1 let a finished step exit at once, without an error (this is how `make demo` resumes)

An empty variable counts as unset. Switches take 1, true, yes, on or 0, false, no, off.
"""

import llmtuner  # noqa: F401, isort: skip  # first of all: it says so if this Python is too old

import os
from dataclasses import dataclass
from pathlib import Path

from llmtuner.console import exit_with_error, print0
from llmtuner.env import deprecated_variables, env_flag, misspelled_variables

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Profile:
    """The values in which profiles differ; paths are the same for all."""

    base_model_dir: Path
    """The model to extend: config, safetensors and `tokenizer.model`."""
    base_id: str
    """Its name on the hub, for the model card; a name without a slash is not on the hub."""
    num_new_tokens: int
    """Tokens that step 1 trains on top of the base tokenizer."""
    ja_vocab_size: int
    """Vocabulary size of the sentencepiece model that step 1 trains with `--method sentencepiece`."""
    tokenizer_sample_bytes: int
    """Bytes of text that step 1 reads, approximately; more costs time and memory and hardly changes the tokens."""
    reference_bytes: int
    """Bytes of Chinese text that tell steps 1 and 2 which Han strings are Chinese too, approximately."""
    held_out_bytes: int
    """UTF-8 bytes per language on which bits per byte and tokenization are measured."""
    context_length: int
    """Tokens in one training sequence, and in one window of an evaluation."""
    max_new_tokens: int
    """Maximum length of a free-form reply, in tokens."""


PROFILES = {
    "mini": Profile(
        base_model_dir=ROOT / "mini" / "base",
        base_id="the miniature of this repository",
        num_new_tokens=900,
        ja_vocab_size=1_500,
        tokenizer_sample_bytes=20_000_000,
        reference_bytes=40_000_000,
        held_out_bytes=60_000,
        context_length=256,
        max_new_tokens=160,
    ),
    "chatglm3-6b": Profile(
        base_model_dir=ROOT / "models" / "chatglm3-6b",
        base_id="THUDM/chatglm3-6b",
        num_new_tokens=13_756,  # as many as the original added, so that the embeddings have its 78,592 rows
        ja_vocab_size=20_000,
        tokenizer_sample_bytes=100_000_000,
        reference_bytes=200_000_000,
        held_out_bytes=500_000,
        context_length=1024,
        max_new_tokens=512,
    ),
}


def _directory(variable: str, default: Path) -> Path:
    value = os.environ.get(variable)
    try:
        return Path(value).expanduser().resolve() if value else default
    except (OSError, RuntimeError) as error:  # no such user, a link to itself
        exit_with_error(f"{variable}={value} is not a usable path ({error}). Set {variable} to a directory.")


for given, meant in misspelled_variables(
    ("PROFILE", "WORK_DIR", "CORPUS_DIR", "BASE_MODEL_DIR", "OVERWRITE", "SKIP_COMPLETED")
):
    print0(f"warning: the environment variable {given} is not read; did you mean {meant}?")
for given, present in deprecated_variables():
    print0(f"warning: the environment variable {given} is deprecated: set {present}")

PROFILE_NAME = os.environ.get("PROFILE") or "mini"
if PROFILE_NAME not in PROFILES:
    exit_with_error(f"PROFILE={PROFILE_NAME} is unknown. Set PROFILE to one of: {', '.join(PROFILES)}.")
PROFILE = PROFILES[PROFILE_NAME]

WORK_DIR = _directory("WORK_DIR", ROOT / "runs" / PROFILE_NAME)
BASE_MODEL_DIR = _directory("BASE_MODEL_DIR", PROFILE.base_model_dir)
MINI_CORPUS_DIR = WORK_DIR / "corpus"  # the miniature's world, written by the first step that reads it
CORPUS_DIR = _directory("CORPUS_DIR", MINI_CORPUS_DIR if PROFILE_NAME == "mini" else ROOT / "corpora")
DATASET_INFO = ROOT / "data" / "dataset_info.json"
CACHE_DIR = WORK_DIR / "cache"  # tokenized data sets
OVERWRITE = env_flag("OVERWRITE")
SKIP_COMPLETED = env_flag("SKIP_COMPLETED")
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))  # processes that train together; torchrun sets it

JA_TOKENIZER = WORK_DIR / "step1_ja_tokenizer" / "ja_bpe.model"
ORIGINAL_MERGE_DIR = WORK_DIR / "step2_original_method"  # for comparison only
MERGED_TOKENIZER_DIR = WORK_DIR / "step2_merged_tokenizer"
ZERO_DIR = WORK_DIR / "step3_zero"
PT_ADAPTER_DIR = WORK_DIR / "step5_pt_adapter"
PT_MERGED_DIR = WORK_DIR / "step5_pt_merged"
SFT_ADAPTER_DIR = WORK_DIR / "step6_sft_adapter"
CHAT_MODEL_DIR = WORK_DIR / "chat_model"
METRICS_DIR = WORK_DIR / "metrics"

# Japanese text of step 1: encyclopedia and literature, 4 : 1 by bytes.
TOKENIZER_MIX = {"wikipedia_ja": 0.8, "aozora_ja": 0.2}
# The writing system of new tokens: one of `WRITING_SYSTEMS` in llmtuner/tokenizer/writing_systems.py.
WRITING_SYSTEM = "japanese"
# Chinese text that tells which Han strings occur in Chinese too.
CHINESE_REFERENCE = ["wikipedia_zh"]
# Pretraining mix by tokens: ja 76 : zh 12 : en 12.
PRETRAINING_MIX = {"wikipedia_ja": 0.64, "aozora_ja": 0.12, "wikipedia_zh": 0.12, "wikitext_en": 0.12}
# One document in twenty is held out of steps 1 and 5, chosen by a hash of its text.
VALIDATION_SHARE = 0.05
# Where each language's held-out text comes from: test files if there are any, else held-out documents.
EVAL_SETS = {
    "ja": ("test_ja", ["wikipedia_ja", "aozora_ja"]),
    "zh": ("test_zh", ["wikipedia_zh"]),
    "en": ("test_en", ["wikitext_en"]),
}
# Settings by which a training stage finds its data.
DATA_SETTINGS = {"dataset_dir": str(DATASET_INFO.parent), "corpus_dir": str(CORPUS_DIR), "cache_dir": str(CACHE_DIR)}
EMBEDDING_ROWS_MULTIPLE = 64  # as in ChatGLM3; tensor cores need multiples of 8
# Questions of steps 4 and 7; those of the real model are a text file meant to be edited.
QUESTIONS = MINI_CORPUS_DIR / "questions.jsonl" if PROFILE_NAME == "mini" else ROOT / "data" / "questions.txt"
