"""What all steps share: starting, finishing and requiring them, tracing their inputs, and the report of what they left."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import constants
from constants import LANGUAGES, PROFILE
from llmtuner.aliases import rename_keys
from llmtuner.console import UserError, command, display_path, is_rank_zero, llmtuner_command, print0, print_header
from llmtuner.eval.language import with_article
from llmtuner.files import atomic_write_json, check_writable, checksum, checksum_of
from llmtuner.locks import acquire_lock
from llmtuner.outputs import add_to_marker, check_destination, recover_directory
from llmtuner.report.steps import Step

STEPS = {
    step.name: step
    for step in (
        Step(
            "step1",
            "step1_train_tokenizer.py",
            f"Train {with_article(LANGUAGES.name)} tokenizer",
            ("corpora",),
            "ja_bpe.model",
        ),
        Step(
            "step2",
            "step2_merge_tokenizer.py",
            f"Merge the {LANGUAGES.name} tokens into the base tokenizer",
            ("base tokenizer", "ja_bpe.model"),
            "merged tokenizer",
        ),
        Step(
            "step3",
            "step3_resize_model.py",
            "Resize the embeddings",
            ("base model", "merged tokenizer"),
            "Zero model",
        ),
        Step("step4", "step4_test_zero.py", "Prove that nothing was lost", ("Zero model",), "zero test"),
        Step(
            "step5",
            "step5_train_pt_single_gpu.py",
            "Continued pretraining",
            ("Zero model", "pretraining mix"),
            "pretrained model",
        ),
        Step(
            "step6",
            "step6_train_sft_single_gpu.py",
            "Instruction tuning",
            ("pretrained model", "instruction mix"),
            "chat model",
        ),
        Step("step7", "step7_eval_chat.py", "Evaluate all models", ("chat model",), "report"),
    )
}
REPORT = constants.WORK_DIR / "report.html"
# Paths of the steps' inputs and outputs; an input without one comes from CORPUS_DIR or the hub.
ARTIFACTS = {
    "base tokenizer": constants.BASE_TOKENIZER,
    "base model": constants.BASE_MODEL_DIR,
    "ja_bpe.model": constants.JA_TOKENIZER,
    "merged tokenizer": constants.MERGED_TOKENIZER_DIR,
    "Zero model": constants.ZERO_DIR,
    "pretrained model": constants.PT_MERGED_DIR,
    "chat model": constants.CHAT_MODEL_DIR,
}
PRODUCED_BY = {ARTIFACTS[step.output]: step for step in STEPS.values() if step.output in ARTIFACTS}
# Checksums of the running step's inputs, as they were when it started.
_input_checksums: dict[str, str] = {}


def require_artifacts(*paths: Path) -> None:
    """Makes sure that results of earlier steps exist.

    Raises:
        UserError: names the step that makes what is missing.
    """
    for path in paths:
        if not path.exists() and is_rank_zero():
            recover_directory(_output_dir(path))
        if not path.exists():
            step = PRODUCED_BY[path]
            raise UserError(f"{path} is missing. It is made by step {step.number}: run {command(step.script)} first.")


def start_step(name: str, *required: Path) -> None:
    """Announces a step and checks what it depends on before anything heavy is imported; locks WORK_DIR until it ends.

    Args:
        name: "step1" to "step7".
        required: results of earlier steps, from `ARTIFACTS`.

    Raises:
        UserError: if results cannot be written, another step is running there, this step has finished already, an
            earlier one has not, or what an earlier one used has changed since.
    """
    step = STEPS[name]
    print_header(f"Step {step.number}: {step.title}")
    check_writable(constants.WORK_DIR)
    if is_rank_zero():
        acquire_lock(constants.WORK_DIR / ".lock", f"WORK_DIR={constants.WORK_DIR}")  # until this process ends
    require_artifacts(*required)
    if is_finished(name) and not constants.OVERWRITE:
        check_lineage(name)
        if constants.SKIP_COMPLETED:
            print0(f"Step {step.number} has finished already: its results are in {display_path(constants.WORK_DIR)}")
            raise SystemExit(0)
        raise UserError(
            f"step {step.number} has finished already: its results are in {constants.WORK_DIR}. Set OVERWRITE=1 to "
            "replace them, or WORK_DIR to keep them and work elsewhere."
        )
    if not is_rank_zero():
        return
    if step.output in ARTIFACTS:
        check_destination(_output_dir(ARTIFACTS[step.output]), replace=True)
    for producer in _producers(step):
        check_lineage(producer.name)
        if load_metrics(producer.name).get("cut_short"):
            print0(f"note: step {producer.number} was cut short by max_steps; its output is not the finished result")
    for artifact in step.inputs:
        path = ARTIFACTS.get(artifact)
        if path and (path in required or path not in PRODUCED_BY):
            _input_checksums[artifact] = checksum(path)


def is_finished(name: str) -> bool:
    """Whether a step has run to its end, was not cut short, and its result still exists."""
    result = ARTIFACTS.get(STEPS[name].output)
    completed = (constants.METRICS_DIR / f"{name}.json").is_file() and not load_metrics(name).get("cut_short")
    return completed and (result is None or result.exists())


def _producers(step: Step) -> list[Step]:
    """The steps whose results a step reads."""
    return [other for other in STEPS.values() if other.output in step.inputs]


def check_lineage(*names: str) -> None:
    """Makes sure that finished steps, and those before them, were made from the present inputs.

    Raises:
        UserError: names the first step that has to be run again.
    """
    if is_rank_zero() and (stale := find_stale_inputs(*names)):
        raise UserError(stale[0])


def find_stale_inputs(*names: str) -> list[str]:
    """One message for each input that has changed since a step, or one that it builds on, read it; earlier steps first."""
    messages: dict[str, None] = {}
    for step in STEPS.values():
        if step.name not in names:
            continue
        messages |= dict.fromkeys(find_stale_inputs(*(producer.name for producer in _producers(step))))
        for artifact, before in load_metrics(step.name).get("made_from", {}).items():
            now = checksum(ARTIFACTS[artifact]) if artifact in ARTIFACTS else ""
            if before and now and now != before:
                messages[
                    f"the {artifact} ({ARTIFACTS[artifact]}) is not the one that {step.name} used: run {step.name} again "
                    f"(OVERWRITE=1 {command(step.script)})."
                ] = None
    return list(messages)


def find_changed_corpora() -> list[str]:
    """Which steps read texts that have changed since; more text is worth knowing, but no reason to stop."""
    return [
        f"the texts that {name} read have changed since"
        for name in STEPS
        if (metrics := load_metrics(name))
        and (before := metrics.get("made_from", {}).get("texts"))
        and (now := _corpus_checksum(name, metrics))
        and now != before
    ]


def _corpus_checksum(name: str, metrics: dict) -> str:
    """Checksum of the local files of the data sets that a step learns from; "" where there are none."""
    from llmtuner.data.sources import get_dataset_attr

    files: list[str] = []
    for dataset in constants.TOKENIZER_MIX if name == "step1" else metrics.get("data", ()):
        with suppress(UserError):  # removed since, or never described
            files += get_dataset_attr(dataset, constants.DATASET_INFO, constants.CORPUS_DIR).files
    return checksum_of([Path(file).name, checksum(Path(file))] for file in files) if files else ""


def _output_dir(result: Path) -> Path:
    """The directory that is replaced as a whole; the tokenizer of step 1 lies inside its own."""
    return result.parent if result == constants.JA_TOKENIZER else result


def mark_unfinished(name: str) -> None:
    """Deletes a step's metrics, which mark it as finished, once it starts to replace its result."""
    (constants.METRICS_DIR / f"{name}.json").unlink(missing_ok=True)


