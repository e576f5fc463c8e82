"""The report's page: each step's part, missing or damaged files, and untrusted text."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from llmtuner.console import UserError
from llmtuner.eval.ladder import ENTITIES
from llmtuner.report import page
from llmtuner.report.page import write_report
from tests.helpers import ROOT
from tests.reports import ANSWERS, ATTACK, LADDER, LADDER_CELL, LOG, LOOP, METRICS, MODELS, STEPS, changed, put
from tests.unit.report.outline import check_outline, words

EARLIER_KEYS = {
    "total": "asked",
    "ratio": "share",
    "target_ratio": "planned_share",
    "padding_ratio": "padding_share",
    "unreachable_tokens": "dead_pieces",
    "repeated_4gram_ratio": "repeated",
    "finished_ratio": "ended",
}


@pytest.fixture
def work_dir(tmp_path):
    """A run with everything."""
    put(tmp_path, METRICS)
    for name in page.RUNS.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
        (tmp_path / name / "training_args.json").write_text(
            json.dumps({"stage": "pt", "dataset": ["日本語", ATTACK], "bf16": True})
        )
    lines = "".join(json.dumps(row, ensure_ascii=False).replace("\ud800", r"\ud800") + "\n" for row in ANSWERS)
    (tmp_path / "answers.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes time, and test_figures.py looks at it."""
    monkeypatch.setattr(page, "build_figures", lambda *_: [])


def report(work_dir, **facts):
    return write_report(work_dir, STEPS, facts).read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------- page
def test_a_run_with_only_step_1(tmp_path):
    put(tmp_path, {"step1": METRICS["step1"]})
    text = report(tmp_path)
    outline = check_outline(text)
    assert words(text).startswith(
        " ChatGLM3-Japanese: what the run gained and kept 1 of 7 steps finished"
    )  # and no check
    assert re.findall(r'<li class="stage ([a-z ]+)">', text) == [
        "done",
        "next",
        "open",
        "open aside",
        "open",
        "open",
        "open",
    ]
    assert "1 of 7 steps finished" in words(text)
    assert "900 new tokens from 3.0 MB of text" in words(text)
    assert re.findall(r'<section id="(\w+)">', text) == ["pipeline"]
    assert "tiles" not in [attributes.get("class") for _, attributes in outline.tags]


def test_suites_show_chance_and_what_is_lost(tmp_path):
    def suite(model, marks, interval, **more):
        scores = {"acc": marks.count("1") / 4, "acc_interval": interval, "acc_chance": 0.5, "n": 4, "few_shot": 0}
        questions = {"jnli": {"digest": "x", "correct": {"acc": marks}}}
        return {"suite": "ja", "model": model, "tasks": {"jnli": scores | more}, "questions": questions}

    base, chat = suite("base", "1111", [0.6, 1.0]), suite("chat", "1010", [0.1, 0.9], truncated=3)
    put(tmp_path, {"step1": METRICS["step1"], "suite_ja_base": base, "suite_ja_chat": chat})
    seen = words(report(tmp_path))
    assert "jnliacc 1.000 (0.600 to 1.000) 0.500 40" in seen
    assert (
        "jnliacc 0.500 (0.100 to 0.900) 0.500: the model is no better 4, 3 of which lost their beginning050.0 % ("
        in seen
    )
    assert seen.count("Lost of the base model's score") == 1


def test_pipeline(work_dir, no_figures):
    text = report(work_dir)
    stages = [words("<body>" + one) for one in re.findall(r'<li class="stage .*?</li>', text, re.DOTALL)]
    assert (
        "3. Resize the embeddings done 2,432 → 3,328 embedding rows step3_resize_model.py takes base model →"
        in stages[2]
    )
    assert "gives Zero model to step 4 and step 5" in stages[2]
    assert "60 of 60 Chinese and 50 of 50 English answers identical" in stages[3]
    assert "to step" not in stages[3]
    assert "Japanese 3.665 → 0.318 bits per byte, 798,720 tokens" in stages[4]
    assert "held-out loss 1.995 → 0.251, 1,454,032 tokens" in stages[5]
    assert "Japanese accuracy, base to chat model: 0% → 96%" in stages[6]
    assert re.findall(r'class="chip outside">([^<]*)', text) == [
        "corpora",
        "base tokenizer",
        "base model",
        "mix",
        "instructions",
    ]


