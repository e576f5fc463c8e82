"""Models of other families than ChatGLM3's take the same way: new tokens, resized embeddings, training, merging, plain transformers.

Tied embeddings (Qwen3) and untied ones (Llama), with byte-level BPE.
"""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import constants
import step3_resize_model
from llmtuner.console import UserError
from llmtuner.eval.generation import generate_answers
from llmtuner.model.loading import load_for_evaluation, load_model
from llmtuner.model.model_dir import read_json
from llmtuner.report.checks import MAX_LOGIT_DIFFERENCE
from llmtuner.tokenizer.encoding import encode_batch, load_tokenizer
from llmtuner.tokenizer.vocab import read_vocab
from llmtuner.train.tuner import export_model, run_exp
from llmtuner.weights.embedding_init import find_new_tokens
from llmtuner.weights.resize_embeddings import rows_equal
from mini.world import write_world
from tests.helpers import ROOT, TEXTS
from tests.scripts import STEPS, keep_few, start_step
from tests.tokenizers import JAPANESE, train_tokens
from tests.training import log_of

BOTH = "embed_tokens,lm_head"


@pytest.fixture(scope="module")
def merged_dir(family_dir, tmp_path_factory):
    """The base's tokenizer with tokens learned from Japanese text, as steps 1 and 2 make it."""
    directory, base = tmp_path_factory.mktemp("merged"), read_vocab(family_dir)
    base.append(train_tokens(base, JAPANESE, 60)).save_model_files(directory, family_dir)
    return directory


def run_step_3(base_dir, merged_dir, work_dir, monkeypatch, *words):
    """The Zero model of step 3, which leaves nothing if it refuses."""
    directories = {"BASE_MODEL_DIR": base_dir, "MERGED_TOKENIZER_DIR": merged_dir, "ZERO_DIR": work_dir / "zero"}
    directories |= {"BASE_TOKENIZER": base_dir / "tokenizer.json", "METRICS_DIR": work_dir / "metrics"}
    for name, value in {**directories, "WORK_DIR": work_dir}.items():
        monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(step3_resize_model, name, value, raising=False)
    monkeypatch.setattr(sys, "argv", ["step3", *words])
    step3_resize_model.main()
    return work_dir / "zero"


@pytest.fixture(scope="module")
def zero_dir(family_dir, merged_dir, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_step_3(family_dir, merged_dir, tmp_path_factory.mktemp("work"), monkeypatch, "--init", "mean")


def test_step_3_keeps_old_rows_and_logits(family_dir, merged_dir, zero_dir):
    new = find_new_tokens(family_dir, merged_dir)
    assert (len(new.base_ids), new.base_range, new.unk_id) == (60, range(410), None)
    assert all(len(ids) > 1 and {*ids} <= {*new.base_range} for ids in new.base_ids)
    assert rows_equal(family_dir, zero_dir, new.first_id)
    metrics = read_json(zero_dir.parent / "metrics" / "step3.json")
    assert metrics["old_logits_max_diff"] <= MAX_LOGIT_DIFFERENCE
    assert metrics["new_rows"] == 512


@pytest.mark.parametrize("words", [["--norm-correction", "--init", "mean"], ["--init-output", "random"]])
def test_step_3_refuses_what_a_tied_matrix_cannot_have(family_dir, merged_dir, tmp_path, monkeypatch, words):
    if not read_json(family_dir / "config.json")["tie_word_embeddings"]:
        assert run_step_3(family_dir, merged_dir, tmp_path, monkeypatch, *words).is_dir()
        return
    with pytest.raises(UserError, match=rf"one matrix for input and output .* Leave {words[0]} out"):
        run_step_3(family_dir, merged_dir, tmp_path, monkeypatch, *words)
    assert not (tmp_path / "zero").exists()


def test_new_rows_can_start_from_their_translations(family_dir, merged_dir, zero_dir, tmp_path, monkeypatch, capsys):
    new, merged = find_new_tokens(family_dir, merged_dir), read_vocab(merged_dir)
    words = [(merged.text(token) or "").lstrip("▁") for token in merged.tokens[new.first_id :]]
    row = next(number for number, word in enumerate(words) if len(word) > 1 and words.count(word) == 1)
    (tmp_path / "names.jsonl").write_text(json.dumps({"ja": words[row], "zh": "山"}) + "\n", encoding="utf-8")
    entry = {"file_name": "names.jsonl", "formatting": "glossary", "columns": {"translations": ["ja", "zh"]}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"names": entry}), encoding="utf-8")
    monkeypatch.setattr(constants, "DATASET_INFO", tmp_path / "dataset_info.json")
    monkeypatch.setattr(constants, "CORPUS_DIR", tmp_path)
    monkeypatch.setattr(step3_resize_model.pipeline, "require_corpus", lambda: tmp_path)
    result = run_step_3(family_dir, merged_dir, tmp_path, monkeypatch, "--init", "glossary", "--glossary", "names")
    told = capsys.readouterr().out
    tied = read_json(family_dir / "config.json")["tie_word_embeddings"]
    assert "glossary: 1 of 60 new tokens have a translation" in told
    assert ("glossary: 1 of 60 new tokens begin a word with a translation" in told) == (not tied)
    assert read_json(tmp_path / "metrics" / "step3.json")["init"] == {"input": "glossary", "output": "glossary"}
    models = [load_model(directory) for directory in (result, zero_dir)]
    [spelling] = read_vocab(family_dir).encode(["山"])
    for get in ("get_input_embeddings", "get_output_embeddings"):
        translated, mean = (getattr(model, get)().weight.float() for model in models)
        assert (translated != mean).any(dim=1).nonzero().tolist() == [[new.first_id + row]]
        expected = translated[spelling].mean(dim=0)
        if get == "get_output_embeddings" and not tied:  # half the spelling, half what the translation begins with
            expected = (mean[new.first_id + row] + translated[spelling[0]]) / 2
        torch.testing.assert_close(translated[new.first_id + row], expected)


