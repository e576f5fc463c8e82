"""The step scripts as a user starts them: from another directory, with bad input, and all seven in a row."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import opened

from llmtuner.console import UserError

ROOT = Path(__file__).resolve().parent.parent
STEPS = {
    "step1": "step1_train_tokenizer.py",
    "step2": "step2_merge_tokenizer.py",
    "step3": "step3_resize_model.py",
    "step4": "step4_test_zero.py",
    "step5": "step5_train_pt_single_gpu.py",
    "step6": "step6_train_sft_single_gpu.py",
    "step7": "step7_eval_chat.py",
}


FEW = ["--max_steps", "12", "--eval_steps", "12", "--max_eval_samples", "8"]  # settings of a short run


def start(step, cwd, *words, **variables):
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PROFILE", "CORPUS_DIR", "BASE_MODEL_DIR")
    }
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "WORK_DIR": str(cwd / "work"),
        **{key: str(value) for key, value in variables.items()},
    }
    command = [sys.executable, str(ROOT / STEPS[step]), *words]
    return subprocess.run(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def refused(result, *parts):
    """One message, exit code 2, no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1
    for part in parts:
        assert part in result.stderr


# ----------------------------------------------------------------------------------------------------------- bad input
def test_unknown_profile(tmp_path):
    refused(start("step1", tmp_path, PROFILE="huge"), "PROFILE=huge", "mini", "chatglm3-6b")


@pytest.mark.parametrize("step", list(STEPS)[1:])
def test_step_before_its_forerunner(tmp_path, step):
    refused(start(step, tmp_path), "is missing", "It is made by step", str(tmp_path / "work"))


def test_work_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    refused(start("step1", tmp_path, WORK_DIR=tmp_path / "file" / "work"), "cannot write", "WORK_DIR")


def test_missing_corpus_directory(tmp_path):
    refused(start("step1", tmp_path, CORPUS_DIR=tmp_path / "nowhere"), "CORPUS_DIR", "does not exist")


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
    refused(start("step1", tmp_path, CORPUS_DIR=tmp_path), part, "ja_wiki.train.jsonl")
    assert not (tmp_path / "work" / "step1_ja_tokenizer").exists()


def test_corpus_that_cannot_be_read(tmp_path):
    (tmp_path / "ja_wiki.train.jsonl").mkdir()
    refused(start("step1", tmp_path, CORPUS_DIR=tmp_path), "cannot read", "ja_wiki.train.jsonl")


def test_corpus_directory_without_the_file(tmp_path):
    (tmp_path / "texts").mkdir()
    refused(start("step1", tmp_path, CORPUS_DIR=tmp_path / "texts", HF_HUB_OFFLINE=1), "ja_wiki", "CORPUS_DIR")


@pytest.mark.parametrize("missing", ["tokenizer.model", "config.json", "model.safetensors"])
def test_base_directory_that_is_incomplete(tmp_path, missing):
    base = tmp_path / "base"
    base.mkdir()
    for name in {"tokenizer.model", "tokenizer.json", "config.json", "model.safetensors"} - {missing}:
        (base / name).write_bytes(b"")
    (tmp_path / "work" / "step2_merged_tokenizer").mkdir(parents=True)
    (tmp_path / "work" / "step1_ja_tokenizer").mkdir(parents=True)
    (tmp_path / "work" / "step1_ja_tokenizer" / "ja_bpe.model").write_bytes(b"")
    refused(start("step3", tmp_path, BASE_MODEL_DIR=base), str(base), missing.removeprefix("model"))
    if missing == "tokenizer.model":
        refused(start("step2", tmp_path, BASE_MODEL_DIR=base), str(base), missing)


def test_finished_step_is_not_overwritten(tmp_path):
    finished_steps(tmp_path / "work", step1={})
    refused(start("step1", tmp_path), "finished already", "OVERWRITE=1")
    assert start("step1", tmp_path, SKIP_COMPLETED=1).returncode == 0


