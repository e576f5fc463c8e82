"""Every path and number that several steps share, for the profile that the environment selects.

Nothing has to be edited to try something. These variables are read:

    PROFILE         mini (default: the miniature in this repository), chatglm3-6b, or a YAML file with the fields of `Profile`
                    for another base or language, such as examples/llama3-8b-khmer.yaml
    WORK_DIR        where all results go; default runs/<PROFILE>, of a file its name without suffix
    CORPUS_DIR      directory of texts and instruction sets; default: mini writes its own, others read the hub
    BASE_MODEL_DIR  the model to extend; default mini/base, models/chatglm3-6b, or what the file says
    OVERWRITE=1     let a step replace its finished result
    SKIP_COMPLETED=1 let a finished step exit at once, without an error (this is how `make demo` resumes)

An empty variable counts as unset. Switches take 1, true, yes, on or 0, false, no, off.
"""

import llmtuner  # noqa: F401, isort: skip  # first of all: it says so if this Python is too old

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtuner.console import UserError, exit_with_error, print0
from llmtuner.env import deprecated_variables, env_flag, misspelled_variables
from llmtuner.eval.language import Languages
from llmtuner.files import has_chatglm_tokenizer
from llmtuner.hparams.parser import read_dataclass
from llmtuner.hparams.setting import AT_LEAST_1, AT_LEAST_8, REQUIRED, setting

ROOT = Path(__file__).resolve().parent


SETS = "data sets of data/dataset_info.json"


@dataclass(frozen=True)
class Profile:
    """What differs from one base and language to another: the fields of a PROFILE file, with their defaults."""

    # fmt: off
    base_model_dir: str = setting(REQUIRED, "The model to extend, relative to this directory: config, safetensors, tokenizer.")
    base_id: str = setting(REQUIRED, "Its name on the hub, for the model card; a name without a slash is not on the hub.")
    language: str = setting(REQUIRED, "Code of the language that is added, such as ja.")
    language_name: str = setting(REQUIRED, "Its English name, for messages and the report.")
    retained_languages: dict[str, str] = setting(REQUIRED, "Code and name of each language that the base must not lose.")
    writing_system: str = setting(REQUIRED, "Of new tokens: japanese, korean, or a script of Unicode by its name.")
    tokenizer_mix: dict[str, float] = setting(REQUIRED, f"Text of step 1: {SETS} with their shares of bytes.")
    pretraining_mix: dict[str, float] = setting(REQUIRED, f"Text of step 5: {SETS} with their shares of tokens.")
    eval_sets: dict[str, list[str]] = setting(
        REQUIRED, f"Of each language: {SETS} whose held-out documents measure, unless there are files of test_<code>.")
    instruction_sets: list[str] = setting(REQUIRED, f"Instructions of step 6: {SETS}.")
    reference_sets: list[str] = setting(
        [], f"Text of the languages to keep, which tells what they write, too: {SETS}. Needed for a shared script.")
    glossary: str = setting("", f"Translations of words that step 3 reads with --init glossary: one of the {SETS}.")
    init_output: str = setting("", "How step 3 starts new output rows unless it is told: one of its --init; empty: mean.")
    questions: str = setting("data/questions.txt", "What steps 4 and 7 ask; its groups are named after language codes.")
    num_new_tokens: int = setting(13_756, "Tokens that step 1 trains on top of the base tokenizer.", AT_LEAST_1)
    ja_vocab_size: int = setting(20_000, "Vocabulary size that step 1 trains with --method sentencepiece.", AT_LEAST_1)
    tokenizer_sample_bytes: int = setting(
        100_000_000, "Bytes that step 1 reads, about; more costs time and memory and hardly changes tokens.", AT_LEAST_1)
    reference_bytes: int = setting(200_000_000, "Bytes of `reference_sets` that steps 1 and 2 read, about.", AT_LEAST_1)
    held_out_bytes: int = setting(500_000, "UTF-8 bytes per language that bits per byte are measured on.", AT_LEAST_1)
    context_length: int = setting(1024, "Tokens in one training sequence, and in one window of an evaluation.", AT_LEAST_8)
    max_new_tokens: int = setting(512, "Maximum length of a free-form reply, in tokens.", AT_LEAST_1)
    pt_settings: dict[str, Any] = setting({}, "Settings of step 5 that differ from its own for chatglm3-6b.")
    sft_settings: dict[str, Any] = setting({}, "Settings of step 6 that differ from its own for chatglm3-6b.")
    # fmt: on


