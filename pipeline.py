"""What all steps share: checking what they need, marking them finished, and the report of what they left."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import constants
from llmtuner.console import InputError, check_writable, command, interpreter, is_first_process, say, write_json
from llmtuner.train.checkpoints import forget

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
    constants.JA_TOKENIZER: "step1_train_tokenizer.py",
    constants.MERGED_TOKENIZER_DIR: "step2_merge_tokenizer.py",
    constants.ZERO_DIR: "step3_resize_model.py",
    constants.PT_MERGED_DIR: "step5_train_pt_single_gpu.py",
    constants.CHAT_MODEL_DIR: "step6_train_sft_single_gpu.py",
}


def require(*needs: Path) -> None:
    """Makes sure that results of earlier steps are there.

    Raises:
        InputError: names the step that makes what is missing.
    """
    for path in needs:
        if not path.exists():
            raise InputError(
                f"{path} is missing. It is made by step {MADE_BY[path][4]}: run {command(MADE_BY[path])} first."
            )


def start_step(step: str, *needs: Path) -> None:
    """Checks what a step depends on before anything heavy is imported or loaded.

    Args:
        step: "step1" to "step7".
        needs: results of earlier steps, from `MADE_BY`.

    Raises:
        InputError: if results cannot be written, this step has finished already, or an earlier step has not.
    """
    check_writable(constants.WORK_DIR)
    require(*needs)
    if (constants.METRICS_DIR / f"{step}.json").exists() and not constants.OVERWRITE:
        if constants.SKIP_FINISHED:
            say(f"{step} has finished already: its results are in {constants.WORK_DIR}")
            raise SystemExit(0)
        raise InputError(
            f"{step} has finished already: its results are in {constants.WORK_DIR}. Set OVERWRITE=1 to replace them, "
            "or WORK_DIR to keep them and work elsewhere."
        )


def start_training(step: str, output_dir: Path, *needs: Path) -> None:
    """As `start_step`, for a step that goes on from its newest checkpoint: with OVERWRITE=1 a finished one starts anew.

    The mark that it has finished goes too, so that a run that is interrupted then goes on as any other.
    """
    start_step(step, *needs)
    finished = constants.METRICS_DIR / f"{step}.json"
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
    if not constants.BASE_MODEL_DIR.is_dir():
        raise InputError(f"the base model directory {constants.BASE_MODEL_DIR} does not exist. {how}")
    wanted = ["tokenizer.model", *(["config.json"] if weights else [])]
    for name in wanted:
        if not (constants.BASE_MODEL_DIR / name).is_file():
            raise InputError(f"{constants.BASE_MODEL_DIR} has no {name}. {how}")
    if not weights:
        return constants.BASE_MODEL_DIR
    if not [*constants.BASE_MODEL_DIR.glob("*.safetensors"), *constants.BASE_MODEL_DIR.glob("pytorch_model*.bin")]:
        raise InputError(f"{constants.BASE_MODEL_DIR} has no *.safetensors weights. {how}")
    if not published and _model_type(constants.BASE_MODEL_DIR) == "chatglm":
        raise InputError(
            f"{constants.BASE_MODEL_DIR} is the checkpoint as published. Convert it first: {interpreter()} -m llmtuner convert "
            f"{constants.BASE_MODEL_DIR} {constants.BASE_MODEL_DIR}-glm, then set BASE_MODEL_DIR={constants.BASE_MODEL_DIR}-glm."
        )
    return constants.BASE_MODEL_DIR


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
    if (
        constants.PROFILE_NAME == "mini" and not constants.QUESTIONS.is_file()
    ):  # its questions are asked whatever the texts are
        from mini.world import write_world

        write_world(constants.MINI_CORPUS_DIR)
    if "CORPUS_DIR" in os.environ and not constants.CORPUS_DIR.is_dir():
        raise InputError(
            f"the corpus directory CORPUS_DIR={constants.CORPUS_DIR} does not exist. Set it to a directory of texts."
        )
    return constants.CORPUS_DIR


def held_out_texts(language: str) -> list[str]:
    """Text of "ja", "zh" or "en" that no step trains on, by which all steps measure.

    Raises:
        InputError: if the corpus has none.
    """
    from llmtuner.data import held_out

    test_set, training_sets = constants.HELD_OUT[language]
    return held_out.held_out_texts(
        test_set,
        training_sets,
        constants.DATASET_INFO,
        constants.CORPUS_DIR,
        constants.VALIDATION_SHARE,
        constants.PROFILE.held_out_bytes,
    )


def japanese_texts(max_bytes: int) -> Iterator[tuple[str, str]]:
    """Japanese training text in the shares of `TOKENIZER_MIX`: (data set, text).

    Raises:
        InputError: at once, if a data set is nowhere to be found.
    """
    from llmtuner.data.held_out import training_documents
    from llmtuner.data.sources import find_source
    from llmtuner.tokenizer.training import mix_by_bytes

    sources = {
        name: find_source(name, constants.DATASET_INFO, constants.CORPUS_DIR) for name in constants.TOKENIZER_MIX
    }
    streams = {name: training_documents(source, constants.VALIDATION_SHARE) for name, source in sources.items()}
    return mix_by_bytes(streams, constants.TOKENIZER_MIX, max_bytes)


def reference_texts() -> Iterator[str]:
    """Chinese training text, by which steps 1 and 2 know what Chinese writes too; none where no character is shared.

    Raises:
        InputError: at once, if there is no such text.
    """
    from llmtuner.data import held_out
    from llmtuner.tokenizer.scripts import SCRIPTS

    names = constants.CHINESE_REFERENCE if SCRIPTS[constants.NEW_SCRIPT].shared else []
    return held_out.reference_documents(
        names,
        constants.DATASET_INFO,
        constants.CORPUS_DIR,
        constants.VALIDATION_SHARE,
        constants.PROFILE.reference_bytes,
    )


def finish_step(step: str, metrics: dict) -> None:
    """Writes `WORK_DIR/metrics/<step>.json`, the mark that the step has finished, and the report of all steps anew."""
    write_json(constants.METRICS_DIR / f"{step}.json", metrics)
    make_report()


def make_report() -> None:
    """Makes WORK_DIR/report.html from what the steps have left there.

    Raises:
        InputError: if no step has finished yet.
    """
    from llmtuner.report.environment import environment
    from llmtuner.report.page import Step, write_report

    profile = {
        "PROFILE": constants.PROFILE_NAME,
        "WORK_DIR": str(constants.WORK_DIR),
        "CORPUS_DIR": str(constants.CORPUS_DIR),
    }
    facts = {
        "profile": profile | {name: str(value) for name, value in vars(constants.PROFILE).items()},
        **environment(),
    }
    say(f"report: {write_report(constants.WORK_DIR, [Step(*step) for step in STEPS], facts)}")


def write_card(model_dir: Path, metrics: dict) -> None:
    """Writes README.md of the chat model: what it is, how it was made, what step 7 has measured of it."""
    from llmtuner.data.sources import find_source
    from llmtuner.eval.questions import read_questions
    from llmtuner.report.model_card import write_model_card

    everything = {f"step{number}": load_metrics(f"step{number}") for number in range(1, 7)} | {"step7": metrics}
    used = [name for step in ("step5", "step6") for name in everything[step].get("data", {})]
    sources = {name: find_source(name, constants.DATASET_INFO, constants.CORPUS_DIR) for name in used}
    data = {name: {} if source.files else {"hf_hub_url": source.hf_hub_url} for name, source in sources.items()}
    examples = [one.question for one in read_questions(constants.QUESTIONS) if one.language == "ja" and one.value]
    write_model_card(model_dir, everything, constants.PROFILE.base_id, data, *examples[:1])


def load_metrics(step: str) -> dict:
    """Reads what an earlier step measured; empty if it has not finished."""
    path = constants.METRICS_DIR / f"{step}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