def test_finished_training_is_kept_until_a_new_one_can_begin(tmp_path):
    work = tmp_path / "work"
    checkpoint, finished = work / "step5_pt_adapter" / "checkpoint-5", work / "metrics" / "step5.json"
    for directory in (checkpoint, finished.parent, work / "step3_zero", work / "step5_pt_merged"):
        directory.mkdir(parents=True)
    (checkpoint / "checksums.json").write_text("{}")
    finished.write_text('{"steps": 5}')
    refused(start("step5", tmp_path), "finished already", "OVERWRITE=1")
    refused(start("step5", tmp_path, "--learing_rate", "1e-4", OVERWRITE=1), "did you mean 'learning_rate'")
    refused(start("step5", tmp_path, OVERWRITE=1), "step3_zero")  # which holds no model
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
    assert start("step3", tmp_path, SKIP_COMPLETED=1).returncode == 0
    (work / "step2_merged_tokenizer" / "tokenizer.json").write_text('{"other": 1}')
    message = ("the merged tokenizer", "is not the one that step3 used: run step3 again", "step3_resize_model.py")
    for step in ("step3", "step4", "step5", "step6"):
        refused(start(step, tmp_path, SKIP_COMPLETED=1), *message)
    report = start("step7", tmp_path, "--report")
    assert report.returncode == 0, report.stderr
    assert message[1] in (work / "report.html").read_text(encoding="utf-8")