JAPANESE: dict[str, Any] = dict(
    language="ja",
    language_name="Japanese",
    retained_languages={"zh": "Chinese", "en": "English"},
    writing_system="japanese",
    # Encyclopedia and literature, 4 : 1 by bytes.
    tokenizer_mix={"wikipedia_ja": 0.8, "aozora_ja": 0.2},
    # Which Han strings occur in Chinese too.
    reference_sets=["wikipedia_zh"],
    glossary="glossary",
    # By tokens ja 76 : zh 12 : en 12.
    pretraining_mix={"wikipedia_ja": 0.64, "aozora_ja": 0.12, "wikipedia_zh": 0.12, "wikitext_en": 0.12},
    eval_sets={"ja": ["wikipedia_ja", "aozora_ja"], "zh": ["wikipedia_zh"], "en": ["wikitext_en"]},
    instruction_sets=["oasst2_ja", "dolly_ja", "hh_rlhf_ja", "ichikara_ja", "alpaca_zh", "ruozhiba_zh", "wiki_qa_en",
                      "code_alpaca", "python_code"],
)  # fmt: skip
# The miniature's own texts come with sets that lead from what Chinese and English ones tell to Japanese: docs/bridges.md.
MINI_MIX: dict[str, Any] = dict(
    tokenizer_mix={"wikipedia_ja": 0.5, "aozora_ja": 0.1, "words_ja": 0.4},
    pretraining_mix={"wikipedia_ja": 0.32, "wikipedia_ja_alongside": 0.08, "aozora_ja": 0.06, "wikipedia_zh": 0.03,
                     "wikitext_en": 0.04, "wikipedia_zh_switched": 0.11, "wikitext_en_switched": 0.04,
                     "parallel_ja_zh": 0.08, "crosslingual": 0.08, "alpaca_zh_switched": 0.09, "wiki_qa_en": 0.07},
    instruction_sets=["oasst2_ja", "dolly_ja", "hh_rlhf_ja_switched", "ichikara_ja", "alpaca_zh_switched", "ruozhiba_zh",
                      "wiki_qa_en", "code_alpaca", "python_code", "crosslingual"],
    init_output="glossary",
)  # fmt: skip
PROFILES = {
    "mini": Profile(
        **JAPANESE,
        base_model_dir="mini/base",
        base_id="the miniature of this repository",
        num_new_tokens=900,
        ja_vocab_size=1_500,
        tokenizer_sample_bytes=20_000_000,
        reference_bytes=40_000_000,
        held_out_bytes=60_000,
        context_length=256,
        max_new_tokens=160,
    ),
    # 13,756 new tokens: as many as the original added, so that the embeddings have its 78,592 rows.
    "chatglm3-6b": Profile(**JAPANESE, base_model_dir="models/chatglm3-6b", base_id="THUDM/chatglm3-6b"),
}


def _read_profile(value: str) -> tuple[str, Profile]:
    """The name and the values of a profile that is built in, or a YAML file."""
    name = Path(value).stem
    if value in PROFILES:
        return value, PROFILES[value]
    if not value.endswith((".yaml", ".yml")) or name in PROFILES:
        exit_with_error(
            f"PROFILE={value} is unknown. Set PROFILE to one of: {', '.join(PROFILES)}; or to a YAML file of another name."
        )
    try:
        file = ROOT / value  # from any directory, if it is this repository's
        return name, read_dataclass(file if file.is_file() else value, Profile, _find_contradictions)
    except UserError as error:
        exit_with_error(str(error))


