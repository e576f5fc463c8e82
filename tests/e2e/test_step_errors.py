"""The step scripts with bad input: one message, exit code 2, nothing overwritten."""

import json
import os
import shutil
import subprocess

import pytest

from tests.checkpoints import truncate
from tests.helpers import ROOT
from tests.scripts import STEPS, locked_by_another_process, refused, start, start_step


@pytest.fixture
def model(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


@pytest.mark.parametrize(
    ("words", "directory"),
    [
        (["step5_train_pt_single_gpu.py"], "step3_zero"),
        (["step7_eval_chat.py", "--chat"], "chat_model"),
        (["step7_eval_chat.py", "--web", "--port", "0"], "chat_model"),
        (
            ["-m", "llmtuner", "train", "--dataset", "x", "--output_dir", "x", "--model_name_or_path", "{model}"],
            "model",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:3]),
)
def test_cut_weights_are_one_message_of_every_script(model, tmp_path, words, directory):
    if "--web" in words:
        pytest.importorskip("gradio", reason="gradio is not installed")
    file = truncate(model)
    result = tmp_path / "work" / directory
    if directory != "model":
        shutil.copytree(model, result)
        file = result / file.name
    ended = start([word.format(model=model) for word in words], WORK_DIR=tmp_path / "work", BASE_MODEL_DIR=model)
    refused(ended, "is damaged or truncated", file.name)


# ----------------------------------------------------------------------------------------------------------- bad input
def test_unknown_profile(tmp_path):
    refused(start_step("step1", tmp_path, PROFILE="huge"), "PROFILE=huge", "mini", "chatglm3-6b")


@pytest.mark.parametrize("step", list(STEPS)[1:])
def test_step_before_its_forerunner(tmp_path, step):
    refused(start_step(step, tmp_path), "is missing", "It is made by step", str(tmp_path / "work"))


def test_work_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    refused(start_step("step1", tmp_path, WORK_DIR=tmp_path / "file" / "work"), "cannot write", "WORK_DIR")


def test_missing_corpus_directory(tmp_path):
    refused(start_step("step1", tmp_path, CORPUS_DIR=tmp_path / "nowhere"), "CORPUS_DIR", "does not exist")


@pytest.fixture
def questions(tmp_path):
    """The miniature's texts are not written, which takes seconds, where its questions seem to be there."""
    (tmp_path / "work" / "corpus").mkdir(parents=True)
    (tmp_path / "work" / "corpus" / "questions.jsonl").touch()


@pytest.mark.usefixtures("questions")
@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is empty"),
        (b'{"body": "x"}\n', "no column 'text'"),
        ('{"text": "日本語の文です。"}\n'.encode("euc_jp"), "not UTF-8"),
        (b'{"text": "x"\n', "line 1, is not valid JSON"),
    ],
)
def test_corpus_that_cannot_be_used(tmp_path, content, part):
    (tmp_path / "ja_wiki.train.jsonl").write_bytes(content)
    (tmp_path / "ja_aozora.train.jsonl").write_text('{"text": "むかしむかし。"}\n', encoding="utf-8")
    (tmp_path / "ja_wiki.test.jsonl").write_text('{"text": "ある日のこと。"}\n', encoding="utf-8")
    refused(start_step("step1", tmp_path, CORPUS_DIR=tmp_path), part, "ja_wiki.train.jsonl")
    assert not (tmp_path / "work" / "step1_ja_tokenizer").exists()


@pytest.mark.usefixtures("questions")
def test_corpus_that_cannot_be_read(tmp_path):
    (tmp_path / "ja_wiki.train.jsonl").mkdir()
    refused(start_step("step1", tmp_path, CORPUS_DIR=tmp_path), "cannot read", "ja_wiki.train.jsonl")


@pytest.mark.usefixtures("questions")
def test_corpus_directory_without_the_file(tmp_path):
    (tmp_path / "texts").mkdir()
    refused(start_step("step1", tmp_path, CORPUS_DIR=tmp_path / "texts", HF_HUB_OFFLINE=1), "ja_wiki", "CORPUS_DIR")


