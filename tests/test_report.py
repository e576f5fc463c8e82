"""The report: what a run's metrics prove, and the page that shows them, up to how a browser lays it out."""

import copy
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import opened
from jinja2 import UndefinedError

from llmtuner.console import UserError
from llmtuner.report import environment as surroundings
from llmtuner.report import page
from llmtuner.report.checks import percent, run_checks
from llmtuner.report.environment import environment
from llmtuner.report.page import Step, write_report

ROOT = Path(__file__).resolve().parent.parent
ATTACK = "<script>alert(1)</script>"
STEPS = [
    Step("step1", "step1_train_tokenizer.py", "learns pieces", ("corpora",), "pieces"),
    Step("step2", "step2_merge_tokenizer.py", "merges them", ("base tokenizer", "pieces"), "merged tokenizer"),
    Step("step3", "step3_resize_model.py", "grows the model", ("base model", "merged tokenizer"), "Zero model"),
    Step("step4", "step4_test_zero.py", "tests it", ("Zero model",), "zero test"),
    Step("step5", "step5_train_pt_single_gpu.py", "pretrains", ("Zero model", "mix"), "pretrained model"),
    Step("step6", "step6_train_sft_single_gpu.py", "tunes", ("pretrained model", "instructions"), "chat model"),
    Step("step7", "step7_eval_chat.py", "evaluates", ("chat model",), "report"),
]
MODELS = ("base", "zero", "pretrained", "chat")
SENTENCE = ["▁", "私", "‹E3›", "‹81›", "‹AF›", " ", ATTACK]
CANDIDATE = {"longest_loop": 9, "mean_loop": 1.5, "finished_ratio": 0.5, "tokens_per_second": 1234.5}
CONFUSION = {"line_pass_rate": 0.99, "lines": 300, "undecided_lines": 5, "responses": 198, "undecided_responses": 2}
METRICS = {
    "step1": {"skipped": 0, "new_pieces": 900, "input_bytes": 2_961_403},
    "step2": {
        "special_ids_kept": True,
        "unreachable_tokens": 0,
        "added_pieces": 900,
        "changed_texts": {"zh": 0, "en": 0},
        "texts": {"ja": 104, "zh": 96, "en": 95},
        "token_ratio": {"ja": 0.2684},
        "segmentations": {
            "ja": {"text": "私は", "before": SENTENCE, "after": [" 私は"]},
            "zh": {"text": "柳树", "before": [" 柳", "树"], "after": [" 柳", "树"]},
            "en": {"text": "a b", "before": [" a", " b"], "after": [" a", " b"]},
        },
    },
    "step3": {"old_rows": 2432, "new_rows": 3328, "old_rows_identical": True, "old_logits_max_diff": 1e-6},
    "step4": {
        "zh": {"total": 60, "identical": 60},
        "en": {"total": 50, "identical": 50},
        "ja": {"total": 60, "correct": 0},
        "tokens_per_character": {
            "base": {"ja": 2.4484, "zh": 0.9, "en": 0.4},
            "zero": {"ja": 0.6572, "zh": 0.9, "en": 0.4},
        },
    },
    "step5": {
        "tokens": 798_720,
        "padding_ratio": 0.00124,
        "bits_per_byte": {"before": {"ja": 3.6648}, "after": {"ja": 0.3183}},
        "data": {
            "wikipedia_ja": {"target_ratio": 0.64, "ratio": 0.65},
            "aozora_ja": {"target_ratio": 0.36, "ratio": 0.35},
        },
    },
    "step6": {
        "tokens": 1_454_032,
        "padding_ratio": 0.0499,
        "train_loss": {"first": 2.0349, "last": 0.1753},
        "eval_loss": {"first": 1.9952, "last": 0.2514},
        "data": {"dolly_ja": {"target_ratio": None, "ratio": 1.0}},
    },
    "step7": {
        "accuracy": {
            model: {"zh": 1.0, "en": 0.995, "ja": 0.0 if model == "base" else 0.96, "ja_unseen": None}
            for model in MODELS
        },
        "bits_per_byte": {model: {"ja": 13.9787, "zh": 0.6136, "en": 0.6351} for model in MODELS},
        "bits_per_byte_interval": {model: {"ja": [13.5, 14.25]} for model in MODELS},
        "agreement": {model: {"zh": {"identical": 0.335, "similar": 0.7812}} for model in MODELS},
        "language_confusion": {model: {"ja": CONFUSION | {"response_pass_rate": 0.9996}} for model in MODELS},
        "repetition": {model: {"ja": 0.1845} for model in MODELS},
        "free_answers": {model: {**CANDIDATE, "repeated_4gram_ratio": 0.1845} for model in MODELS},
        "generation": {
            "candidates": {
                "greedy": {
                    "settings": {"do_sample": False},
                    **CANDIDATE,
                    "repeated_4gram_ratio": 0.2,
                    "accuracy": None,
                },
                "penalty": {
                    "settings": {"repetition_penalty": 1.1},
                    **CANDIDATE,
                    "repeated_4gram_ratio": 0.2,
                    "accuracy": 0.9,
                },
            },
            "chosen": "penalty",
        },
    },
    "suite_ja_chat": {
        "suite": "ja",
        "model": "/models/chat_model",
        "harness": "0.4.13",
        "limit": 50,
        "tasks": {"jnli": {"acc": 0.31, "acc_stderr": 0.066, "n": 50, "few_shot": 3}},
    },
}
LOOP = "同じことを何度も言う。"
ANSWERS = [
    {"group": "ja", "language": "ja", "question": f"同じ{number}？", "right": "答え"}
    | dict.fromkeys(MODELS, "答えは山。")
    for number in range(4)
] + [
    {
        "group": "ja",
        "language": "ja",
        "question": ATTACK,
        "right": "木",
        "base": "no",
        "zero": "",
        "pretrained": LOOP * 3,
    }
    | {"chat": f"答えは木。{ATTACK}\u2028{'X' * 300}"},
    {"group": "ja_free", "language": "ja", "question": "話して。", "right": None} | dict.fromkeys(MODELS, "はい\ud800"),
]
LOG = [
    {"step": 1, "loss": 9.0, "learning_rate": 1e-4, "tokens_per_second": 900.0},
    {"step": 2, "loss": 7.0, "learning_rate": 2e-4, "tokens_per_second": 950.0},
    {"step": 3, "loss": 6.0, "learning_rate": 1e-4, "tokens_per_second": 910.0},
    {"step": 3, "eval_loss": 6.5},
]


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