@pytest.mark.parametrize(("words", "output"), [([], "first_weighted"), (["--init", "global_mean"], "global_mean")])
def test_a_profile_chooses_how_output_rows_start(family_dir, merged_dir, tmp_path, monkeypatch, words, output):
    """Unless it is told otherwise, or one matrix serves as both."""
    monkeypatch.setattr(constants, "PROFILE", replace(constants.PROFILE, init_output="first_weighted"))
    run_step_3(family_dir, merged_dir, tmp_path, monkeypatch, *words)
    used = "mean" if not words and read_json(family_dir / "config.json")["tie_word_embeddings"] else output
    assert read_json(tmp_path / "metrics" / "step3.json")["init"] == {
        "input": words[-1] if words else "mean",
        "output": used,
    }


def test_step_3_says_what_a_glossary_is(family_dir, merged_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(step3_resize_model.pipeline, "require_corpus", lambda: tmp_path)
    with pytest.raises(UserError, match=r"--init glossary needs a data set .* docs/bridges\.md"):
        run_step_3(family_dir, merged_dir, tmp_path, monkeypatch, "--init", "glossary", "--glossary", "")
    assert not (tmp_path / "zero").exists()


@pytest.fixture
def run(tiny_run, zero_dir, tmp_path):
    """Settings of step 5, for a few steps on Japanese text."""
    rows = [{"text": f"{JAPANESE[number % 5]} {number}"} for number in range(60)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        **tiny_run,
        "model_name_or_path": str(zero_dir),
        "additional_target": BOTH,
        "embedding_learning_rate": 1e-3,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 4,
        "eval_steps": 4,
        "lora_dropout": 0.1,
    }


def greedy(directory, prompts):
    """Ids of greedy answers, by plain transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    options = dict(do_sample=False, max_new_tokens=12, eos_token_id=-1, pad_token_id=0)
    return [model.generate(**tokenizer(prompt, return_tensors="pt"), **options)[0].tolist() for prompt in prompts]


def test_greedy_answers_stay_and_new_tokens_shorten_japanese(family_dir, zero_dir):
    prompts = [text[start : start + 12] for text in dict.fromkeys(TEXTS) for start in range(0, len(text), 3)]
    before = greedy(family_dir, prompts)
    assert before == greedy(zero_dir, prompts)
    assert len({tuple(ids[-12:]) for ids in before}) > 25
    lengths = [sum(map(len, encode_batch(load_tokenizer(directory), JAPANESE))) for directory in (family_dir, zero_dir)]
    assert lengths[1] < 0.7 * lengths[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train_new_tokens_only": True},
        {"finetuning_type": "full", "embedding_learning_rate": None, "additional_target": None, "lora_dropout": 0.0},
        {"finetuning_type": "freeze", "lora_dropout": 0.0},
    ],
    ids=["embeddings", "new tokens", "full", "freeze"],
)
def test_training_resumes_exactly_and_merges_to_the_same_logits(run, zero_dir, tmp_path, settings):
    run = {**run, **settings}
    metrics = run_exp({**run, "output_dir": str(tmp_path / "whole")})
    assert metrics["eval_loss"]["last"] < metrics["eval_loss"]["first"]

    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for path in (*tmp_path.glob("resumed/*.safetensors"), tmp_path / "resumed" / "trainer_log.jsonl"):
        path.unlink()
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-8")
    run_exp({**run, "output_dir": str(tmp_path / "resumed")})
    whole, resumed = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert log_of(tmp_path / "resumed") == log_of(tmp_path / "whole")

    export = dict(model_name_or_path=str(zero_dir), adapter_name_or_path=str(tmp_path / "whole"))
    merged = export_model(
        {**export, "finetuning_type": run.get("finetuning_type", "lora"), "export_dir": str(tmp_path / "merged")}
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    config = read_json(merged / "config.json")
    assert config["tie_word_embeddings"] == read_json(zero_dir / "config.json")["tie_word_embeddings"]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config["tie_word_embeddings"]
    assert config["vocab_size"] == len(model.model.embed_tokens.weight) >= len(tokenizer)
    base, matrix = load_model(zero_dir), model.model.embed_tokens.weight
    changed = (matrix != base.get_input_embeddings().weight).any(dim=1)
    first, end = config["appended_rows"]
    assert changed[first:end].any()
    if "train_new_tokens_only" in settings:
        assert not changed[:first].any()
        assert not changed[end:].any()
    if "finetuning_type" not in settings:
        check_logits(merged, tmp_path / "whole", zero_dir)


def test_dialogues_are_tuned_and_the_chat_model_answers(run, zero_dir, tmp_path):
    """As in step 6: the loss is computed on what the base's own chat template makes of answers; then step 7's question."""
    settings = {
        **run,
        "stage": "sft",
        "dataset": "dialogues",
        "max_steps": 150,
        "eval_steps": 150,
        "save_strategy": "no",
    }
    metrics = run_exp({**settings, "lora_rank": 8})
    assert metrics["eval_loss"]["last"] < 0.7 * metrics["eval_loss"]["first"]
    export = dict(model_name_or_path=str(zero_dir), adapter_name_or_path=settings["output_dir"])
    chat = export_model({**export, "export_dir": str(tmp_path / "chat")})
    model, tokenizer = load_for_evaluation(chat)
    answers = generate_answers(model, tokenizer, ["第3条河？", "第4条河？"]).texts
    assert all(answer.startswith("柳树") for answer in answers), answers


def check_logits(merged, adapter, base):
    """The merged model computes what the trained one did."""
    from llmtuner.hparams import FinetuningArguments
    from llmtuner.model.adapters import init_adapter

    trained = init_adapter(load_model(base), FinetuningArguments(lora_rank=4), adapter).eval()
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        expected, found = trained(ids).logits, AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- all seven in a row
SHORT = dict(max_steps=4, eval_steps=2, save_steps=2, max_eval_samples=2)
SHORT |= dict(per_device_train_batch_size=1, gradient_accumulation_steps=2)


@pytest.mark.slow
def test_all_seven_steps_by_a_profile_alone(family_dir, tmp_path):
    write_world(tmp_path / "corpus")
    keep_few(tmp_path / "corpus")
    profile = yaml.safe_load((ROOT / "examples" / "qwen3-4b-japanese.yaml").read_text(encoding="utf-8"))
    profile |= dict(
        base_model_dir=str(family_dir), base_id="tiny", questions=str(tmp_path / "corpus" / "questions.jsonl")
    )
    profile |= dict(num_new_tokens=300, context_length=64, max_new_tokens=8, held_out_bytes=2000)
    profile |= dict(pt_settings=SHORT, sft_settings=SHORT)
    profile["instruction_sets"].remove("dolly_en")  # of which the miniature has none
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")
    for step in STEPS:
        result = start_step(step, tmp_path, PROFILE=tmp_path / "tiny.yaml", CORPUS_DIR=tmp_path / "corpus")
        assert result.returncode == 0, f"{step}: {result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    metrics = {step: read_json(tmp_path / "work" / "metrics" / f"{step}.json") for step in STEPS}
    assert metrics["step3"]["old_rows_identical"]
    for language in ("zh", "en"):
        assert metrics["step4"][language]["identical"] == metrics["step4"][language]["total"] > 10
    tokens = metrics["step4"]["tokens_per_character"]
    assert tokens["zero"]["ja"] < 0.75 * tokens["base"]["ja"]
    assert [tokens["zero"][language] for language in ("zh", "en")] == [
        tokens["base"][language] for language in ("zh", "en")
    ]
    chat = tmp_path / "work" / "chat_model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat), AutoTokenizer.from_pretrained(chat)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert tokenizer.chat_template == load_tokenizer(family_dir).chat_template
    assert len(tokenizer) == len(load_tokenizer(family_dir)) + 300 <= model.config.vocab_size