@pytest.mark.parametrize("missing", ["tokenizer.model", "config.json", "model.safetensors"])
def test_base_directory_that_is_incomplete(tmp_path, missing):
    base = tmp_path / "base"
    base.mkdir()
    for name in {"tokenizer.model", "tokenizer.json", "config.json", "model.safetensors"} - {missing}:
        (base / name).write_bytes(b'"[gMASK]"' if name == "tokenizer.json" else b"")
    (tmp_path / "work" / "step2_merged_tokenizer").mkdir(parents=True)
    (tmp_path / "work" / "step1_ja_tokenizer").mkdir(parents=True)
    (tmp_path / "work" / "step1_ja_tokenizer" / "ja_bpe.model").write_bytes(b"")
    refused(start_step("step3", tmp_path, BASE_MODEL_DIR=base), str(base), missing.removeprefix("model"))
    if missing == "tokenizer.model":
        refused(start_step("step2", tmp_path, BASE_MODEL_DIR=base), str(base), missing)


def test_finished_step_is_not_overwritten(tmp_path):
    finished_steps(tmp_path / "work", step1={})
    refused(start_step("step1", tmp_path), "finished already", "OVERWRITE=1")
    assert start_step("step1", tmp_path, SKIP_COMPLETED=1).returncode == 0


def test_finished_training_is_kept_until_a_new_one_can_begin(tmp_path):
    work = tmp_path / "work"
    checkpoint, finished = work / "step5_pt_adapter" / "checkpoint-5", work / "metrics" / "step5.json"
    for directory in (checkpoint, finished.parent, work / "step3_zero", work / "step5_pt_merged"):
        directory.mkdir(parents=True)
    (checkpoint / "checksums.json").write_text("{}")
    finished.write_text('{"steps": 5}')
    refused(start_step("step5", tmp_path), "finished already", "OVERWRITE=1")
    refused(start_step("step5", tmp_path, "--learing_rate", "1e-4", OVERWRITE=1), "did you mean 'learning_rate'")
    refused(start_step("step5", tmp_path, OVERWRITE=1), "step3_zero")  # which holds no model
    assert checkpoint.exists()
    assert finished.exists()


def finished_steps(work, **metrics):
    """A work directory in which steps seem to have finished."""
    for name in ("metrics", "step1_ja_tokenizer", "step2_merged_tokenizer", "step3_zero", "step5_pt_merged"):
        (work / name).mkdir(parents=True)
    (work / "step1_ja_tokenizer" / "ja_bpe.model").write_bytes(b"pieces")
    (work / "step2_merged_tokenizer" / "tokenizer.json").write_text("{}")
    for step, content in metrics.items():
        (work / "metrics" / f"{step}.json").write_text(json.dumps(content))


def test_input_that_has_changed_since_is_noticed(tmp_path):
    from llmtuner.files import checksum

    work = tmp_path / "work"
    finished_steps(work)
    made_from = {"merged tokenizer": checksum(work / "step2_merged_tokenizer")}
    (work / "metrics" / "step3.json").write_text(json.dumps({"made_from": made_from}))
    assert start_step("step3", tmp_path, SKIP_COMPLETED=1).returncode == 0
    (work / "step2_merged_tokenizer" / "tokenizer.json").write_text('{"other": 1}')
    message = ("the merged tokenizer", "is not the one that step3 used: run step3 again", "step3_resize_model.py")
    for step in ("step3", "step4", "step5", "step6"):
        refused(start_step(step, tmp_path, SKIP_COMPLETED=1), *message)
    report = start_step("step7", tmp_path, "--report")
    assert report.returncode == 0, report.stderr
    assert message[1] in (work / "report.html").read_text(encoding="utf-8")


def test_texts_that_have_changed_since_stand_in_the_report(tmp_path):
    work, corpus = tmp_path / "work", tmp_path / "texts"
    corpus.mkdir()
    (corpus / "ja_wiki.train.jsonl").write_text('{"text": "むかし。"}\n', encoding="utf-8")
    code = (
        "import pipeline; pipeline.finish_step('step5', {'steps': 1, 'data': {'wikipedia_ja': {}}}, '');"
        "print(pipeline.find_changed_corpora())"
    )
    result = start(["-c", code], WORK_DIR=work, CORPUS_DIR=corpus)
    assert result.stdout.endswith("[]\n"), result.stderr
    (corpus / "ja_wiki.train.jsonl").write_text('{"text": "いまは。"}\n', encoding="utf-8")
    assert start_step("step7", tmp_path, "--report", CORPUS_DIR=corpus).returncode == 0
    assert "the texts that step5 read have changed since" in (work / "report.html").read_text(encoding="utf-8")