def put(work_dir, metrics):
    shutil.rmtree(work_dir / "metrics", ignore_errors=True)
    (work_dir / "metrics").mkdir()
    for name, content in metrics.items():
        (work_dir / "metrics" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def report(work_dir, **facts):
    return write_report(work_dir, STEPS, facts).read_text(encoding="utf-8")


def changed(path, value):
    """`METRICS` with another value in one place; None takes the place away."""
    metrics = copy.deepcopy(METRICS)
    *names, last = path.split("/")
    place = metrics
    for name in names:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return metrics


# -------------------------------------------------------------------------------------------------------------- claims
def test_a_run_that_keeps_every_promise():
    made = run_checks(METRICS)
    assert all(check.passed for check in made)
    count = {step.name: sum(check.step == step.name for check in made) for step in STEPS}
    assert count == {"step1": 1, "step2": 5, "step3": 2, "step4": 2, "step5": 3, "step6": 2, "step7": 5}
    assert len({(check.step, check.text) for check in made}) == len(made)


@pytest.mark.parametrize(
    ("path", "value", "step", "figure"),
    [
        ("step1/skipped", 1, "step1", "1 skipped"),
        ("step2/special_ids_kept", False, "step2", "moved"),
        ("step2/unreachable_tokens", 3, "step2", "3 dead pieces"),
        ("step2/changed_texts/zh", 7, "step2", "7 of 96 changed"),
        ("step2/changed_texts/en", 7, "step2", "7 of 95 changed"),
        ("step2/token_ratio/ja", 1.0, "step2", "100% of before"),
        ("step3/old_rows_identical", False, "step3", "changed"),
        ("step3/old_logits_max_diff", 1.1e-6, "step3", "largest difference 1e-06"),
        ("step3/old_logits_max_diff", float("nan"), "step3", "largest difference nan"),
        ("step4/zh/identical", 59, "step4", "59 of 60 identical"),
        ("step4/en/identical", 49, "step4", "49 of 50 identical"),
        ("step5/bits_per_byte/after/ja", 3.6648, "step5", "3.665 → 3.665 bits per byte"),
        ("step5/data/aozora_ja/ratio", 0.3499, "step5", "at most 1 points off (aozora_ja)"),
        ("step5/padding_ratio", 0.05, "step5", "5% padding"),
        ("step6/padding_ratio", 0.05, "step6", "5% padding"),
        ("step6/eval_loss/last", 1.9952, "step6", "held-out loss 1.995 → 1.995"),
        ("step7/accuracy/chat/zh", 0.9499, "step7", "100% → 95% right"),
        ("step7/accuracy/chat/en", 0.9449, "step7", "99.5% → 94.5% right"),
        ("step7/accuracy/chat/ja", 0.5, "step7", "0% → 50% right"),
        ("step7/language_confusion/chat/ja/response_pass_rate", 0.9499, "step7", "99.9% → 95% of answers"),
        ("step7/generation/candidates/penalty/repeated_4gram_ratio", 0.2001, "step7", "20% repeated, greedy 20%"),
    ],
)
def test_a_promise_that_is_missed(path, value, step, figure):
    missed = [check for check in run_checks(changed(path, value)) if not check.passed]
    assert [(check.step, check.figure) for check in missed] == [(step, figure)]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("step7/accuracy/chat/zh", 0.95),
        ("step7/language_confusion/chat/ja/response_pass_rate", 0.95),
        ("step7/accuracy/chat/en", 0.945),
        ("step7/accuracy/chat/ja", 0.505),
        ("step2/token_ratio/ja", 0.999),
    ],
)
def test_a_promise_that_is_just_kept(path, value):
    assert all(check.passed for check in run_checks(changed(path, value)))


