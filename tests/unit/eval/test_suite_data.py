"""The harness's own tasks over local files: the same requests as from the hub, and scores of a plain loop over the rows."""

import json
import re

import pytest
import torch

from llmtuner.console import UserError
from llmtuner.data.template import Template
from llmtuner.eval import lm_eval_adapter
from llmtuner.eval.lm_eval_adapter import ChatGLM3LM, load_tasks, run_suite
from llmtuner.model.loading import load_model
from llmtuner.tokenizer.encoding import encode, load_tokenizer
from tests.helpers import ROOT
from tests.unit.eval.by_hand import greedy, log_likelihood

pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is not installed: pip install lm_eval")
SUITES_DIR = ROOT.parent / "shared" / "suites"
TASKS = {"jcommonsenseqa": "ja_leaderboard_jcommonsenseqa", "jnli": "ja_leaderboard_jnli", "gsm8k": "gsm8k"}
QUESTION_SPLIT = {"jcommonsenseqa": "valid", "jnli": "valid", "gsm8k": "test"}
RELATIONS = ("entailment", "contradiction", "neutral")


def choice_row(number):
    choices = {f"choice{place}": f"{word}{number}" for place, word in enumerate(("山", "川", "港", "柳", "船"))}
    return {"q_id": number, "question": f"{number}番目の町には何がありますか。", **choices, "label": number % 5}


def relation_row(number):
    texts = {"sentence1": f"町に{number}本の柳があります。", "sentence2": "町に柳があります。"}
    return {"sentence_pair_id": str(number), "yjcaptions_id": "1-2-3", **texts, "label": RELATIONS[number % 3]}


def sum_row(number):
    return {"question": f"Ann has {number} apples and buys 2.", "answer": f"<<{number}+2>>\n#### {number + 2}"}


ROWS = {"jcommonsenseqa": choice_row, "jnli": relation_row, "gsm8k": sum_row}


def write(directory, name, rows, split=None):
    path = directory / f"{name}.{split or QUESTION_SPLIT[name]}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data_dir(tmp_path):
    """Questions and examples as published, made up."""
    for name, row in ROWS.items():
        write(tmp_path, name, map(row, range(6)))
        write(tmp_path, name, map(row, range(20, 28)), "train")
    return tmp_path


def as_on_the_hub(name, rows):
    """The hub's classes are numbers; nothing else differs."""
    import datasets

    table = datasets.Dataset.from_list(list(rows))
    return table.cast_column("label", datasets.ClassLabel(names=list(RELATIONS))) if name == "jnli" else table


def all_requests(task):
    task.build_all_requests(rank=0, world_size=1)
    return [instance.args for instance in task.instances]