def test_deleted_result_beside_its_metrics_is_made_again(tmp_path):
    finished_steps(tmp_path / "work", step3={"old_rows": 1})
    refused(start_step("step3", tmp_path), "finished already")
    (tmp_path / "work" / "step3_zero").rmdir()
    refused(start_step("step4", tmp_path), "step3_zero is missing", "step3_resize_model.py")
    refused(start_step("step3", tmp_path, BASE_MODEL_DIR=tmp_path / "nowhere"), "base model directory")


def test_run_cut_short_is_not_the_finished_step(tmp_path):
    finished_steps(tmp_path / "work", step5={"cut_short": True, "steps": 12})
    for variables in ({}, {"SKIP_COMPLETED": 1}):
        result = start_step("step5", tmp_path, **variables)
        refused(result, "step3_zero")  # it goes on to look for a model
    result = start_step("step6", tmp_path)
    assert "note: step 5 was cut short by max_steps" in result.stdout


def test_second_step_in_one_work_dir_is_refused(tmp_path):
    with locked_by_another_process(tmp_path / "work" / ".lock") as holder:
        refused(start_step("step4", tmp_path), f"is in use by process {holder} ", "WORK_DIR=")
    refused(start_step("step4", tmp_path), "is missing")  # a dead process holds nothing


@pytest.mark.parametrize(
    ("words", "answer", "code", "is_left"),
    [
        ([], "y\n", 0, False),
        ([], "n\n", 2, True),
        ([], "", 2, True),
        (["WORK_DIR=elsewhere"], "y\n", 2, True),
        (["PROFILE=../.."], "y\n", 2, True),
        (["PROFILE=elsewhere/..yaml"], "y\n", 2, True),
        (["PROFILE=.yaml"], "y\n", 2, True),
        (["PROFILE=a b.yaml"], "y\n", 2, True),
        (["PROFILE=elsewhere/mine.yaml"], "y\n", 0, True),
    ],
)
def test_make_clean_deletes_the_default_only_and_asks(tmp_path, words, answer, code, is_left):
    """In a directory of its own, with a copy of the Makefile."""
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    for directory in ("runs/mini", "elsewhere"):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / "mine").write_text("")
    environment = {key: value for key, value in os.environ.items() if key not in ("WORK_DIR", "PROFILE", "MAKEFLAGS")}
    command = ["make", "--no-print-directory", "clean", *words]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, input=answer, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == code, result.stderr
    assert (tmp_path / "runs" / "mini" / "mine").exists() == is_left
    assert (tmp_path / "elsewhere" / "mine").exists()


def test_report_before_any_step(tmp_path):
    refused(start_step("step7", tmp_path, "--report"), "no step has finished", "step1_train_tokenizer.py")


@pytest.mark.parametrize("words", [["--chat"], ["--web"], ["--suite", "ja"]])
def test_chat_and_suites_before_there_is_a_model(tmp_path, words):
    refused(start_step("step7", tmp_path, *words), "chat_model is missing", "step6_train_sft_single_gpu.py")


@pytest.mark.parametrize("words", [["--suite", "jp"], ["--chat"], ["--web"]])
def test_chat_model_that_is_damaged_or_something_else(tmp_path, words):
    (tmp_path / "work" / "chat_model").mkdir(parents=True)
    (tmp_path / "work" / "chat_model" / "adapter_config.json").write_text("{}")  # step 6's adapter, say
    message = "jp is unknown" if "jp" in words else "config.json"
    if "--web" in words:
        pytest.importorskip("gradio", reason="pip install -r requirements-optional.txt")
    refused(start_step("step7", tmp_path, *words), message)


def test_page_for_others_needs_a_password(tmp_path):
    (tmp_path / "work" / "chat_model").mkdir(parents=True)
    refused(start_step("step7", tmp_path, "--web", "--host", "0.0.0.0"), "password")
    refused(start_step("step7", tmp_path, "--web", "--host", "0.0.0.0", CHAT_PASSWORD="short"), "8 characters")


def test_questions_file_without_a_question(tmp_path):
    for name in ("step3_zero", "step5_pt_merged", "chat_model", "corpus"):
        (tmp_path / "work" / name).mkdir(parents=True)
    (tmp_path / "work" / "corpus" / "questions.jsonl").write_text("\n")
    refused(start_step("step7", tmp_path), "questions.jsonl", "contains no questions")
    row = {"group": "ja", "language": "ja", "question": "空は？", "value": "青"}
    (tmp_path / "work" / "corpus" / "questions.jsonl").write_text(json.dumps(row))
    refused(start_step("step7", tmp_path), "questions.jsonl", "has no group ja_free")