def test_texts_that_have_changed_since_stand_in_the_report(tmp_path):
    work, corpus = tmp_path / "work", tmp_path / "texts"
    corpus.mkdir()
    (corpus / "ja_wiki.train.jsonl").write_text('{"text": "むかし。"}\n', encoding="utf-8")
    code = (
        "import pipeline; pipeline.finish_step('step5', {'steps': 1, 'data': {'wikipedia_ja': {}}});"
        "print(pipeline.changed_corpora())"
    )
    environment = {**os.environ, "WORK_DIR": str(work), "CORPUS_DIR": str(corpus), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.endswith("[]\n"), result.stderr
    (corpus / "ja_wiki.train.jsonl").write_text('{"text": "いまは。"}\n', encoding="utf-8")
    assert start("step7", tmp_path, "--report", CORPUS_DIR=corpus).returncode == 0
    assert "the texts that step5 read have changed since" in (work / "report.html").read_text(encoding="utf-8")


def test_deleted_result_beside_its_metrics_is_made_again(tmp_path):
    finished_steps(tmp_path / "work", step3={"old_rows": 1})
    refused(start("step3", tmp_path), "finished already")
    (tmp_path / "work" / "step3_zero").rmdir()
    refused(start("step4", tmp_path), "step3_zero is missing", "step3_resize_model.py")
    refused(start("step3", tmp_path, BASE_MODEL_DIR=tmp_path / "nowhere"), "base model directory")


def test_run_cut_short_is_not_the_finished_step(tmp_path):
    finished_steps(tmp_path / "work", step5={"cut_short": True, "steps": 12})
    for variables in ({}, {"SKIP_COMPLETED": 1}):
        result = start("step5", tmp_path, **variables)
        refused(result, "step3_zero")  # it goes on to look for a model
    result = start("step6", tmp_path)
    assert "step5 was cut short by max_steps" in result.stdout


def test_second_step_in_one_work_dir_is_refused(tmp_path):
    code = "import sys, time; from pathlib import Path; from llmtuner.locks import acquire_lock; "
    code += "acquire_lock(Path(sys.argv[1]), 'it'); print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path / "work" / ".lock")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout.readline() == "held\n"
        refused(start("step4", tmp_path), f"is in use by process {holder.pid} ", "WORK_DIR=")
    finally:
        holder.kill()
        holder.wait()
    refused(start("step4", tmp_path), "is missing")  # a dead process holds nothing


@pytest.mark.parametrize(
    ("words", "answer", "code", "is_left"),
    [
        ([], "y\n", 0, False),
        ([], "n\n", 2, True),
        ([], "", 2, True),
        (["WORK_DIR=elsewhere"], "y\n", 2, True),
        (["PROFILE=../.."], "y\n", 2, True),
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
    refused(start("step7", tmp_path, "--report"), "no step has finished", "step1_train_tokenizer.py")


@pytest.mark.parametrize("words", [["--chat"], ["--web"], ["--suite", "ja"]])
def test_chat_and_suites_before_there_is_a_model(tmp_path, words):
    refused(start("step7", tmp_path, *words), "chat_model is missing", "step6_train_sft_single_gpu.py")


@pytest.mark.parametrize("words", [["--suite", "jp"], ["--chat"], ["--web"]])
def test_chat_model_that_is_damaged_or_something_else(tmp_path, words):
    (tmp_path / "work" / "chat_model").mkdir(parents=True)
    (tmp_path / "work" / "chat_model" / "adapter_config.json").write_text("{}")  # step 6's adapter, say
    message = "jp is unknown" if "jp" in words else "config.json"
    if "--web" in words:
        pytest.importorskip("gradio", reason="pip install -r requirements-optional.txt")
    refused(start("step7", tmp_path, *words), message)


def test_page_for_others_needs_a_password(tmp_path):
    (tmp_path / "work" / "chat_model").mkdir(parents=True)
    refused(start("step7", tmp_path, "--web", "--host", "0.0.0.0"), "password")
    refused(start("step7", tmp_path, "--web", "--host", "0.0.0.0", CHAT_PASSWORD="short"), "8 characters")


def test_questions_file_without_a_question(tmp_path):
    for name in ("step3_zero", "step5_pt_merged", "chat_model", "corpus"):
        (tmp_path / "work" / name).mkdir(parents=True)
    (tmp_path / "work" / "corpus" / "questions.jsonl").write_text("\n")
    refused(start("step7", tmp_path), "questions.jsonl", "holds no question")
    row = {"group": "ja", "language": "ja", "question": "空は？", "value": "青"}
    (tmp_path / "work" / "corpus" / "questions.jsonl").write_text(json.dumps(row))
    refused(start("step7", tmp_path), "questions.jsonl", "no request of the group ja_free")


# ---------------------------------------------------------------------------------------------------- all seven in a row
@pytest.fixture(scope="module")
def run_of_all_steps(tmp_path_factory):
    """Steps 1 to 7 on the miniature with a few training steps only, started from an unrelated directory."""
    directory = tmp_path_factory.mktemp("elsewhere")
    for step in STEPS:
        result = start(step, directory, *(FEW if step in ("step5", "step6") else []))
        assert result.returncode == 0, f"{step}: {result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return directory / "work"


def metrics_of(work, step):
    return json.loads((work / "metrics" / f"{step}.json").read_text(encoding="utf-8"))


def test_metrics_have_their_keys(run_of_all_steps):
    training = {
        "tokens",
        "tokens_per_second",
        "padding_ratio",
        "trainable_parameters",
        "train_loss",
        "eval_loss",
        "bits_per_byte",
        "seconds",
    }
    wanted = {
        "step1": {
            "method",
            "vocab_size",
            "new_pieces",
            "input_bytes",
            "skipped",
            "seconds",
            "pieces_by_script",
            "tokens_per_character",
        },
        "step2": {
            "method",
            "base_pieces",
            "added_pieces",
            "pieces_by_script",
            "unreachable_tokens",
            "special_ids_kept",
            "token_ratio",
            "changed_texts",
            "texts",
            "examples_of_changes",
        },
        "step3": {"old_rows", "new_rows", "old_rows_identical", "old_logits_max_diff", "init", "seconds"},
        "step4": {"zh", "en", "ja", "bits_per_byte", "tokens_per_character"},
        "step5": training,
        "step6": training | {"initial_loss"},
        "step7": {
            "accuracy",
            "language_confusion",
            "bits_per_byte",
            "bits_per_byte_interval",
            "repetition",
            "free_answers",
            "agreement",
            "tokens_per_second",
            "generation",
            "seconds",
        },
    }
    for step, keys in wanted.items():
        assert keys <= metrics_of(run_of_all_steps, step).keys(), step


def test_tokenizer_is_extended_without_harm(run_of_all_steps):
    assert metrics_of(run_of_all_steps, "step1")["skipped"] == 0
    merged = metrics_of(run_of_all_steps, "step2")
    assert merged["unreachable_tokens"] == 0
    assert merged["special_ids_kept"]
    assert merged["changed_texts"] == {"zh": 0, "en": 0}
    assert merged["token_ratio"]["ja"] <= 0.60


def test_zero_model_is_the_base_in_chinese_and_english(run_of_all_steps):
    grown = metrics_of(run_of_all_steps, "step3")
    assert grown["old_logits_max_diff"] == 0
    assert grown["new_rows"] % 64 == 0
    assert grown["init"] == {"input": "mean", "output": "mean"}
    zero = metrics_of(run_of_all_steps, "step4")
    assert zero["zh"]["identical"] == zero["zh"]["total"] > 0
    assert zero["en"]["identical"] == zero["en"]["total"] > 0
    assert zero["ja"]["correct"] <= 0.05 * zero["ja"]["total"]


def test_new_rows_can_start_where_pieces_are_used_alike(run_of_all_steps, tmp_path):
    from safetensors import safe_open

    work = tmp_path / "work"
    for name in ("step2_merged_tokenizer", "corpus"):
        shutil.copytree(run_of_all_steps / name, work / name)
    result = start("step3", tmp_path, "--init", "focus")
    assert result.returncode == 0, result.stderr
    metrics = metrics_of(work, "step3")
    assert metrics["init"] == {"input": "focus", "output": "focus"}
    rows = {}
    for directory in (work, run_of_all_steps):
        with safe_open(directory / "step3_zero" / "model.safetensors", framework="pt") as file:
            rows[directory] = file.get_tensor("lm_head.weight").float()
    old = metrics["old_rows"] - 26  # the base's rows without its padding
    assert rows[work][:old].equal(rows[run_of_all_steps][:old])
    changed = (rows[work] != rows[run_of_all_steps]).any(dim=1).sum()
    assert changed > 0.8 * merged_pieces(run_of_all_steps)
    assert rows[work].norm(dim=1).max() <= rows[work][:old].norm(dim=1).max()  # means are no longer than the longest


def merged_pieces(work):
    return metrics_of(work, "step2")["added_pieces"]


def test_base_knows_its_world(run_of_all_steps):
    accuracy = metrics_of(run_of_all_steps, "step7")["accuracy"]["base"]
    assert min(accuracy["zh"], accuracy["en"]) >= 0.9
    assert max(accuracy["ja"], accuracy["ja_unseen"]) <= 0.05


def test_training_moves_in_the_right_direction(run_of_all_steps):
    for step in ("step5", "step6"):
        trained = metrics_of(run_of_all_steps, step)
        assert trained["eval_loss"]["last"] < trained["eval_loss"]["first"]
        assert trained["padding_ratio"] < 0.02
    assert (
        metrics_of(run_of_all_steps, "step5")["bits_per_byte"]["after"]["ja"]
        < metrics_of(run_of_all_steps, "step4")["bits_per_byte"]["zero"]["ja"]
    )


def test_bits_per_byte_are_logged_along_the_way(run_of_all_steps):
    metrics = metrics_of(run_of_all_steps, "step5")
    lines = (run_of_all_steps / "step5_pt_adapter" / "trainer_log.jsonl").read_text().splitlines()
    logged = [line for line in map(json.loads, lines) if "eval_loss" in line]
    for language in ("ja", "zh", "en"):
        bits = [line[f"eval_bits_per_byte_{language}"] for line in logged]
        assert bits[0] == pytest.approx(metrics["bits_per_byte"]["before"][language], rel=0.01)  # there in fp32
        assert bits[-1] == pytest.approx(metrics["bits_per_byte"]["after"][language], rel=0.01)


def test_evaluation_finishes_the_chat_model(run_of_all_steps):
    metrics = metrics_of(run_of_all_steps, "step7")
    for model, bits in metrics["bits_per_byte"].items():
        for language, value in bits.items():
            low, high = metrics["bits_per_byte_interval"][model][language]
            assert low < value < high
    assert metrics["agreement"]["base"] == {one: {"identical": 1, "similar": 1} for one in ("zh", "en")}
    assert metrics["agreement"]["zero"]["zh"]["identical"] > 0.9
    assert metrics["agreement"]["chat"]["zh"]["identical"] < 0.9
    assert metrics["generation"]["candidates"]["greedy"]["repeated_4gram_ratio"] == metrics["repetition"]["chat"]["ja"]
    chosen = metrics["generation"]["candidates"][metrics["generation"]["chosen"]]["settings"]
    own = json.loads((run_of_all_steps / "chat_model" / "generation_config.json").read_text())
    assert {name: own[name] for name in chosen} == chosen
    card = (run_of_all_steps / "chat_model" / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card
    assert metrics["generation"]["chosen"] in card
    assert "フィンの趣味を知りたいのですが。" in card
    rows = [json.loads(line) for line in (run_of_all_steps / "answers.jsonl").read_text().splitlines()]
    assert {"group", "language", "question", "right", "base", "zero", "pretrained", "chat"} <= rows[0].keys()
    marks = [row["correct"]["base"] for row in rows if row["group"] == "zh"]
    assert sum(marks) / len(marks) == metrics["accuracy"]["base"]["zh"]
    confusion = metrics["language_confusion"]["base"]
    assert confusion["zh"]["response_pass_rate"] > 0.9
    assert confusion["ja"]["response_pass_rate"] < 0.1
    assert next(row["base"] for row in rows if row["group"] == "zh")


def test_table_of_an_earlier_run_and_100_percent(capsys):
    """Metrics from before language confusion was measured; 99.5 % is not rounded up."""
    from step7_eval_chat import MODELS, show

    tried = {
        "repeated_4gram_ratio": 0.1,
        "longest_loop": 0,
        "finished_ratio": 0.9996,
        "accuracy": 0.995,
        "tokens_per_second": 1.0,
    }
    metrics = {
        "accuracy": {model: {"zh": 1.0, "en": 0.995, "ja": None} for model in MODELS},
        "bits_per_byte": {model: dict.fromkeys(("ja", "zh", "en"), 1.0) for model in MODELS},
        "repetition": {model: {"ja": 0.1} for model in MODELS},
        "generation": {"candidates": {"greedy": tried}, "chosen": "greedy"},
    }
    show(metrics)
    table = capsys.readouterr().out
    assert re.search(r"^base +100% +99\.5% +- ", table, re.MULTILINE)
    assert re.search(r"^greedy +10% .* 99\.9% +99\.5% ", table, re.MULTILINE)
    assert "language" not in table
    rates = {"response_pass_rate": 0.9996, "line_pass_rate": None}
    show(metrics | {"language_confusion": {model: {"zh": rates, "ja_free": rates} for model in MODELS}})
    assert re.search(r"^chat +99\.9% +99\.9% +- +-$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("subject", [[], ["ミナ", "米娜", "Mina"]])
def test_a_questions_file_without_subjects_is_told(tmp_path, monkeypatch, capsys, subject):
    import step7_eval_chat

    row = {"group": "ja_free", "language": "ja", "question": "話して。", "subject": subject}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    monkeypatch.setattr(step7_eval_chat.constants, "QUESTIONS", tmp_path / "questions.jsonl")
    monkeypatch.setattr(step7_eval_chat, "MODELS", {"base": tmp_path})
    with pytest.raises(UserError, match=r"config\.json"):  # no model: that comes next
        step7_eval_chat.evaluate()
    assert ("names no subjects" in capsys.readouterr().out) == (not subject)


@pytest.mark.parametrize("width", [1280, 390])
def test_report_of_a_whole_run_in_a_browser(run_of_all_steps, browser, width):
    report = run_of_all_steps / "report.html"
    tab, problems, requests = opened(browser, report.as_uri(), width)
    assert tab.get_by_text("5 of 7 steps finished").is_visible()  # max_steps cut two short
    assert tab.get_by_text("cut short by max_steps").count() == 2
    assert tab.locator("svg[role=img]").count() == tab.locator("figure").count() == 15
    for title in ("Before and after", "Generation settings", "Figures", "Answers side by side"):
        assert tab.get_by_role("heading", name=title, exact=True).is_visible(), title
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert requests == [report.as_uri()]
    assert problems == []
    tab.close()


def test_damaged_model_is_found_before_the_first_is_examined(run_of_all_steps, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(run_of_all_steps, work, ignore=shutil.ignore_patterns("checkpoint-*", "cache"))
    weights = work / "chat_model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    before = {path: path.read_bytes() for path in (work / "answers.jsonl", work / "metrics" / "step7.json")}
    result = start("step7", tmp_path, OVERWRITE=1)
    refused(result, str(weights))
    assert "answers base" not in result.stderr
    assert {path: path.read_bytes() for path in before} == before


def test_chat_model_loads_without_this_project(run_of_all_steps, tmp_path):
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer; d = sys.argv[1];"
        "m = AutoModelForCausalLM.from_pretrained(d); t = AutoTokenizer.from_pretrained(d);"
        "ids = t.apply_chat_template([{'role': 'user', 'content': '你好'}], add_generation_prompt=True, return_tensors='pt', return_dict=True);"
        "print(t.decode(m.generate(**ids, max_new_tokens=8)[0])); assert 'llmtuner' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(run_of_all_steps / "chat_model")], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "你好" in result.stdout


# ------------------------------------------------------------------------------------------------------- two processes
def test_two_machines_train_merge_and_agree(run_of_all_steps, tmp_path):
    """Two wrappers of one process each, as on two machines, meet over loopback; their eval loss is that of one process."""
    work = tmp_path / "work"
    shutil.copytree(run_of_all_steps, work, ignore=shutil.ignore_patterns("step5*", "step6*", "step7*", "chat_model"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {
        **os.environ,
        "WORK_DIR": str(work),
        "NNODES": "2",
        "NPROC_PER_NODE": "1",
        "MASTER_PORT": port,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
    }
    command = ["bash", str(ROOT / "step5_train_pt_multi_gpu.sh"), *FEW]
    machines = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**environment, "NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for machine in machines:
        output, _ = machine.communicate(timeout=300)
        assert machine.returncode == 0, output[-4000:]
    assert (work / "step5_pt_merged" / "model.safetensors").is_file()
    one, two = (metrics_of(directory, "step5") for directory in (run_of_all_steps, work))
    assert two["steps"] == one["steps"]
    assert two["tokens"] == pytest.approx(one["tokens"], rel=0.01)
    assert two["eval_loss"]["last"] == pytest.approx(one["eval_loss"]["last"], rel=0.02)
    lines = (work / "step5_pt_adapter" / "trainer_log.jsonl").read_text().splitlines()
    bits = [line["eval_bits_per_byte_ja"] for line in map(json.loads, lines) if "eval_loss" in line]
    assert bits[0] == pytest.approx(one["bits_per_byte"]["before"]["ja"], rel=0.01)  # each has read half of the texts


# --------------------------------------------------------------------------------------------- one part after the other
def test_staged_recipe_trains_embeddings_then_lora(run_of_all_steps, tmp_path):
    """Each half makes half of the steps: embeddings alone, merged; then LoRA alone on top of what came out."""
    from safetensors import safe_open

    work = tmp_path / "work"
    shutil.copytree(run_of_all_steps, work, ignore=shutil.ignore_patterns("step5*", "step6*", "step7*", "chat_model"))
    words = ["--staged", "--max_steps", "8", "--eval_steps", "4", "--save_steps", "4", "--max_eval_samples", "4"]
    result = start("step5", tmp_path, *words, CORPUS_DIR=run_of_all_steps / "corpus")  # tokenized there already
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    metrics = metrics_of(work, "step5")
    assert metrics["steps"] == metrics["embeddings_only"]["steps"] == 4
    (work / "metrics" / "step5.json").unlink()  # as if it had been interrupted at the very end
    again = start("step5", tmp_path, *words, CORPUS_DIR=run_of_all_steps / "corpus")
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-4000:]
    for name in ("embeddings", "pt"):
        assert f"resuming from {work}/step5_{name}_adapter/checkpoint-4" in again.stdout
    assert metrics_of(work, "step5")["bits_per_byte"] == metrics["bits_per_byte"]
    first, second = (work / f"step5_{name}_adapter" for name in ("embeddings", "pt"))
    log = [json.loads(line) for line in (first / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert metrics["eval_loss"]["last"] < metrics["eval_loss"]["first"] == pytest.approx(losses[-1], rel=0.01)
    assert losses[-1] < 0.95 * losses[0]
    for adapter in (first, second):
        assert [path.name for path in adapter.glob("checkpoint-*")] == ["checkpoint-4"]

    def tensors_of(file):
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118

    matrices = {"model.embed_tokens.weight", "lm_head.weight"}
    assert tensors_of(first / "model.safetensors").keys() == matrices
    lora = tensors_of(second / "adapter_model.safetensors")
    assert lora
    assert all(".lora_" in name and "embed_tokens" not in name and "lm_head" not in name for name in lora)
    zero, taught, merged = (
        tensors_of(work / name / "model.safetensors")
        for name in ("step3_zero", "step5_embeddings_merged", "step5_pt_merged")
    )
    assert {name for name in zero if not taught[name].equal(zero[name])} == matrices
    changed = {name for name in zero if not merged[name].equal(taught[name])}
    assert changed
    assert all("_proj" in name for name in changed)