def test_requests_are_those_of_the_definition(few_tasks, data_dir, monkeypatch):
    import datasets

    local = {name: load_tasks([task], data_dir=data_dir)[task]["tasks"][task] for name, task in TASKS.items()}
    hub_names = {("Rakuten/JGLUE", "JCommonsenseQA"): "jcommonsenseqa", ("Rakuten/JGLUE", "JNLI"): "jnli"}
    hub_names["openai/gsm8k", "main"] = "gsm8k"

    def load_dataset(path, name):
        name = hub_names[path, name]
        questions, examples = map(ROWS[name], range(6)), map(ROWS[name], range(20, 28))
        split = "test" if name == "gsm8k" else "validation"
        return {split: as_on_the_hub(name, questions), "train": as_on_the_hub(name, examples)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name, task in TASKS.items():
        from_hub = load_tasks([task])[task]["tasks"][task]
        assert from_hub.config.num_fewshot == {"jcommonsenseqa": 3, "jnli": 3, "gsm8k": 5}[name]
        assert all_requests(local[name]) == all_requests(from_hub)
    [context, target] = all_requests(local["jnli"])[1]  # of the first row, the second choice
    assert context.endswith("### 入力：\n前提：町に0本の柳があります。\n仮説：町に柳があります。\n\n### 応答：")
    assert context.count("### 指示：") == 4
    assert target == "\n矛盾"


def by_hand(model, tokenizer, name, row, max_new_tokens):
    """Whether a model answers a published row correctly without examples, and for written answers the text."""
    prefix = Template.from_tokenizer(tokenizer).prefix
    head = "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。要求を適切に満たす応答を書きなさい。\n\n### 指示：\n"
    if name == "gsm8k":
        ids = [*prefix, *encode(tokenizer, f"Question: {row['question']}\nAnswer:")]
        room = model.config.max_position_embeddings - max_new_tokens - len(prefix)
        ids = [*prefix, *ids[len(prefix) :][-room:]]
        stops = Template.from_tokenizer(tokenizer).stop_token_ids
        answer = tokenizer.decode(greedy(model, ids, max_new_tokens, stops), skip_special_tokens=True)
        answer = re.split("Question:|</s>|<\\|im_end\\|>", answer)[0]
        numbers = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", answer)
        value = re.sub(r"[,$]|\.$", "", numbers[-1]) if numbers else ""
        return value == row["answer"].split("#### ")[1].replace(",", ""), answer
    if name == "jnli":
        choices, right = ["含意", "矛盾", "中立"], RELATIONS.index(row["label"])
        text = (
            "与えられた前提と仮説の関係を回答してください。\n\n出力は以下から選択してください：\n含意\n矛盾\n中立\n\n"
        )
        text += f"### 入力：\n前提：{row['sentence1']}\n仮説：{row['sentence2']}"
    else:
        choices, right = [row[f"choice{place}"] for place in range(5)], row["label"]
        listed = "".join(f"- {choice}\n" for choice in choices)
        text = f"出力は以下から選択してください：\n{listed}\n### 入力：\n{row['question']}"
    scores = []
    for choice in choices:
        context, whole = (encode(tokenizer, f"{head}{text}\n\n### 応答：{end}") for end in ("", f"\n{choice}"))
        kept = whole[-(model.config.max_position_embeddings + 1 - len(prefix)) :]  # the beginning is lost
        scores.append(log_likelihood(model, [*prefix, *kept], len(prefix) + len(kept) - (len(whole) - len(context))))
    return scores.index(max(scores)) == right, None


def check_against_plain_loop(model_dir, directory, rows, monkeypatch, max_new_tokens):
    model, tokenizer = load_model(model_dir, torch.float32), load_tokenizer(model_dir)
    answers, generate_until = [], ChatGLM3LM.generate_until
    monkeypatch.setattr(
        ChatGLM3LM, "generate_until", lambda *words: answers.extend(generate_until(*words)) or answers[-len(words[1]) :]
    )
    monkeypatch.setattr(lm_eval_adapter, "DEFAULT_MAX_NEW_TOKENS", max_new_tokens)
    result = run_suite(
        "ja", model_dir, list(TASKS.values()), None, len(rows["jnli"]), False, num_fewshot=0, data_dir=directory
    )
    for name, task in TASKS.items():
        expected = [by_hand(model, tokenizer, name, row, max_new_tokens) for row in rows[name]]
        metric = "exact_match (flexible-extract)" if name == "gsm8k" else "acc"
        marks = "".join(str(int(right)) for right, _ in expected)
        assert result["questions"][task]["correct"][metric] == marks
        assert result["tasks"][task][metric] == pytest.approx(marks.count("1") / len(marks))
        if name == "gsm8k":
            assert answers == [text for _, text in expected]
    return result


def test_scores_are_those_of_a_plain_loop(few_tasks, lively_dir, data_dir, monkeypatch):
    rows = {name: [row(number) for number in range(6)] for name, row in ROWS.items()}
    model, tokenizer = load_model(lively_dir, torch.float32), load_tokenizer(lively_dir)
    _, written = by_hand(model, tokenizer, "gsm8k", rows["gsm8k"][0], 40)
    number = re.findall("[0-9]+", written)  # a right answer to the first question
    rows["jnli"][0]["label"] = "neutral"
    write(data_dir, "jnli", rows["jnli"])
    rows["gsm8k"][0]["answer"] = f"#### {number[-1]}"
    write(data_dir, "gsm8k", rows["gsm8k"])
    result = check_against_plain_loop(lively_dir, data_dir, rows, monkeypatch, 40)
    tasks = result["tasks"]
    assert tasks["gsm8k"]["exact_match (flexible-extract)"] > 0
    assert tasks["gsm8k"]["exact_match (strict-match)_interval"][0] == 0
    assert not any(key.endswith("_chance") for key in tasks["gsm8k"])
    assert tasks[TASKS["jnli"]]["acc_chance"] == pytest.approx(1 / 2)  # always "neutral", of three choices
    assert tasks[TASKS["jcommonsenseqa"]]["acc_chance"] == pytest.approx(1 / 5)
    assert {scores["few_shot"] for scores in tasks.values()} == {0}


@pytest.mark.skipif(not SUITES_DIR.is_dir(), reason="needs JGLUE's and GSM8K's files in ../shared/suites")
def test_scores_on_real_rows_are_those_of_a_plain_loop(few_tasks, lively_dir, monkeypatch):
    rows = {}
    for name, split in QUESTION_SPLIT.items():
        lines = (SUITES_DIR / f"{name}.{split}.jsonl").read_text(encoding="utf-8").split("\n")[:100]
        rows[name] = [json.loads(line) for line in lines]
    result = check_against_plain_loop(lively_dir, SUITES_DIR, rows, monkeypatch, 4)
    assert {scores["n"] for scores in result["tasks"].values()} == {100}
    truncated = [result["tasks"][task]["truncated"] for task in TASKS.values()]
    assert 0 < max(truncated) <= 100
    assert sum(truncated) <= result["truncated_requests"]


def test_truncated_questions_are_counted(few_tasks, lively_dir, data_dir, monkeypatch):
    monkeypatch.setattr(lm_eval_adapter, "DEFAULT_MAX_NEW_TOKENS", 1)
    rows = [sum_row(number) for number in range(6)]
    rows[2]["question"] = rows[4]["question"] = "An apple. " * 60
    write(data_dir, "gsm8k", rows)
    result = run_suite("ja", lively_dir, ["gsm8k", TASKS["jnli"]], num_fewshot=0, data_dir=data_dir, trained_length=60)
    assert result["longer_questions"] == 2 + 6
    assert result["tasks"]["gsm8k"]["truncated"] == 2
    assert result["tasks"][TASKS["jnli"]]["truncated"] == 6  # a token a byte
    assert result["truncated_requests"] == 2 + 6 * 3  # with each of three choices
    assert result["context_length"] == 256


def test_files_and_rows_that_are_missing_or_damaged(few_tasks, data_dir):
    (data_dir / "jnli.train.jsonl").unlink()
    with pytest.raises(UserError, match=r"takes its 3 few-shot examples.*jnli\.train\.jsonl does not.*--num_fewshot 0"):
        load_tasks([TASKS["jnli"]], data_dir=data_dir)
    assert load_tasks([TASKS["jnli"]], num_fewshot=0, data_dir=data_dir)
    for text, message in (
        ("", r"jnli\.valid\.jsonl has no rows"),
        ('{"sentence1": "a", "label": "neutral"}', r"jnli\.valid\.jsonl, line 1: the column sentence2 is missing"),
        ('\n{"sentence1": "a", "sentence2": "b", "label": 1}', r"line 2: label is 1, not one of entailment"),
        ("[]", "line 1: the column"),
        ("{", r"line 1: Expecting.*JGLUE v1\.3"),
    ):
        (data_dir / "jnli.valid.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            load_tasks([TASKS["jnli"]], num_fewshot=0, data_dir=data_dir)
    with pytest.raises(UserError, match=r"data directory .*there does not exist"):
        load_tasks([TASKS["gsm8k"]], data_dir=data_dir / ".." / "not" / "there")


def test_a_task_without_file_and_hub_names_the_file(few_tasks, data_dir):
    with pytest.raises(UserError) as raised:
        load_tasks(["hellaswag", "gsm8k"], data_dir=data_dir)
    assert f"{data_dir}/hellaswag.valid.jsonl does not exist" in str(raised.value)
    assert "--tasks gsm8k" in str(raised.value)


def test_other_data_sets_have_the_rows_of_the_hub(few_tasks, data_dir):
    row = {"id": 0, "question": "1+1？", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B", "explanation": ""}
    for split in ("val", "dev"):
        write(data_dir, "ceval-exam.accountant", [row], split)
    task = load_tasks(["ceval-valid_accountant"], data_dir=data_dir)["ceval-valid_accountant"]["tasks"]
    [requests] = [all_requests(one) for one in task.values()]
    assert [target for _, target in requests] == [" A", " B", " C", " D"]