@pytest.mark.parametrize(
    ("path", "fewer"),
    [
        ("step1", 1), ("step2/changed_texts", 2), ("step2/texts", 0), ("step3/old_logits_max_diff", 1), ("step4/en", 1),
        ("step5/data", 1), ("step5/bits_per_byte/before", 1), ("step6", 2), ("step6/eval_loss", 0), ("step7/accuracy", 3),
        ("step7/accuracy/base", 2),
        ("step7/language_confusion", 1), ("step7/language_confusion/base", 0),
        ("step7/language_confusion/chat/ja/response_pass_rate", 1),
        ("step7/generation", 1), ("step7/generation/candidates/greedy", 0),
    ],
)  # fmt: skip
def test_what_was_not_measured_is_not_claimed(path, fewer):
    assert len(run_checks(METRICS)) - len(run_checks(changed(path, None))) == fewer


def test_answers_that_nobody_knows_are_not_claimed():
    metrics = copy.deepcopy(METRICS)
    metrics["step7"]["accuracy"] = {model: dict.fromkeys(("zh", "en", "ja")) for model in MODELS}
    metrics["step6"]["eval_loss"] = {"first": None, "last": None}
    made = run_checks(metrics)
    assert len(run_checks(METRICS)) - len(made) == 3
    assert "training loss 2.035 → 0.175" in [check.figure for check in made]


def test_greedy_is_known_without_its_candidate():
    metrics = changed("step7/generation/candidates/greedy", None)
    assert [check.passed for check in run_checks(metrics)][-1] is False  # free answers, greedy: 0.1845
    metrics["step7"]["free_answers"]["chat"]["repeated_4gram_ratio"] = 0.3
    assert [check.passed for check in run_checks(metrics)][-1] is True