def _find_contradictions(profile: Profile) -> Iterator[str]:
    """What does not go together in a profile, beginning with the field."""
    if profile.language in profile.retained_languages or not profile.retained_languages:
        yield "retained_languages has to name the languages to keep, without the one that is added"
    languages = {profile.language, *profile.retained_languages}
    for language in sorted(languages ^ profile.eval_sets.keys()):
        if language in languages:
            yield f"eval_sets has no entry for {language}, so that there is no text to measure this language with"
        else:
            yield f"eval_sets.{language} is for no language of this profile ({', '.join(sorted(languages))})"
    for name in ("tokenizer_mix", "pretraining_mix"):
        mix = getattr(profile, name)
        if min(mix.values(), default=0) <= 0 or abs(sum(mix.values()) - 1) > 1e-6:
            yield f"{name} has the shares {', '.join(map(str, mix.values()))}; shares are above 0 and sum to 1"


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

PROFILE_NAME, PROFILE = _read_profile(os.environ.get("PROFILE") or "mini")
LANGUAGES = Languages({PROFILE.language: PROFILE.language_name, **PROFILE.retained_languages})

WORK_DIR = _directory("WORK_DIR", ROOT / "runs" / PROFILE_NAME)
BASE_MODEL_DIR = _directory("BASE_MODEL_DIR", ROOT / PROFILE.base_model_dir)
BASE_TOKENIZER = BASE_MODEL_DIR / "tokenizer.json"
if has_chatglm_tokenizer(BASE_MODEL_DIR) or not BASE_TOKENIZER.is_file():
    BASE_TOKENIZER = BASE_MODEL_DIR / "tokenizer.model"
MINI_CORPUS_DIR = WORK_DIR / "corpus"  # the miniature's world, written by the first step that reads it
CORPUS_DIR = _directory("CORPUS_DIR", MINI_CORPUS_DIR if PROFILE_NAME == "mini" else ROOT / "corpora")
if PROFILE_NAME == "mini" and CORPUS_DIR == MINI_CORPUS_DIR:
    PROFILE = replace(PROFILE, **MINI_MIX)
DATASET_INFO = ROOT / "data" / "dataset_info.json"
CACHE_DIR = WORK_DIR / "cache"  # tokenized data sets
OVERWRITE = env_flag("OVERWRITE")
SKIP_COMPLETED = env_flag("SKIP_COMPLETED")
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))  # processes that train together; torchrun sets it

JA_TOKENIZER = WORK_DIR / "step1_ja_tokenizer" / f"ja_bpe{BASE_TOKENIZER.suffix}"
ORIGINAL_MERGE_DIR = WORK_DIR / "step2_original_method"  # for comparison only
MERGED_TOKENIZER_DIR = WORK_DIR / "step2_merged_tokenizer"
ZERO_DIR = WORK_DIR / "step3_zero"
PT_ADAPTER_DIR = WORK_DIR / "step5_pt_adapter"
PT_MERGED_DIR = WORK_DIR / "step5_pt_merged"
SFT_ADAPTER_DIR = WORK_DIR / "step6_sft_adapter"
CHAT_MODEL_DIR = WORK_DIR / "chat_model"
METRICS_DIR = WORK_DIR / "metrics"

TOKENIZER_MIX, PRETRAINING_MIX, WRITING_SYSTEM = PROFILE.tokenizer_mix, PROFILE.pretraining_mix, PROFILE.writing_system
# One document in twenty is held out of steps 1 and 5, chosen by a hash of its text.
VALIDATION_SHARE = 0.05
# Settings by which a training stage finds its data.
DATA_SETTINGS = {"dataset_dir": str(DATASET_INFO.parent), "corpus_dir": str(CORPUS_DIR), "cache_dir": str(CACHE_DIR)}
EMBEDDING_ROWS_MULTIPLE = 64  # as in ChatGLM3; tensor cores need multiples of 8
# Questions of steps 4 and 7; those of the real model are a text file meant to be edited.
QUESTIONS = MINI_CORPUS_DIR / "questions.jsonl" if PROFILE_NAME == "mini" else ROOT / PROFILE.questions
LADDER = MINI_CORPUS_DIR / "ladder.jsonl"  # of step 7; only the miniature has one