def test_a_run_with_everything(work_dir):
    text = report(work_dir, profile={"PROFILE": "mini"}, versions={"torch": "2.13"})
    check_outline(text)
    seen = words(text)
    sections = ["pipeline", "checks", "tokens", "models", "generation", "training", "samples", "figures", "answers"]
    sections += ["suites", "details"]
    assert re.findall(r'<section id="(\w+)">', text) == sections
    assert seen.startswith(" ✓ 22 of 22 checks passed")
    for part in (
        "Profile mini · 7 of 7 steps finished · created 20",
        "Japanese questions answered correctly base → chat model 0% → 96%",
        "Tokens per Japanese character base → merged tokenizer 2.45 → 0.66",
        "Japanese bits per byte base → pretrained model 13.98 → 0.32",
        "required: at least −5 points",
        "The chat model answers under the settings it is shipped with (repetition_penalty 1.1), the others greedily.",
        "Japanese5 questions 0%0.0–43.4 ",
        "96%56.6–100.0 ",
        "Japanese 7 → 1 tokens",
        "Chinese 2 → 2 tokens, unchanged",
        "Japanese 13.97913.500–14.250",
        "Chinese 33.5%0.78 similar",
        "Repeated 4-grams 18.4% 18.4%",
        "Answers in the language of the question no line in another Japanese 99.9%99% of lines, 2 undecided",
        "Tokens per second 1,234 1,234",
        "penalty ✓ selectedrepetition_penalty 1.1",
        "jnliacc 0.310 ± 0.066 – 503",
        "chat_model, at most 50 documents per task, lm_eval 0.4.13",
        "Settings of step 6 3",
        "日本語&#34;, &#34;&lt;script&gt;",
        "bf16true",
        "torch2.13",
    ):
        assert part in seen
    assert "Japanese, unseen" not in seen  # null everywhere
    assert "acc_stderr" not in seen
    assert text.count("<figure ") == len(re.findall('<svg[^>]* role="img"', text)) >= 8


def test_ladder(work_dir, no_figures):
    assert "ladder" not in report(work_dir).lower()  # only where it was measured
    put(work_dir, changed("step7/ladder", {"pretrained": LADDER, "chat": LADDER}))
    text = report(work_dir)
    check_outline(text)
    seen = words(text)
    assert '<a href="#ladder">' in text
    share = "25 % (18–33) 80 % (72–86)"
    assert f"told in Japanese Japanese question, Japanese name120 {share} {share} untold, never named" in seen
    assert f"pivot: Chinese answer, Japanese question120 {share}" in seen
    assert text.count('data-label="Chat: names it"') == 3


def test_every_kind_of_entities_keeps_its_name(work_dir, no_figures):
    """None is called like a metric that has another name today: such keys are renamed as they are read."""
    put(work_dir, changed("step7/ladder", {"chat": {kind: {"ja_ja": LADDER_CELL} for kind in ENTITIES}}))
    seen = words(report(work_dir))
    assert all(title in seen for title in ENTITIES.values())


def test_record_of_training(work_dir, no_figures):
    """Step 5 has everything; what step 6 lacks is taken from its log and settings, or left out."""
    seen = words(report(work_dir))
    for part in (
        "Wall time2 h 3 min–",
        "Cost4.10 at 0.5 per device and hour–",
        "Devices4 × NVIDIA GeForce RTX 4090–",
        "Peak memory per device21.34 GB–",
        "Tokens per second910910",
        "Model FLOPs utilization41.3%–",
        "Best checkpointstep 3, eval_bits_per_byte_ja 0.3183 (the last weights are saved)–",
    ):
        assert part in seen
    assert "What it took. Wall time" in seen  # of step 6 it is not known
    put(work_dir, changed("step6/wall_seconds", 15.8) | {"step7": {}})
    assert "What it took: 2 h 3 min in all." in words(report(work_dir))


def test_samples_are_a_strip_of_frames(work_dir, no_figures):
    strips = re.findall(r'<ol class="strip".*?</ol>', report(work_dir), re.DOTALL)
    assert len(strips) == 2  # two prompts
    shown = [int(step) for step in re.findall(r"<b>step (\d+)</b>", strips[0])]
    assert len(shown) == page.MAX_FRAMES
    assert (shown[0], shown[-1]) == (0, 14)
    assert f"14{LOOP}<mark>{LOOP}</mark>" in strips[0]
    (work_dir / "metrics" / "step5.json").unlink()
    lines = [json.dumps({"step": step, "prompt": "河？", "answer": f"{step}."}) + "\n" for step in (0, 5)]
    samples = work_dir / page.RUNS["step5"] / "samples.jsonl"
    samples.write_text("".join(lines) + '{"step": 10, "pro')  # it is being written
    assert "河？ Continued pretraining step 00. step 55. " in words(report(work_dir))


