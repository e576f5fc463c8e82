"""Every path and every number that more than one step shares, for the profile chosen by the environment.

Nothing needs to be edited to try something. These variables are read:

    PROFILE         mini (default: the miniature in this repository) or chatglm3-6b
    WORK_DIR        where everything a run makes goes; default runs/<PROFILE>
    CORPUS_DIR      where the texts and instruction sets lie; default: mini writes its own, chatglm3-6b reads the hub
    BASE_MODEL_DIR  the model to extend; default mini/base or models/chatglm3-6b
    OVERWRITE=1     let a step replace its finished result
    SKIP_FINISHED=1 let a step that has finished end at once, without an error (`make demo` goes on in this way)
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmtuner.console import InputError, check_writable, is_first_process, say, stop, write_json
from llmtuner.train.checkpoints import forget

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Profile:
    """The numbers in which the profiles differ; paths are the same for all."""

    base_model_dir: Path
    """The model to extend: config, safetensors and `tokenizer.model`."""
    base_id: str
    """Its name on the hub, for the model card; one without a slash is not there."""
    new_pieces: int
    """Pieces that step 1 learns on top of the base tokenizer."""
    ja_vocab_size: int
    """Pieces of the sentencepiece model that step 1 trains instead with `--method sentencepiece`."""
    tokenizer_sample_bytes: int
    """Step 1 reads about this much text; more costs time and memory and hardly changes the pieces."""
    reference_bytes: int
    """Steps 1 and 2 read about this much Chinese text to know which Han strings are Chinese too."""
    held_out_bytes: int
    """UTF-8 bytes per language on which bits per byte and segmentations are measured."""
    window: int
    """Tokens in one training sequence, and in one window of a measurement."""
    free_tokens: int
    """Room for a reply of several sentences, in tokens."""


PROFILES = {
    "mini": Profile(
        base_model_dir=ROOT / "mini" / "base",
        base_id="the miniature of this repository",
        new_pieces=900,
        ja_vocab_size=1_500,
        tokenizer_sample_bytes=20_000_000,
        reference_bytes=40_000_000,
        held_out_bytes=60_000,
        window=256,
        free_tokens=160,
    ),
    "chatglm3-6b": Profile(
        base_model_dir=ROOT / "models" / "chatglm3-6b",
        base_id="THUDM/chatglm3-6b",
        new_pieces=13_756,  # as many as the original added, so that the embeddings have its 78,592 rows
        ja_vocab_size=20_000,
        tokenizer_sample_bytes=100_000_000,
        reference_bytes=200_000_000,
        held_out_bytes=500_000,
        window=1024,
        free_tokens=512,
    ),
}


def _directory(variable: str, default: Path) -> Path:
    value = os.environ.get(variable)
    return Path(value).expanduser().resolve() if value else default


PROFILE_NAME = os.environ.get("PROFILE") or "mini"
if PROFILE_NAME not in PROFILES:
    stop(f"PROFILE={PROFILE_NAME} is unknown. Set PROFILE to one of: {', '.join(PROFILES)}.")
PROFILE = PROFILES[PROFILE_NAME]

WORK_DIR = _directory("WORK_DIR", ROOT / "runs" / PROFILE_NAME)
BASE_MODEL_DIR = _directory("BASE_MODEL_DIR", PROFILE.base_model_dir)
MINI_CORPUS_DIR = WORK_DIR / "corpus"  # the miniature's world, written by the first step that reads it
CORPUS_DIR = _directory("CORPUS_DIR", MINI_CORPUS_DIR if PROFILE_NAME == "mini" else ROOT / "corpora")
DATASET_INFO = ROOT / "data" / "dataset_info.json"
CACHE_DIR = WORK_DIR / "cache"  # tokenized data sets
OVERWRITE = os.environ.get("OVERWRITE") == "1"
SKIP_FINISHED = os.environ.get("SKIP_FINISHED") == "1"
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

# Japanese text of step 1: encyclopedia and literature, about 4 : 1 by bytes.
TOKENIZER_MIX = {"wikipedia_ja": 0.8, "aozora_ja": 0.2}
# What a new piece is written with: one of `SCRIPTS` in llmtuner/tokenizer/scripts.py.
NEW_SCRIPT = "japanese"
# Chinese text that tells which Han strings are Chinese too.
CHINESE_REFERENCE = ["wikipedia_zh"]
# Pretraining mix by tokens: ja 76 : zh 12 : en 12.
PRETRAINING_MIX = {"wikipedia_ja": 0.64, "aozora_ja": 0.12, "wikipedia_zh": 0.12, "wikitext_en": 0.12}
# One document in twenty is held out of steps 1 and 5, chosen by a hash of its text.
VALIDATION_SHARE = 0.05
# Where held-out text of each language comes from: test files where there are any, else held-out documents.
HELD_OUT = {
    "ja": ("test_ja", ["wikipedia_ja", "aozora_ja"]),
    "zh": ("test_zh", ["wikipedia_zh"]),
    "en": ("test_en", ["wikitext_en"]),
}
# How a training stage finds its data, beside its own settings.
DATA_SETTINGS = {"dataset_dir": str(DATASET_INFO.parent), "corpus_dir": str(CORPUS_DIR), "cache_dir": str(CACHE_DIR)}
EMBEDDING_ROWS_MULTIPLE = 64  # ChatGLM3 pads its embeddings so; matrix units like it
# What steps 4 and 7 ask; the real model's questions are a text file to be edited.
QUESTIONS = MINI_CORPUS_DIR / "questions.jsonl" if PROFILE_NAME == "mini" else ROOT / "data" / "questions.txt"

# What each step does, takes and gives, for the report's drawing: what one step takes has the name under which another
# gives it.
STEPS = (
    ("step1", "step1_train_tokenizer.py", "learns Japanese pieces", ("corpora",), "ja_bpe.model"),
    (
        "step2",
        "step2_merge_tokenizer.py",
        "merges them into the tokenizer",
        ("base tokenizer", "ja_bpe.model"),
        "merged tokenizer",
    ),
    ("step3", "step3_resize_model.py", "grows the model", ("base model", "merged tokenizer"), "Zero model"),
    ("step4", "step4_test_zero.py", "tests that nothing was lost", ("Zero model",), "zero test"),
    (
        "step5",
        "step5_train_pt_single_gpu.py",
        "goes on pretraining",
        ("Zero model", "pretraining mix"),
        "pretrained model",
    ),
    (
        "step6",
        "step6_train_sft_single_gpu.py",
        "tunes on instructions",
        ("pretrained model", "instruction mix"),
        "chat model",
    ),
    ("step7", "step7_eval_chat.py", "compares all models", ("chat model",), "report"),
)
# step -> what it makes, for error messages that name the step to run first
MADE_BY = {
    JA_TOKENIZER: "step1_train_tokenizer.py",
    MERGED_TOKENIZER_DIR: "step2_merge_tokenizer.py",
    ZERO_DIR: "step3_resize_model.py",
    PT_MERGED_DIR: "step5_train_pt_single_gpu.py",
    CHAT_MODEL_DIR: "step6_train_sft_single_gpu.py",
}


def require(*needs: Path) -> None:
    """Makes sure that results of earlier steps are there.

    Raises:
        InputError: names the step that makes what is missing.
    """
    for path in needs:
        if not path.exists():
            raise InputError(f"{path} is missing. It is made by {MADE_BY[path]}: run that first.")


def start_step(step: str, *needs: Path) -> None:
    """Checks what a step depends on before anything heavy is imported or loaded.

    Args:
        step: "step1" to "step7".
        needs: results of earlier steps, from `MADE_BY`.

    Raises:
        InputError: if results cannot be written, this step has finished already, or an earlier step has not.
    """
    check_writable(WORK_DIR)
    require(*needs)
    if (METRICS_DIR / f"{step}.json").exists() and not OVERWRITE:
        if SKIP_FINISHED:
            say(f"{step} has finished already: its results are in {WORK_DIR}")
            raise SystemExit(0)
        raise InputError(
            f"{step} has finished already: its results are in {WORK_DIR}. Set OVERWRITE=1 to replace them, "
            "or WORK_DIR to keep them and work elsewhere."
        )


def start_training(step: str, output_dir: Path, *needs: Path) -> None:
    """As `start_step`, for a step that goes on from its newest checkpoint: with OVERWRITE=1 a finished one starts anew.

    The mark that it has finished goes too, so that a run that is interrupted then goes on as any other.
    """
    start_step(step, *needs)
    finished = METRICS_DIR / f"{step}.json"
    if finished.exists() and is_first_process():  # OVERWRITE=1
        forget(output_dir)
        finished.unlink()


def require_base_model(weights: bool = True, published: bool = False) -> Path:
    """Returns `BASE_MODEL_DIR` once it is known to hold a tokenizer and, if asked for, weights.

    Args:
        weights: false for a step that needs the tokenizer only.
        published: true for a step that also reads ChatGLM3's weights as published; the others run the model, and for
            that it must be converted.

    Raises:
        InputError: names the file that is missing, or the command that converts the model.
    """
    how = "Set BASE_MODEL_DIR to a model directory; the README says where to get one."
    if not BASE_MODEL_DIR.is_dir():
        raise InputError(f"the base model directory {BASE_MODEL_DIR} does not exist. {how}")
    wanted = ["tokenizer.model", *(["config.json"] if weights else [])]
    for name in wanted:
        if not (BASE_MODEL_DIR / name).is_file():
            raise InputError(f"{BASE_MODEL_DIR} has no {name}. {how}")
    if not weights:
        return BASE_MODEL_DIR
    if not [*BASE_MODEL_DIR.glob("*.safetensors"), *BASE_MODEL_DIR.glob("pytorch_model*.bin")]:
        raise InputError(f"{BASE_MODEL_DIR} has no *.safetensors weights. {how}")
    if not published and _model_type(BASE_MODEL_DIR) == "chatglm":
        raise InputError(
            f"{BASE_MODEL_DIR} is the checkpoint as published. Convert it first: python -m llmtuner convert "
            f"{BASE_MODEL_DIR} {BASE_MODEL_DIR}-glm, then set BASE_MODEL_DIR={BASE_MODEL_DIR}-glm."
        )
    return BASE_MODEL_DIR


def _model_type(directory: Path) -> str | None:
    try:
        return json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{directory / 'config.json'} is not valid JSON ({error}). Fetch it again.") from error


def require_corpus() -> Path:
    """Returns `CORPUS_DIR`; the miniature's own texts are written first if they are not there yet.

    Raises:
        InputError: if a corpus directory that was asked for does not exist.
    """
    if PROFILE_NAME == "mini" and not QUESTIONS.is_file():  # its questions are asked whatever the texts are
        from mini.world import write_world

        write_world(MINI_CORPUS_DIR)
    if "CORPUS_DIR" in os.environ and not CORPUS_DIR.is_dir():
        raise InputError(
            f"the corpus directory CORPUS_DIR={CORPUS_DIR} does not exist. Set it to a directory of texts."
        )
    return CORPUS_DIR


def held_out_texts(language: str) -> list[str]:
    """Text of "ja", "zh" or "en" that no step trains on, by which all steps measure.

    Raises:
        InputError: if the corpus has none.
    """
    from llmtuner.data import held_out

    test_set, training_sets = HELD_OUT[language]
    return held_out.held_out_texts(
        test_set, training_sets, DATASET_INFO, CORPUS_DIR, VALIDATION_SHARE, PROFILE.held_out_bytes
    )


def japanese_texts(max_bytes: int) -> Iterator[tuple[str, str]]:
    """Japanese training text in the shares of `TOKENIZER_MIX`: (data set, text).

    Raises:
        InputError: at once, if a data set is nowhere to be found.
    """
    from llmtuner.data.held_out import training_documents
    from llmtuner.data.sources import find_source
    from llmtuner.tokenizer.training import mix_by_bytes

    sources = {name: find_source(name, DATASET_INFO, CORPUS_DIR) for name in TOKENIZER_MIX}
    streams = {name: training_documents(source, VALIDATION_SHARE) for name, source in sources.items()}
    return mix_by_bytes(streams, TOKENIZER_MIX, max_bytes)


def reference_texts() -> Iterator[str]:
    """Chinese training text, by which steps 1 and 2 know what Chinese writes too; none where no character is shared.

    Raises:
        InputError: at once, if there is no such text.
    """
    from llmtuner.data import held_out
    from llmtuner.tokenizer.scripts import SCRIPTS

    names = CHINESE_REFERENCE if SCRIPTS[NEW_SCRIPT].shared else []
    return held_out.reference_documents(names, DATASET_INFO, CORPUS_DIR, VALIDATION_SHARE, PROFILE.reference_bytes)


def finish_step(step: str, metrics: dict) -> None:
    """Writes `WORK_DIR/metrics/<step>.json`, the mark that the step has finished, and the report of all steps anew."""
    write_json(METRICS_DIR / f"{step}.json", metrics)
    make_report()


def make_report() -> None:
    """Makes WORK_DIR/report.html from what the steps have left there.

    Raises:
        InputError: if no step has finished yet.
    """
    from llmtuner.report.environment import environment
    from llmtuner.report.page import Step, write_report

    profile = {"PROFILE": PROFILE_NAME, "WORK_DIR": str(WORK_DIR), "CORPUS_DIR": str(CORPUS_DIR)}
    facts = {"profile": profile | {name: str(value) for name, value in vars(PROFILE).items()}, **environment()}
    say(f"report: {write_report(WORK_DIR, [Step(*step) for step in STEPS], facts)}")


def write_card(model_dir: Path, metrics: dict) -> None:
    """Writes README.md of the chat model: what it is, how it was made, what step 7 has measured of it."""
    from llmtuner.data.sources import find_source
    from llmtuner.eval.questions import read_questions
    from llmtuner.report.model_card import write_model_card

    everything = {f"step{number}": load_metrics(f"step{number}") for number in range(1, 7)} | {"step7": metrics}
    used = [name for step in ("step5", "step6") for name in everything[step].get("data", {})]
    sources = {name: find_source(name, DATASET_INFO, CORPUS_DIR) for name in used}
    data = {name: {} if source.files else {"hf_hub_url": source.hf_hub_url} for name, source in sources.items()}
    examples = [one.question for one in read_questions(QUESTIONS) if one.language == "ja" and one.value]
    write_model_card(model_dir, everything, PROFILE.base_id, data, *examples[:1])


def load_metrics(step: str) -> dict:
    """Reads what an earlier step measured; empty if it has not finished."""
    path = METRICS_DIR / f"{step}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