def require_base_model(weights: bool = True, original_chatglm: bool = False) -> Path:
    """Returns `BASE_MODEL_DIR` once it is known to hold a tokenizer and, if asked for, weights.

    Args:
        weights: false for a step that needs the tokenizer only.
        original_chatglm: true for a step that also reads ChatGLM3's original checkpoint; all others run the model, which
            has to be converted first.

    Raises:
        UserError: names the file that is missing, or the command that converts the model.
    """
    directory = constants.BASE_MODEL_DIR
    hint = "Set BASE_MODEL_DIR to a model directory; docs/chatglm3-6b.md says where to get one."
    if not directory.is_dir():
        raise UserError(f"the base model directory {directory} does not exist. {hint}")
    for name in [constants.BASE_TOKENIZER.name, *(["config.json"] if weights else [])]:
        if not (directory / name).is_file():
            raise UserError(f"{directory} has no {name}. {hint}")
    if not weights:
        return directory
    if not [*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin")]:
        raise UserError(f"{directory} has no *.safetensors weights. {hint}")
    if not original_chatglm and _model_type(directory) == "chatglm":
        raise UserError(
            f"{directory} is ChatGLM3's original checkpoint. Convert it first: {llmtuner_command()} convert "
            f"{directory} {directory}-glm, then set BASE_MODEL_DIR={directory}-glm."
        )
    return directory


def _model_type(directory: Path) -> str | None:
    try:
        return json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{directory / 'config.json'} is not valid JSON ({error}). Download it again.") from error


def require_corpus() -> Path:
    """Returns `CORPUS_DIR`; the miniature's own texts are written first if they do not exist yet.

    Raises:
        UserError: if a corpus directory that was asked for does not exist.
    """
    # The miniature's questions are asked whatever the texts are.
    if constants.PROFILE_NAME == "mini" and not constants.QUESTIONS.is_file():
        from mini.world import write_world

        write_world(constants.MINI_CORPUS_DIR)
    if "CORPUS_DIR" in os.environ and not constants.CORPUS_DIR.is_dir():
        raise UserError(
            f"the corpus directory CORPUS_DIR={constants.CORPUS_DIR} does not exist. Set it to a directory of texts."
        )
    return constants.CORPUS_DIR


def held_out_texts(language: str) -> list[str]:
    """Text of one of `LANGUAGES`, by its code, that no step trains on; all steps measure with the same.

    Raises:
        UserError: if the corpus has none.
    """
    from llmtuner.data import held_out

    return held_out.held_out_texts(
        f"test_{language}",
        PROFILE.eval_sets[language],
        constants.DATASET_INFO,
        constants.CORPUS_DIR,
        constants.VALIDATION_SHARE,
        PROFILE.held_out_bytes,
    )


def tokenizer_corpus(max_bytes: int) -> Iterator[tuple[str, str]]:
    """Training text of the added language in the proportions of `TOKENIZER_MIX`: (data set, text).

    Raises:
        UserError: at once, if a data set cannot be found.
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
    """Training text of other languages, which tells steps 1 and 2 what they write, too; none where no character is shared.

    Raises:
        UserError: at once, if there is no such text, or no such writing system.
    """
    from llmtuner.data import held_out
    from llmtuner.tokenizer.writing_systems import WRITING_SYSTEMS

    shared = WRITING_SYSTEMS[PROFILE.writing_system].shared
    if shared and not PROFILE.reference_sets:
        raise UserError(
            f"{PROFILE.language_name} shares the characters of the writing system {PROFILE.writing_system!r} with other "
            f"languages. Name data sets of these in `reference_sets` of the profile, so that their tokens do not change."
        )
    return held_out.reference_documents(
        PROFILE.reference_sets if shared else [],
        constants.DATASET_INFO,
        constants.CORPUS_DIR,
        constants.VALIDATION_SHARE,
        PROFILE.reference_bytes,
    )


def finish_step(name: str, metrics: dict, outcome: str) -> None:
    """Writes `WORK_DIR/metrics/<name>.json`, which marks the step as finished, and the report; prints the outcome.

    The file also holds checksums of the step's inputs, as they were when it started.

    Args:
        outcome: what came out and how good it is, for the one line that ends every step.
    """
    if texts := _corpus_checksum(name, metrics):
        _input_checksums["texts"] = texts
    atomic_write_json(
        constants.METRICS_DIR / f"{name}.json", {**metrics, "languages": LANGUAGES, "made_from": _input_checksums}
    )
    write_report()
    step, steps = STEPS[name], list(STEPS.values())
    following = steps[steps.index(step) + 1 :]
    if metrics.get("cut_short"):
        status = f"cut short by max_steps after {metrics['steps']:,} steps, so not finished"
    else:
        status = "done"
    places = [display_path(ARTIFACTS.get(step.output, REPORT))]
    if following:
        places.append(f"next: {command(following[0].script)}")
    else:
        places.append(f"chat: {command(step.script)} --chat (or --web)")
    print0(f"\nStep {step.number} {status}: {outcome} | {' | '.join(places)}")


def write_report() -> None:
    """Writes WORK_DIR/report.html from what the steps have left there.

    Raises:
        UserError: if no step has finished yet.
    """
    from llmtuner.report import page
    from llmtuner.report.environment import environment

    profile = {
        "PROFILE": constants.PROFILE_NAME,
        "WORK_DIR": str(constants.WORK_DIR),
        "CORPUS_DIR": str(constants.CORPUS_DIR),
    }
    facts = {
        "profile": profile | {name: str(value) for name, value in vars(PROFILE).items()},
        **environment(),
    }
    warnings = [*find_stale_inputs(*STEPS), *find_changed_corpora()]
    page.write_report(constants.WORK_DIR, list(STEPS.values()), facts, warnings)


def write_model_card(model_dir: Path, metrics: dict) -> None:
    """Writes README.md of the chat model: what it is, how it was made, what step 7 has measured of it."""
    from llmtuner.data.sources import get_dataset_attr
    from llmtuner.eval.questions import read_questions
    from llmtuner.report import model_card

    metrics_by_step = {name: load_metrics(name) for name in STEPS} | {"step7": metrics}
    used = [dataset for name in ("step5", "step6") for dataset in metrics_by_step[name].get("data", {})]
    sources = {name: get_dataset_attr(name, constants.DATASET_INFO, constants.CORPUS_DIR) for name in used}
    data = {name: {} if source.files else {"hf_hub_url": source.hf_hub_url} for name, source in sources.items()}
    examples = [
        question.question
        for question in read_questions(constants.QUESTIONS)
        if question.language == LANGUAGES.added and question.value
    ]
    model_card.write_model_card(model_dir, metrics_by_step, PROFILE.base_id, data, *examples[:1])
    add_to_marker(model_dir, "README.md", "generation_config.json")


def load_metrics(name: str) -> dict:
    """Reads what an earlier step measured; empty if it has not finished."""
    path = constants.METRICS_DIR / f"{name}.json"
    return rename_keys(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