def test_tokens(work_dir, no_figures):
    text = report(work_dir)
    row = re.search(r'<dt>before: 7</dt><dd lang="ja">(.*?)</dd>', text, re.DOTALL)[1]
    pieces = re.findall(r'<span class="(token|byte)">([^<]*)</span>', row)
    assert [kind for kind, _ in pieces] == ["token", "token", "byte", "byte", "byte", "token", "token"]
    assert [piece for _, piece in pieces][2:] == [
        "&lt;0xE3&gt;",
        "&lt;0x81&gt;",
        "&lt;0xAF&gt;",
        "␣",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
    ]


def test_answers(work_dir, no_figures):
    text = report(work_dir)
    cards = re.findall(r'<article class="question">.*?</article>', text, re.DOTALL)
    assert len(cards) == 4  # three of five, and the free one
    first = cards[0]  # the one on which the models differ, though it is the last of its group
    assert '<h4 lang="ja">&lt;script&gt;alert(1)&lt;/script&gt;</h4>' in first
    assert 'A correct answer names <b lang="ja">木</b>' in first
    assert f'<dd lang="ja">{LOOP}<mark>{LOOP * 2}</mark></dd>' in first
    assert first.count("✓ correct") == 1
    assert re.search(r'class="correct">\s*<dt>Chat', first)
    assert '<dd lang="en">no</dd>' in first
    assert "(empty)" in first
    assert "A correct answer" not in cards[3]
    assert "はい?" in cards[3]  # half a surrogate pair


def test_answers_are_marked_as_they_were_counted(work_dir, no_figures):
    """Whose name is whose stands in the questions file alone; a run of an earlier version is marked without it."""
    row = {"group": "ja", "language": "ja", "question": "ミナの職業は？", "right": "かじ屋", "wrong_values": []}
    row |= dict.fromkeys(MODELS, "ナギサの仕事はかじ屋です。")
    for marks, shown in ({}, 4), ({"correct": dict.fromkeys(MODELS, False) | {"base": True}}, 1):
        (work_dir / "answers.jsonl").write_text(json.dumps(row | marks), encoding="utf-8")
        assert report(work_dir).count("✓ correct") == shown


def test_loops_of_the_chat_model_come_first(work_dir, no_figures):
    rows = [
        {"group": "ja_free", "language": "ja", "question": f"問{number}。", "right": None}
        | {model: f"{model}{number}" for model in MODELS}
        for number in range(5)
    ]
    rows[4] |= dict.fromkeys(MODELS, LOOP * 3)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (work_dir / "answers.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert re.findall(r"問\d。", words(report(work_dir))) == ["問4。", "問0。", "問1。"]


def test_wrong_answers_of_the_chat_model_come_first_and_are_marked(work_dir, no_figures):
    rows = [
        {"group": "ja", "language": "ja", "question": f"問{number}。", "right": "山"}
        | {model: f"{model}{number}" for model in MODELS}
        | {"correct": dict.fromkeys(MODELS, False) | {"chat": number != 3}}
        for number in range(5)
    ]
    rows[1]["chat"] = LOOP * 3
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (work_dir / "answers.jsonl").write_text("\n".join(lines), encoding="utf-8")
    text = report(work_dir)
    assert re.findall(r"問\d。", words(text)) == ["問3。", "問1。", "問0。"]
    assert "3 of 5; the chat model answers 1 wrong" in words(text)
    assert (text.count("✗ wrong"), text.count("✓ correct")) == (3 * 3 + 1, 2)


def test_missed_checks_are_named_first(work_dir, no_figures):
    put(work_dir, changed("step2/unreachable_tokens", 3))
    text = report(work_dir)
    seen = words(text)
    assert text.count('aria-label="failed">✗<') == 1
    assert text.count('aria-label="passed">✓<') == 21
    assert seen.startswith(
        " ✗ 21 of 22 checks passed; failed: Every token can be produced (step 2: 3 unreachable tokens)"
    )
    assert "failed: 3 unreachable tokens" in seen


def every_place(tree, path=()):
    for name, value in tree.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from every_place(value, (*path, name))


TOGETHER = ("total", "identical", "similar", "before", "after")  # these come in pairs, and so do they go


def test_no_field_is_needed(tmp_path, no_figures):
    """Whatever an older run lacks, the page is made without it."""
    for path in every_place(METRICS):
        if path[-1] not in TOGETHER and not {"zero", "pretrained"} & {*path[2:]}:  # two models stand for all four
            put(tmp_path, changed("/".join(path), None))
            check_outline(report(tmp_path))


def test_of_steps_that_have_not_finished_only_the_log_is_shown(work_dir, monkeypatch):
    drawn = {}
    monkeypatch.setattr(page, "build_figures", lambda metrics, logs: drawn.update(logs) or [])
    for step in ("step5", "step7"):
        (work_dir / "metrics" / f"{step}.json").unlink()
    text = report(work_dir)
    assert drawn == {"step5": LOG, "step6": LOG}
    assert "answers" not in re.findall(r'<section id="(\w+)">', text)
    assert "Settings of step 6" in words(text)
    assert "Settings of step 5" not in words(text)


def test_no_step_has_finished(tmp_path):
    with pytest.raises(UserError, match=r"no step has finished in .* Run step1_train_tokenizer\.py first"):
        report(tmp_path)
    put(tmp_path, {"suite_ja_chat": METRICS["suite_ja_chat"]})
    with pytest.raises(UserError, match="no step has finished"):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["metrics/step3.json", "answers.jsonl", "step5_pt_adapter/training_args.json"])