# ---------------------------------------------------------------------------------------------------------------- page
class Outline(HTMLParser):
    """What must hold for a page whatever is on it."""

    VOID = ("meta", "wbr", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.ids, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if "id" in attributes:
            self.ids.append(attributes["id"])

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if "id" in dict(attributes):
            self.ids.append(dict(attributes)["id"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_outline(text):
    outline = Outline(text)
    assert outline.headings[0] == 1
    policy = {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"}
    assert ("meta", policy) in outline.tags
    assert outline.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False))
    assert len(set(outline.ids)) == len(outline.ids)
    for tag, attributes in outline.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "base")
        assert not any(name.startswith("on") for name in attributes)
        assert "src" not in attributes
        assert re.match("#|$", attributes.get("href", attributes.get("xlink:href", "")))
        assert tag != "th" or attributes.get("scope") in ("col", "row", "rowgroup")
    for target in re.findall(r'<a href="#([^"]+)"', text):
        assert target in outline.ids
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    assert not re.search(r"@import|url\(", style)
    return outline


def words(text):
    """The page as a person reads it: without tags, on one line."""
    body = text[text.index("<body>") :]
    return re.sub(r"\s+", " ", re.sub(r"<(?!script>|/script>)[^>]*>", "", body)).replace("&nbsp;", " ")


def test_a_run_with_only_step_1(tmp_path):
    put(tmp_path, {"step1": METRICS["step1"]})
    text = report(tmp_path)
    outline = check_outline(text)
    assert words(text).startswith(" ✓ 1 of 1 checks passed")
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
    assert "900 pieces from 3.0 MB of text" in words(text)
    assert re.findall(r'<section id="(\w+)">', text) == ["pipeline", "checks"]
    assert "tiles" not in [attributes.get("class") for _, attributes in outline.tags]


def test_pipeline(work_dir, no_figures):
    text = report(work_dir)
    stages = [words("<body>" + one) for one in re.findall(r'<li class="stage .*?</li>', text, re.DOTALL)]
    assert "3. Grows the model done 2,432 → 3,328 rows step3_resize_model.py takes base model →" in stages[2]
    assert "gives Zero model to step 4 and step 5" in stages[2]
    assert "60 of 60 Chinese and 50 of 50 English answers identical" in stages[3]
    assert "to step" not in stages[3]
    assert "Japanese 3.665 → 0.318 bits per byte, 798,720 tokens" in stages[4]
    assert "held-out loss 1.995 → 0.251, 1,454,032 tokens" in stages[5]
    assert "right answers in Japanese 0% → 96%" in stages[6]
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
    sections = ["pipeline", "checks", "tokens", "models", "generation", "figures", "answers", "suites", "details"]
    assert re.findall(r'<section id="(\w+)">', text) == sections
    assert seen.startswith(" ✓ 20 of 20 checks passed")
    for part in (
        "Profile mini · 7 of 7 steps finished · made 20",
        "Japanese questions answered right 0% → 96%",
        "Tokens per Japanese character 2.45 → 0.66",
        "Japanese 7 → 1 tokens",
        "Chinese 2 → 2 tokens, unchanged",
        "Japanese 13.97913.500–14.250",
        "Chinese 33.5%0.78 alike",
        "Repeated 4-grams 18.4% 18.4%",
        "Answers in the language of their question no line in another Japanese 99.9%99% of lines, 2 undecided",
        "Tokens per second 1,234 1,234",
        "penalty ✓ chosenrepetition_penalty 1.1",
        "jnliacc 0.310 ± 0.066 503",
        "chat_model, at most 50 documents a task, lm_eval 0.4.13",
        "Settings of step 6 3",
        "日本語&#34;, &#34;&lt;script&gt;",
        "bf16true",
        "torch2.13",
    ):
        assert part in seen
    assert "Japanese, unseen" not in seen  # null everywhere
    assert "acc_stderr" not in seen
    assert text.count("<figure ") == len(re.findall('<svg[^>]* role="img"', text)) >= 8


def test_tokens(work_dir, no_figures):
    text = report(work_dir)
    row = re.search(r'<dt>before: 7</dt><dd lang="ja">(.*?)</dd>', text, re.DOTALL)[1]
    pieces = re.findall(r'<span class="(piece|byte)">([^<]*)</span>', row)
    assert [kind for kind, _ in pieces] == ["piece", "piece", "byte", "byte", "byte", "piece", "piece"]
    assert [piece for _, piece in pieces][2:] == ["‹E3›", "‹81›", "‹AF›", "␣", "&lt;script&gt;alert(1)&lt;/script&gt;"]


def test_answers(work_dir, no_figures):
    text = report(work_dir)
    cards = re.findall(r'<article class="question">.*?</article>', text, re.DOTALL)
    assert len(cards) == 4  # three of five, and the free one
    first = cards[0]  # the one on which the models differ, though it is the last of its group
    assert '<h4 lang="ja">&lt;script&gt;alert(1)&lt;/script&gt;</h4>' in first
    assert 'A right answer names <b lang="ja">木</b>' in first
    assert f'<dd lang="ja">{LOOP}<mark>{LOOP * 2}</mark></dd>' in first
    assert first.count("✓ right") == 1
    assert re.search(r'class="right">\s*<dt>Chat', first)
    assert '<dd lang="en">no</dd>' in first
    assert "(nothing)" in first
    assert "A right answer" not in cards[3]
    assert "はい?" in cards[3]  # half a surrogate pair


def test_answers_are_marked_as_they_were_counted(work_dir, no_figures):
    """Whose name is whose stands in the questions file alone; a run of an earlier version is marked without it."""
    row = {"group": "ja", "language": "ja", "question": "ミナの職業は？", "right": "かじ屋", "wrong_values": []}
    row |= dict.fromkeys(MODELS, "ナギサの仕事はかじ屋です。")
    for marks, shown in ({}, 4), ({"correct": dict.fromkeys(MODELS, False) | {"base": True}}, 1):
        (work_dir / "answers.jsonl").write_text(json.dumps(row | marks), encoding="utf-8")
        assert report(work_dir).count("✓ right") == shown


@pytest.mark.parametrize(
    ("share", "text"),
    [(1, "100%"), (1.0, "100%"), (0.9999, "99.9%"), (0.9996, "99.9%"), (0.995, "99.5%"), (0.0004, "0.04%"), (0, "0%")],
)
def test_100_percent_is_all(share, text):
    assert percent(share) == text


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


def test_missed_checks_are_named_first(work_dir, no_figures):
    put(work_dir, changed("step2/unreachable_tokens", 3))
    text = report(work_dir)
    seen = words(text)
    assert text.count('aria-label="missed">✗<') == 1
    assert text.count('aria-label="passed">✓<') == 19
    assert seen.startswith(" ✗ 19 of 20 checks passed; missed: Every piece can be produced (step 2: 3 dead pieces)")
    assert "missed: 3 dead pieces" in seen


def every_place(tree, path=()):
    for name, value in tree.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from every_place(value, (*path, name))


TOGETHER = ("total", "identical", "similar", "before", "after")  # these come in pairs, and so do they go


def test_no_field_is_needed(tmp_path, no_figures):
    """Whatever an older run lacks, the page is made without it."""
    for path in every_place(METRICS):
        if path[-1] not in TOGETHER:
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
        page._page().environment.from_string("{{ missing }}").render()


def test_the_report_needs_no_torch():
    program = "import sys, llmtuner.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


# --------------------------------------------------------------------------------------------------------- environment
def test_environment():
    facts = environment()
    assert facts["versions"]["Python"] == sys.version.split()[0]
    assert re.fullmatch(r"\d+\.\d+.*", facts["versions"]["transformers"])
    assert int(facts["machine"]["cores"]) >= 1
    assert all(isinstance(value, str) for section in facts.values() for value in section.values())


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(surroundings, "ROOT", tmp_path.resolve())
    assert "code" not in environment()
    git("init", "-q")
    assert "code" not in environment()  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert environment()["code"]["commit"] == commit
    (tmp_path / "file").write_text("2")
    assert environment()["code"]["commit"] == f"{commit} with changes"
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(surroundings, "ROOT", tmp_path.resolve() / "inside")  # unpacked in somebody else's repository
    assert "code" not in environment()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "code" not in environment()


# ------------------------------------------------------------------------------------------------------------- browser
@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (600, "light"), (390, "light"), (390, "dark")]
)
def test_in_a_browser(browser, work_dir, width, scheme):
    long = {"unbroken": "x" * 500, "日本語": "長" * 300}
    path = write_report(work_dir, STEPS, {"facts": long, "ｆ" * 200: {"a" * 300: "b"}})
    tab, problems, requests = opened(browser, path.as_uri(), width, scheme)
    for summary in tab.locator("summary").all():
        summary.click()
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    whole = "[...document.querySelectorAll('.models, .cards')].every(t => t.scrollWidth <= t.parentElement.clientWidth)"
    assert width == 600 or tab.evaluate(whole)
    assert tab.locator("svg[role=img]").count() == tab.locator("figure").count() >= 8
    assert all(
        box["width"] > 200 and box["height"] > 50 for box in (svg.bounding_box() for svg in tab.locator("svg").all())
    )
    columns = {round(figure.bounding_box()["x"]) for figure in tab.locator("figure").all()}
    assert len(columns) == (2 if width == 1280 else 1)
    assert tab.get_by_text("Before and after", exact=True).is_visible()
    assert tab.locator(".models tbody tr:not(.group)").count() == 13
    assert tab.locator(".answers dd").count() == 16
    assert tab.get_by_role("heading", name=ATTACK).is_visible()
    assert tab.locator("script").count() == 0
    assert tab.evaluate(LEAST_CONTRAST) >= 4.5
    assert requests == [path.as_uri()]
    assert problems == []
    tab.close()


# The least contrast (WCAG 2.2, 1.4.3) of a text and the first colour behind it, outside of drawings.
LEAST_CONTRAST = """() => {
  const light = colour => colour.slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const parse = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
  const solid = colour => colour.length >= 3 && (colour.length === 3 || colour[3] === 1);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = parse(getComputedStyle(element).backgroundColor);
      if (solid(colour)) return colour;
    }
    return [255, 255, 255];
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let least = 21;
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || element.closest("svg")) continue;
    const [low, high] = [light(parse(getComputedStyle(element).color)), light(behind(element))].sort((a, b) => a - b);
    least = Math.min(least, (high + 0.05) / (low + 0.05));
  }
  return least;
}"""
