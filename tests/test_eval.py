"""Marking of answers, repetition, generation settings, and bits per byte against sums done by hand."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from llmtuner.console import UserError
from llmtuner.data.template import Template
from llmtuner.eval import evaluate
from llmtuner.eval.bits_per_byte import Windows, bits_per_byte, bootstrap_ci, document_bits
from llmtuner.eval.evaluate import language_confusion_by_group, save_generation_config, select_generation_config
from llmtuner.eval.generation import GeneratedAnswer, GeneratedAnswers, generate_answers
from llmtuner.eval.language import answers_in_language, in_language, language_confusion
from llmtuner.eval.questions import Question, accuracy, agreement, is_correct, read_questions
from llmtuner.eval.repetition import find_loops, repeated_ngrams, repetition_metrics
from llmtuner.model.loading import load_for_evaluation, load_model
from llmtuner.tokenizer.fast import encode, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("language", "value", "wrong", "answer", "right"),
    [
        ("ja", "お茶", ("りんご",), "青川はお茶で知られています。", True),
        ("ja", "お茶", ("りんご",), "青川はお茶とりんごで知られています。", False),
        ("ja", "青川", (), "青川。", False),  # could be Chinese
        ("zh", "茶叶", ("苹果",), "青川以茶叶闻名。", True),
        ("zh", "茶叶", ("苹果",), "青川は茶叶。", False),
        ("ja", "4年", ("34年",), "およそ34年です。", False),
        ("ja", "1月", ("11月",), "11月です。", False),
        ("ja", "11月", ("1月",), "11月です。", True),
        ("en", "snow fox", (), "Snow foxes? The Snow Fox.", True),
        ("en", "tea", (), "They drink steam.", False),
        ("en", "1931", (), "It was in 1931.", True),
        # ASCII letters and digits bound a word; Han and kana do not.
        ("zh", "H2O", (), "水的化学式是H2O。", True),
        ("zh", "H2O", (), "水的化学式是H2O2。", False),
        ("zh", "Au", (), "金的元素符号是Au，银的是Ag。", True),
        ("ja", "C++", (), "言語はC++です。", True),
        ("en", "C++", (), "It is written in C++.", True),
        ("en", "C++", (), "It is written in C.", False),
        ("en", "Paris", (), "The Parisian way.", False),
        # numbers
        ("ja", "100", (), "水は100度で沸騰します。", True),
        ("ja", "100", (), "水は100℃で沸騰します。", True),
        ("ja", "100", (), "長さは100kmです。", True),
        ("ja", "100", (), "100", True),  # a number is in no language
        ("ja", "100", (), "1000度です。", False),
        ("ja", "100", (), "1,100度です。", False),
        ("ja", "100", (), "100.5度です。", False),
        ("ja", "100", (), "マイナスではなく-100度です。", False),
        ("ja", "100", (), "100万度です。", False),
        ("en", "100", (), "About 100 million degrees.", False),
        ("en", "1970", (), "In the 1970s.", False),
        ("en", "2005", (), "From 2000-2005.", True),
        ("zh", "2005年", (), "从2000年-2005年。", True),
        ("ja", "1000", (), "1,000度です。", True),
        ("ja", "1,000", (), "1000.0度です。", True),
        ("ja", "百", (), "百度です。", True),
        ("ja", "100", (), "百度です。", False),  # numerals are text
        ("en", "4", (), "There are 42.", False),
        ("en", "4", (), "There are 34.", False),
        ("en", "4", (), "It is 4.5.", False),
        ("en", "4", (), "It is 1.4.", False),
        ("en", "4", (), "It is 4½.", False),
        ("en", "4", (), "A4.", False),
        ("en", "4", (), "There are 4.", True),
        ("en", "4.5", (), "It is 4.50 m.", True),
        # NFKC
        ("ja", "H2O", (), "水はＨ２Ｏです。", True),
        ("ja", "H2O", (), "水はH₂Oです。", True),
        ("ja", "4年", ("34年",), "４年です。", True),
        ("ja", "4年", ("34年",), "３４年です。", False),
        ("ja", "ダンス", (), "ﾀﾞﾝｽが好きです。", True),
        ("zh", "2000年", (), "出版于 2000 年。", True),
        # the language, line by line
        ("ja", "お茶", (), "青川はお茶です。\n青川以茶叶闻名。", False),
        ("ja", "富士山", (), "富士山", False),  # could be Chinese
        ("ja", "東京駅", (), "東京駅", True),  # 駅 could not
        ("zh", "北京", (), "The capital is Beijing (北京).", False),
        ("en", "Tokyo", (), "Tokyo (東京)", False),
    ],
)
def test_marking(language, value, wrong, answer, right):
    assert is_correct(Question("g", language, "?", value, wrong), answer) is right


WORLD = (
    ("ミナ", "米娜", "Mina"),
    ("ナギサ", "渚沙", "Nagisa"),
    ("ルカ", "卢卡", "Luca"),
    ("ナミイルカ", "浪海豚", "wave dolphin"),
)


@pytest.mark.parametrize(
    ("value", "answer", "right"),
    [
        ("かじ屋", "ミナの仕事はかじ屋です。", True),
        ("かじ屋", "ナギサの仕事はかじ屋です。", False),
        ("かじ屋", "Nagisaの仕事はかじ屋です。", False),
        ("かじ屋", "かじ屋です。", True),  # of whom else
        ("かじ屋", "Mina（米娜）の仕事はかじ屋です。", True),
        ("かじ屋", "ナギサと同じく、ミナの仕事もかじ屋です。", True),
        ("かじ屋", "ＮＡＧＩＳＡの仕事はかじ屋です。", False),
        ("ナギサ", "友だちはナギサです。", True),  # the value is no other subject
        ("ルカ", "ミナの友だちはルカです。", True),
        ("ルカ", "ミナの友だちはナミイルカです。", False),  # a name inside a longer one
    ],
)
def test_an_answer_about_another_subject_is_wrong(value, answer, right):
    names = tuple(name for subject in WORLD for name in subject)
    question = Question("ja", "ja", "ミナの職業は何だっけ？", value, subject=WORLD[0], all_subjects=names)
    assert is_correct(question, answer) is right
    assert is_correct(Question("ja", "ja", question.question, value), answer)  # nothing is known of subjects


def test_subjects_of_a_questions_file(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"group": "ja", "language": "ja", "question": "？", "value": "かじ屋", "subject": WORLD[0]},
        {"group": "ja", "language": "ja", "question": "誰？", "subject": WORLD[2]},
        {"group": "zh", "language": "zh", "question": "？"},
        {"subjects": WORLD[:2]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    first, *others = read_questions(path, 1)
    assert first.subject == WORLD[0]
    assert set(first.all_subjects) == {name for subject in WORLD[:3] for name in subject}
    assert [(question.group, question.subject) for question in others] == [("zh", ())]
    assert not is_correct(first, "ルカの仕事はかじ屋です。")  # not listed, but asked about


@pytest.mark.parametrize(
    ("line", "ja", "zh", "en"),
    [
        ("ミナの仕事はかじ屋です。", True, False, False),
        ("米娜是铁匠。", False, True, False),
        ("我不知道。", False, True, False),
        ("富士山", None, True, False),
        ("富士山。", None, True, False),
        ("東京駅", True, False, False),
        ("我喜歡在圖書館裡看書", False, True, False),  # traditional
        ("日本最高的山峰叫做富士山", False, True, False),  # no character tells, but it is no name
        ("Mina is a blacksmith.", False, False, True),
        ("ミナ works as a blacksmith in Milne.", False, False, False),
        ("H2O", None, None, True),
        ("1,931", None, None, None),
        ("…！", None, None, None),
        ("Привет", False, False, False),
        ("ｶﾅ", True, False, False),
    ],
)
def test_language_of_a_line(line, ja, zh, en):
    assert [in_language(line, language) for language in ("ja", "zh", "en")] == [ja, zh, en]
    assert in_language(line, "fr") is (None if line in ("1,931", "…！") else True)


def test_language_confusion_counts_lines_and_answers():
    answers = ["山です。\n\n川です。", "山です。\n这是山。", "富士山", "", "```\nprint(1)\n```\n関数です。"]
    assert [answers_in_language(answer, "ja") for answer in answers] == [True, False, None, None, True]
    assert language_confusion(answers, ["ja"] * 5) == {
        "line_pass_rate": 0.8,
        "lines": 5,
        "undecided_lines": 1,
        "response_pass_rate": 0.6667,
        "responses": 3,
        "undecided_responses": 2,
    }
    nothing = language_confusion(["7"], ["en"])
    assert nothing["line_pass_rate"] is nothing["response_pass_rate"] is None


def test_language_confusion_of_each_group():
    questions = [
        Question("zh", "zh", "你是谁"),
        Question("zh", "zh", "把“今天天气很好”翻译成英文。", answer_language="en"),
        Question("ja_free", "ja", "話して。"),
    ]
    found = language_confusion_by_group(questions, ["我是米娜。", "The weather is fine today.", "The weather."])
    assert {group: one["response_pass_rate"] for group, one in found.items()} == {"zh": 1.0, "ja_free": 0.0}
    assert found["zh"]["responses"] == 2


def test_all_is_said_only_of_all():
    questions = [Question("en", "en", "?", "tea")] * 30_000
    assert accuracy(questions, ["tea"] * 29_999 + ["no"], "en") == 0.9999
    assert accuracy(questions, ["tea"] * 30_000, "en") == 1


def test_wrong_value_in_the_question_does_not_count():
    question = Question("ja", "ja", "雪山のユキギツネは何色ですか？", "白", ("雪山",))
    assert is_correct(question, "雪山のユキギツネは白です。")


def test_repetition():
    assert repeated_ngrams(["あいうえおかきくけこ"]) == 0
    assert repeated_ngrams(["あいうえあいうえ"]) == pytest.approx(1 / 5)
    assert repeated_ngrams(["", "あ"]) == 0


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("", []),
        ("abcabcabcabc", [(3, 12)]),
        ("xyabcdefghabcdefgh!", [(10, 18)]),
        ("xyabcdefgabcdefg!", []),  # seven characters are a phrase
        ("さまざまな色。", []),
        ("あああああああああああ", [(1, 11)]),
        ("その歌は歌です。その歌は歌です。その歌は歌です。", [(8, 24)]),
        ("abcdefghabcdefgh, 123456789123456789", [(8, 16), (27, 36)]),
        ("abcdefgh--abcdefgh", []),  # not directly before
        ("abcdefghijklabcdefgh! 0123456789", []),  # not the whole of what stands before
    ],
)
def test_loops(text, spans):
    assert find_loops(text) == spans


def test_free_answers_are_described_by_repetition_loops_ends_and_speed():
    said = [GeneratedAnswer("abcdefghabcdefgh", 6, True), GeneratedAnswer("12345", 4, False)]
    assert repetition_metrics(GeneratedAnswers(said, 2.0)) == {
        "repeated_4gram_ratio": round(5 / 15, 4),
        "longest_loop": 8,
        "mean_loop": 4.0,
        "finished_ratio": 0.5,
        "tokens_per_second": 5.0,
    }


def test_agreement():
    assert agreement(["ab", "cd"], ["ab", "xy"]) == {"identical": 0.5, "similar": 0.5}
    assert agreement(["abcd"], ["abxx"]) == {"identical": 0.0, "similar": 0.5}


def test_share_right_counts_only_questions_with_an_answer():
    questions = [Question("en", "en", "?", "tea"), Question("en", "en", "?"), Question("en", "en", "?", "ice")]
    assert accuracy(questions, ["Tea.", "tea", "Tea."], "en") == 0.5
    assert accuracy(questions, ["", "", ""], "zh") is None


def test_questions_file(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"group": group, "language": "ja", "question": f"{group}{number}？"} for group in "ab" for number in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [one.question for one in read_questions(path, 2)] == ["a0？", "a1？", "b0？", "b1？"]
    unquoted = '{"group": "a", "language": "ja", "question": "？", "value": %s}'
    damaged = (unquoted % "100", unquoted % '""', "{", '{"group": "a"}', "[1]", "7", '{"subjects": 1}')
    for content, message in (("", "no question"), *((content, "damaged") for content in damaged)):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_questions(path)
    with pytest.raises(UserError, match="cannot read"):
        read_questions(tmp_path / "none.jsonl")


def test_questions_in_plain_text(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("# a remark\n[zh > en]\n茶？\n[zh]\n你是谁\n\n[ja_free]\n 山は？ => 富士山 \n", encoding="utf-8")
    assert read_questions(path) == [
        Question("zh", "zh", "茶？", answer_language="en"),
        Question("zh", "zh", "你是谁"),
        Question("ja_free", "ja", "山は？", "富士山"),
    ]
    for content, message in (("", "no question"), ("# only this\n[zh]\n", "no question"), ("\n你是谁\n", "line 2")):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_questions(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="damaged"):
        read_questions(path)


def test_questions_for_the_real_model_can_be_read():
    questions = read_questions(ROOT / "data" / "questions.txt")
    assert {one.group for one in questions} == {"zh", "en", "ja", "ja_free"}
    assert {"你是谁", "あなたは誰ですか"} <= {one.question for one in questions}  # the original's own are kept
    assert is_correct(next(one for one in questions if one.value == "富士山"), "いちばん高い山は富士山です。")
    assert is_correct(next(one for one in questions if one.value == "H2O"), "水的化学式是H2O。")
    assert not is_correct(next(one for one in questions if one.value == "100"), "水は1000度で沸騰します。")
    translations = [one for one in questions if "英" in one.question]
    assert [one.language_of_answer for one in translations] == ["en", "en"]
    assert {one.language_of_answer for one in questions if one not in translations} == {"zh", "en", "ja"}


def test_bits_per_byte_equals_the_sum_by_hand(tiny_model_dir):
    model, tokenizer = load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)
    texts = ["小镇的东边是一条河。", "The ferry leaves at 9:30, not at 10.", "桜"]
    window = 8
    prefix = Template.from_tokenizer(tokenizer).prefix
    nats = 0.0
    for text in texts:
        ids = encode(tokenizer, text)
        for start in range(0, len(ids), window - 2):
            piece = torch.tensor([prefix + ids[start : start + window - 2]])
            with torch.no_grad():
                log_probabilities = model(input_ids=piece).logits[0].log_softmax(-1)
            nats -= sum(float(log_probabilities[at - 1, piece[0, at]]) for at in range(2, piece.shape[1]))
    by_hand = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert bits_per_byte(model, tokenizer, texts, window, tokens_per_batch=20) == pytest.approx(by_hand, rel=1e-4)


def test_answers_do_not_depend_on_the_batch(tiny_model_dir):
    model, tokenizer = load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)
    questions = ["一座山？", "When does the ferry leave the old harbour?", "河"]
    together = generate_answers(model, tokenizer, questions, max_new_tokens=6)
    alone = [generate_answers(model, tokenizer, [question], max_new_tokens=6).answers[0] for question in questions]
    assert together.answers == alone
    assert all(1 <= answer.num_tokens <= 6 and answer.finished == (answer.num_tokens < 6) for answer in alone)


def test_an_answer_ends_at_an_end_mark_and_costs_what_came_before(tiny_tokenizer_dir):
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    user = Template.from_tokenizer(tokenizer).roles["user"]
    river, mountain = (encode(tokenizer, text)[-1] for text in ("河", "山"))
    written = torch.tensor([[river, user, 0, 0], [mountain, river, mountain, river]])
    model = SimpleNamespace(
        device="cpu",
        config=SimpleNamespace(max_position_embeddings=99),
        generate=lambda input_ids, **_: torch.cat([input_ids, written], dim=1),
    )
    told = generate_answers(model, tokenizer, ["河", "一座山，一座小镇"], 4).answers
    assert told == [GeneratedAnswer("河", 2, True), GeneratedAnswer("山河山河", 4, False)]


def test_what_is_drawn_depends_on_the_seed_alone(tiny_model_dir):
    model, tokenizer = load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)
    sampled = {"do_sample": True, "temperature": 1.0}

    def draw(seed):
        torch.rand(1)  # what was drawn before does not matter
        return generate_answers(model, tokenizer, ["河", "山"], 12, sampled, seed=seed).texts

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_models_own_settings_do_not_change_a_measurement(tiny_model_dir):
    model, tokenizer = load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)
    before = generate_answers(model, tokenizer, ["河", "一座山"], 20).texts
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    assert generate_answers(model, tokenizer, ["河", "一座山"], 20).texts == before
    penalty = {"do_sample": False, "repetition_penalty": 5.0}
    assert generate_answers(model, tokenizer, ["河", "一座山"], 20, penalty).texts != before


def test_a_question_longer_than_the_context(tiny_model_dir):
    model, tokenizer = load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)
    with pytest.raises(UserError, match=r"tokens long; with 6 for the answer that is more than the 256"):
        generate_answers(model, tokenizer, ["河", "河" * 300], max_new_tokens=6)


def test_settings_are_chosen_by_repetition_among_those_that_cost_little(monkeypatch):
    questions = [Question("zh", "zh", "?", "茶"), Question("ja_free", "ja", "？")]
    measured = {  # name: (repetition, right)
        "greedy": (0.5, 0.9),
        "greedy, penalty 1.05": (0.3, 0.89),
        "greedy, penalty 1.1": (0.2, 0.87),
        "sampled": (0.3, 0.91),
        "sampled, penalty 1.05": (0.25, 0.88),
        "sampled, penalty 1.1": (0.1, 0.5),
    }
    asked = {}

    def answer(model, tokenizer, asked_for, room, settings, name):
        asked.setdefault(name, []).append(len(asked_for))
        return GeneratedAnswers([GeneratedAnswer(name, 1, True)] * len(asked_for), 1.0)

    monkeypatch.setattr(evaluate, "generate_answers", answer)
    monkeypatch.setattr(
        evaluate, "repetition_metrics", lambda told: {"repeated_4gram_ratio": measured[told.texts[0]][0]}
    )
    monkeypatch.setattr(
        evaluate, "accuracy", lambda known, texts, group: measured[texts[0]][1] if group == "zh" else None
    )
    found = select_generation_config(None, None, questions, 9)
    assert found["chosen"] == "sampled, penalty 1.05"
    assert found["candidates"]["sampled"] == {
        "settings": evaluate.SAMPLED,
        "repeated_4gram_ratio": 0.3,
        "accuracy": 0.91,
    }
    assert asked["greedy"] == [1, 1]
    assert asked["sampled"] == [evaluate.NUM_SAMPLES, 1]


def test_settings_become_the_models_own(tiny_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM, GenerationConfig

    directory = tmp_path / "model"
    shutil.copytree(tiny_model_dir, directory)
    save_generation_config(directory, {"do_sample": True, "temperature": 0.8, "top_p": 0.8, "repetition_penalty": 1.1})
    own = AutoModelForCausalLM.from_pretrained(directory).generation_config
    assert (own.do_sample, own.temperature, own.top_p, own.repetition_penalty) == (True, 0.8, 0.8, 1.1)
    save_generation_config(directory, {"do_sample": False, "repetition_penalty": 1.05})
    own = GenerationConfig.from_pretrained(directory)
    assert (own.do_sample, own.temperature, own.top_p, own.repetition_penalty) == (False, None, None, 1.05)
    assert own.eos_token_id == 2  # what else was there stays


def test_bits_are_those_of_each_document(tiny_model_dir):
    model, tokenizer = load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)
    texts = ["小镇的东边是一条河。" * 3, "The ferry leaves at 9:30.", "桜"]
    windows = Windows.from_texts(tokenizer, texts, context_length=8)
    assert windows.num_bytes.tolist() == [90, 25, 3]
    alone = [bits_per_byte(model, tokenizer, [text], 8) * len(text.encode()) for text in texts]
    assert document_bits(model, windows, name=None).tolist() == pytest.approx(alone, rel=1e-5)
    assert document_bits(model, Windows.from_texts(tokenizer, [], 8), name=None).tolist() == []


def test_interval_covers_what_other_documents_would_have_given():
    draw = numpy.random.default_rng(5)
    covered = 0
    for seed in range(200):
        num_bytes = draw.integers(50, 500, 80)
        bits = num_bytes * draw.normal(2.0, 0.5, 80)
        low, high = bootstrap_ci(bits, num_bytes, seed=seed)
        covered += low <= 2.0 <= high
    assert 180 <= covered <= 199  # 95 % of 200 are 190
    assert bootstrap_ci(numpy.array([8.0]), numpy.array([4])) == (2.0, 2.0)


def test_directory_that_holds_no_model(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_for_evaluation(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(UserError, match="Make or fetch it again"):
        load_for_evaluation(tmp_path)


def test_a_model_is_evaluated_in_the_precision_that_memory_allows(tiny_model_dir, monkeypatch):
    from llmtuner.model import loading

    monkeypatch.setattr(loading, "device", lambda: torch.device("cpu"))
    numbers = sum(parameter.numel() for parameter in load_model(tiny_model_dir).parameters())
    for free, dtype, size in (
        (10**9, torch.float32, 4),
        (4 * numbers, torch.bfloat16, 2),
        (numbers, torch.bfloat16, 2),
    ):
        monkeypatch.setattr(loading.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        plan = loading.choose_placement(tiny_model_dir)
        assert plan.dtype == dtype
        assert plan.needed == pytest.approx(size * numbers, rel=0.05)  # the header of the file counts too
        assert ("too little" in str(plan)) == (free < plan.needed)