def test_damaged_file(work_dir, name, no_figures):
    before = report(work_dir)
    (work_dir / name).write_text('{"half": ')
    with pytest.raises(UserError, match=re.escape(str(work_dir / name))):
        report(work_dir)
    assert (work_dir / "report.html").read_text(encoding="utf-8") == before
    assert not list(work_dir.glob("*.partial"))


def test_nothing_half_written(work_dir, monkeypatch, no_figures):
    before = report(work_dir)

    def disk_is_full(path, *_, **__):
        path.write_bytes(b"<!doctype")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", disk_is_full)
    with pytest.raises(UserError, match="disk filled up"):
        write_report(work_dir, STEPS, {})
    assert (work_dir / "report.html").read_text(encoding="utf-8") == before
    assert not list(work_dir.glob("*.partial"))


def test_a_name_that_the_template_does_not_get_is_an_error():
    with pytest.raises(UndefinedError):
        page.template("page.html").environment.from_string("{{ missing }}").render()


def test_the_report_needs_no_torch():
    program = "import sys, llmtuner.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_a_run_of_an_earlier_version_gives_the_same_page(work_dir, no_figures):
    """Its metrics, log and settings have other names."""

    def without_time(text):
        return re.sub(r"<time.*?</time>", "", text)

    expected = without_time(report(work_dir))
    for path in (work_dir / "metrics").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r'"accuracy": (?={)', '"exact": ', text).replace('"accuracy"', '"right"')
        for new, old in EARLIER_KEYS.items():
            text = text.replace(f'"{new}"', f'"{old}"')
        path.write_text(text, encoding="utf-8")
    assert {"exact", "free_answers"} <= json.loads((work_dir / "metrics" / "step7.json").read_text()).keys()
    for name in page.RUNS.values():
        (work_dir / name / "trainer_log.jsonl").rename(work_dir / name / "log.jsonl")
        (work_dir / name / "training_args.json").rename(work_dir / name / "settings.json")
    assert without_time(report(work_dir)) == expected


def test_a_page_of_another_language_names_no_other(tmp_path):
    """Only Japanese of the metrics is called Khmer, and Chinese is left out."""

    def renamed(value):
        if isinstance(value, dict):
            codes = {"ja": "km", "ja_unseen": "km_unseen", "ja_free": "km_free"}
            return {codes.get(name, name): renamed(item) for name, item in value.items() if name != "zh"}
        return value

    metrics = renamed({name: values for name, values in METRICS.items() if not name.startswith("suite")})
    metrics["step1"]["languages"] = {"km": "Khmer", "en": "English"}
    metrics["step7"]["accuracy"]["chat"]["km_unseen"] = 0.5
    put(tmp_path, metrics)
    text = words(report(tmp_path))
    assert "Japanese" not in text
    assert "Chinese" not in text
    for part in (
        "Adding Khmer: what the run gained and kept",
        "An English chat model learns Khmer.",
        "Khmer takes 26.8% of the tokens",
        "50 of 50 English answers identical",
        "English texts are tokenized as before",
        "Khmer is predicted better than by the base model",
        "Khmer questions are answered in Khmer",
        "Khmer, unseen",
        "asked in Khmer about facts that only English texts state",
    ):
        assert part in text, part
