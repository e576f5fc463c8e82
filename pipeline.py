"""What all steps share: checking what they need, marking them finished, and the report of what they left."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import constants
from llmtuner.console import UserError, command, interpreter, is_rank_zero, print0
from llmtuner.files import atomic_write_json, check_writable, checksum, checksum_of
from llmtuner.locks import acquire_lock
from llmtuner.outputs import add_to_marker, check_destination, recover_directory

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
# Where lies what a step takes or gives, under the names of `STEPS`; what is not here is looked for elsewhere.
ARTIFACTS = {
    "base tokenizer": constants.BASE_MODEL_DIR / "tokenizer.model",
    "base model": constants.BASE_MODEL_DIR,
    "ja_bpe.model": constants.JA_TOKENIZER,
    "merged tokenizer": constants.MERGED_TOKENIZER_DIR,
    "Zero model": constants.ZERO_DIR,
    "pretrained model": constants.PT_MERGED_DIR,
    "chat model": constants.CHAT_MODEL_DIR,
}
STEP_SCRIPTS = {name: script for name, script, *_ in STEPS}
PRODUCED_BY = {ARTIFACTS[gives]: name for name, *_, gives in STEPS if gives in ARTIFACTS}
# checksums of what the step at hand takes, as they were when it started
_input_checksums: dict[str, str] = {}


def require_artifacts(*needs: Path) -> None:
    """Makes sure that results of earlier steps are there.

    Raises:
        UserError: names the step that makes what is missing.
    """
    for path in needs:
        if not path.exists() and is_rank_zero():
            recover_directory(_result_dir(path))
        if not path.exists():
            step = PRODUCED_BY[path]
            raise UserError(
                f"{path} is missing. It is made by step {step.removeprefix('step')}: run {command(STEP_SCRIPTS[step])} first."
            )


def start_step(step: str, *needs: Path) -> None:
    """Checks what a step depends on before anything heavy is imported or loaded, and keeps other steps out of WORK_DIR.

    Args:
        step: "step1" to "step7".
        needs: results of earlier steps, from `ARTIFACTS`.

    Raises:
        UserError: if results cannot be written, another step is running there, this step has finished already, an
            earlier one has not, or what an earlier one used has changed since.
    """
    check_writable(constants.WORK_DIR)
    if is_rank_zero():
        acquire_lock(constants.WORK_DIR / ".lock", f"WORK_DIR={constants.WORK_DIR}")  # until this process ends
    require_artifacts(*needs)
    if is_finished(step) and not constants.OVERWRITE:
        check_lineage(step)
        if constants.SKIP_COMPLETED:
            print0(f"{step} has finished already: its results are in {constants.WORK_DIR}")
            raise SystemExit(0)
        raise UserError(
            f"{step} has finished already: its results are in {constants.WORK_DIR}. Set OVERWRITE=1 to replace them, "
            "or WORK_DIR to keep them and work elsewhere."
        )
    if not is_rank_zero():
        return
    _, _, _, takes, gives = next(one for one in STEPS if one[0] == step)
    if gives in ARTIFACTS:
        check_destination(_result_dir(ARTIFACTS[gives]), replace=True)
    for maker in (maker for maker, *_, made in STEPS if made in takes):
        check_lineage(maker)
        if load_metrics(maker).get("cut_short"):
            print0(f"note: {maker} was cut short by max_steps; what it made is not its finished result")
    names = [
        name for name in takes if name in ARTIFACTS and (ARTIFACTS[name] in needs or ARTIFACTS[name] not in PRODUCED_BY)
    ]
    _input_checksums.update({name: checksum(ARTIFACTS[name]) for name in names})


def is_finished(step: str) -> bool:
    """Whether a step has come to its end, was not cut short, and its result is still there."""
    result = ARTIFACTS.get(next(gives for name, *_, gives in STEPS if name == step))
    ended = (constants.METRICS_DIR / f"{step}.json").is_file() and not load_metrics(step).get("cut_short")
    return ended and (result is None or result.exists())


def check_lineage(*steps: str) -> None:
    """Makes sure that finished steps, and those before them, are made from what lies there now.

    Raises:
        UserError: names the first step that has to be run again.
    """
    if is_rank_zero() and (changes := changed_since(*steps)):
        raise UserError(changes[0])


def changed_since(*steps: str) -> list[str]:
    """What has changed since steps used it, and what to do; earlier steps first, those that each step builds on included."""
    found: dict[str, None] = {}
    for name, script, _, takes, _ in STEPS:
        if name not in steps:
            continue
        found |= dict.fromkeys(changed_since(*(maker for maker, *_, gives in STEPS if gives in takes)))
        for taken, before in load_metrics(name).get("made_from", {}).items():
            now = checksum(ARTIFACTS[taken]) if taken in ARTIFACTS else ""
            if before and now and now != before:
                found[
                    f"the {taken} ({ARTIFACTS[taken]}) is not the one that {name} used: run {name} again "
                    f"(OVERWRITE=1 {command(script)})."
                ] = None
    return list(found)


def changed_corpora() -> list[str]:
    """Which steps have read texts that have changed since; more text is no reason to stop, but one to know."""
    return [
        f"the texts that {step} read have changed since"
        for step in STEP_SCRIPTS
        if (metrics := load_metrics(step))
        and (before := metrics.get("made_from", {}).get("texts"))
        and (now := _checksum_of_texts(step, metrics))
        and now != before
    ]


def _checksum_of_texts(step: str, metrics: dict) -> str:
    """Over the local files of the data sets that a step learns from; "" where there are none."""
    from llmtuner.data.sources import get_dataset_attr

    files: list[str] = []
    for name in constants.TOKENIZER_MIX if step == "step1" else metrics.get("data", ()):
        with suppress(UserError):  # taken away since, or never described
            files += get_dataset_attr(name, constants.DATASET_INFO, constants.CORPUS_DIR).files
    return checksum_of([Path(file).name, checksum(Path(file))] for file in files) if files else ""


def _result_dir(result: Path) -> Path:
    """The directory that appears as a whole; the tokenizer of step 1 lies inside its own."""
    return result.parent if result == constants.JA_TOKENIZER else result


def mark_unfinished(step: str) -> None:
    """Takes away the mark that a step has finished, once it starts to replace its result."""
    (constants.METRICS_DIR / f"{step}.json").unlink(missing_ok=True)


def require_base_model(weights: bool = True, published: bool = False) -> Path:
    """Returns `BASE_MODEL_DIR` once it is known to hold a tokenizer and, if asked for, weights.

    Args:
        weights: false for a step that needs the tokenizer only.
        published: true for a step that also reads ChatGLM3's weights as published; the others run the model, and for
            that it must be converted.

    Raises:
        UserError: names the file that is missing, or the command that converts the model.
    """
    how = "Set BASE_MODEL_DIR to a model directory; docs/chatglm3-6b.md says where to get one."
    if not constants.BASE_MODEL_DIR.is_dir():
        raise UserError(f"the base model directory {constants.BASE_MODEL_DIR} does not exist. {how}")
    wanted = ["tokenizer.model", *(["config.json"] if weights else [])]
    for name in wanted:
        if not (constants.BASE_MODEL_DIR / name).is_file():
            raise UserError(f"{constants.BASE_MODEL_DIR} has no {name}. {how}")
    if not weights:
        return constants.BASE_MODEL_DIR
    if not [*constants.BASE_MODEL_DIR.glob("*.safetensors"), *constants.BASE_MODEL_DIR.glob("pytorch_model*.bin")]:
        raise UserError(f"{constants.BASE_MODEL_DIR} has no *.safetensors weights. {how}")
    if not published and _model_type(constants.BASE_MODEL_DIR) == "chatglm":
        raise UserError(
            f"{constants.BASE_MODEL_DIR} is the checkpoint as published. Convert it first: {interpreter()} -m llmtuner convert "
            f"{constants.BASE_MODEL_DIR} {constants.BASE_MODEL_DIR}-glm, then set BASE_MODEL_DIR={constants.BASE_MODEL_DIR}-glm."
        )
    return constants.BASE_MODEL_DIR


def _model_type(directory: Path) -> str | None:
    try:
        return json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{directory / 'config.json'} is not valid JSON ({error}). Fetch it again.") from error


def require_corpus() -> Path:
    """Returns `CORPUS_DIR`; the miniature's own texts are written first if they are not there yet.

    Raises:
        UserError: if a corpus directory that was asked for does not exist.
    """
    if (
        constants.PROFILE_NAME == "mini" and not constants.QUESTIONS.is_file()
    ):  # its questions are asked whatever the texts are
        from mini.world import write_world

        write_world(constants.MINI_CORPUS_DIR)
    if "CORPUS_DIR" in os.environ and not constants.CORPUS_DIR.is_dir():
        raise UserError(
            f"the corpus directory CORPUS_DIR={constants.CORPUS_DIR} does not exist. Set it to a directory of texts."
        )
    return constants.CORPUS_DIR


def held_out_texts(language: str) -> list[str]:
    """Text of "ja", "zh" or "en" that no step trains on, by which all steps measure.

    Raises:
        UserError: if the corpus has none.
    """
    from llmtuner.data import held_out

    test_set, training_sets = constants.EVAL_SETS[language]
    return held_out.held_out_texts(
        test_set,
        training_sets,
        constants.DATASET_INFO,
        constants.CORPUS_DIR,
        constants.VALIDATION_SHARE,
        constants.PROFILE.held_out_bytes,
    )


def tokenizer_corpus(max_bytes: int) -> Iterator[tuple[str, str]]:
    """Japanese training text in the shares of `TOKENIZER_MIX`: (data set, text).

    Raises:
        UserError: at once, if a data set is nowhere to be found.
    """
    from llmtuner.data.held_out import training_documents
    from llmtuner.data.sources import get_dataset_attr
    from llmtuner.tokenizer.sentencepiece_bpe import interleave_by_bytes

    sources = {
        name: get_dataset_attr(name, constants.DATASET_INFO, constants.CORPUS_DIR) for name in constants.TOKENIZER_MIX
    }
    streams = {name: training_documents(source, constants.VALIDATION_SHARE) for name, source in sources.items()}
    return interleave_by_bytes(streams, constants.TOKENIZER_MIX, max_bytes)


def reference_texts() -> Iterator[str]:
    """Chinese training text, by which steps 1 and 2 know what Chinese writes too; none where no character is shared.

    Raises:
        UserError: at once, if there is no such text.
    """
    from llmtuner.data import held_out
    from llmtuner.tokenizer.writing_systems import WRITING_SYSTEMS

    names = constants.CHINESE_REFERENCE if WRITING_SYSTEMS[constants.WRITING_SYSTEM].shared else []
    return held_out.reference_documents(
        names,
        constants.DATASET_INFO,
        constants.CORPUS_DIR,
        constants.VALIDATION_SHARE,
        constants.PROFILE.reference_bytes,
    )


def finish_step(step: str, metrics: dict) -> None:
    """Writes `WORK_DIR/metrics/<step>.json`, the mark that the step has finished, and the report of all steps.

    Beside what was measured it holds checksums of what the step was made from, as they were when it started.
    """
    if texts := _checksum_of_texts(step, metrics):
        _input_checksums["texts"] = texts
    atomic_write_json(constants.METRICS_DIR / f"{step}.json", {**metrics, "made_from": _input_checksums})
    if metrics.get("cut_short"):
        print0(f"{step} was cut short by max_steps, after {metrics['steps']:,} steps: it does not count as finished")
    make_report()


def make_report() -> None:
    """Makes WORK_DIR/report.html from what the steps have left there.

    Raises:
        UserError: if no step has finished yet.
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
    warnings = [*changed_since(*STEP_SCRIPTS), *changed_corpora()]
    print0(f"report: {write_report(constants.WORK_DIR, [Step(*step) for step in STEPS], facts, warnings)}")


def write_card(model_dir: Path, metrics: dict) -> None:
    """Writes README.md of the chat model: what it is, how it was made, what step 7 has measured of it."""
    from llmtuner.data.sources import get_dataset_attr
    from llmtuner.eval.questions import read_questions
    from llmtuner.report.model_card import write_model_card

    everything = {f"step{number}": load_metrics(f"step{number}") for number in range(1, 7)} | {"step7": metrics}
    used = [name for step in ("step5", "step6") for name in everything[step].get("data", {})]
    sources = {name: get_dataset_attr(name, constants.DATASET_INFO, constants.CORPUS_DIR) for name in used}
    data = {name: {} if source.files else {"hf_hub_url": source.hf_hub_url} for name, source in sources.items()}
    examples = [one.question for one in read_questions(constants.QUESTIONS) if one.language == "ja" and one.value]
    write_model_card(model_dir, everything, constants.PROFILE.base_id, data, *examples[:1])
    add_to_marker(model_dir, "README.md", "generation_config.json")


def load_metrics(step: str) -> dict:
    """Reads what an earlier step measured; empty if it has not finished."""
    path = constants.METRICS_DIR / f"{step}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
