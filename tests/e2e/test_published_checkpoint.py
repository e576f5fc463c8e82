"""Step 3 on a checkpoint in ChatGLM3's original format, and all that the original project's own models are used for."""

import errno
import json
import subprocess
import sys

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer

import constants
import pipeline
from llmtuner.chat.session import ChatSession
from llmtuner.console import UserError
from llmtuner.data.template import Template
from llmtuner.eval.evaluate import evaluate_model
from llmtuner.eval.generation import GREEDY, generate_answers
from llmtuner.eval.questions import Question
from llmtuner.model.loading import load_for_evaluation
from llmtuner.tokenizer.chatglm3 import read_sentencepiece
from llmtuner.tokenizer.encoding import encode_batch, load_tokenizer
from llmtuner.tokenizer.vocab import read_vocab
from llmtuner.train.tuner import export_model, run_exp
from llmtuner.weights.convert_chatglm import convert_chatglm
from llmtuner.weights.embedding_init import find_new_tokens, init_new_embeddings, median_norm
from llmtuner.weights.lazy_checkpoint import open_checkpoint
from tests.checkpoints import publish, publish_extended
from tests.helpers import ROOT
from tests.tokenizers import ENGLISH, GOLDEN, ODD, merge_as_published, needs_golden, save_model


@pytest.fixture
def published(tmp_path, tiny_tokenizer_dir):
    return publish(tmp_path / "published", tokenizer=tiny_tokenizer_dir)


def fill_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_step_3_on_a_published_checkpoint_loads_without_this_project(published, tmp_path, monkeypatch):
    import step3_resize_model as step3
    from llmtuner.tokenizer.chatglm3 import save_tokenizer
    from llmtuner.tokenizer.vocab import read_vocab
    from llmtuner.weights.embedding_init import METHODS

    assert sorted(step3.METHODS) == sorted(METHODS)
    merged = tmp_path / "work" / "step2_merged_tokenizer"
    merged.mkdir(parents=True)
    read_vocab(published).append(["ま", "す", "ます"]).save(tmp_path / "merged.model")
    save_tokenizer(tmp_path / "merged.model", merged)
    zero = tmp_path / "work" / "step3_zero"
    for name, value in {"BASE_MODEL_DIR": published, "MERGED_TOKENIZER_DIR": merged, "ZERO_DIR": zero}.items():
        monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(step3, name, value)
    monkeypatch.setattr(constants, "WORK_DIR", tmp_path / "work")
    monkeypatch.setattr(constants, "METRICS_DIR", tmp_path / "work" / "metrics")
    monkeypatch.setattr(
        sys, "argv", ["step3", "--init", "mean", "--norm-correction", "--init-output", "first_weighted"]
    )
    for where, instead, message in (
        ("lazy_checkpoint._write_tensor", fill_disk, "the disk filled up while writing"),
        ("resize_embeddings.rows_equal", lambda *_: False, "came back changed"),
    ):
        with monkeypatch.context() as disk:
            disk.setattr(f"llmtuner.weights.{where}", instead)
            with pytest.raises(UserError, match=message):
                step3.main()
        assert [path.name for path in (tmp_path / "work").iterdir() if path.name != ".lock"] == [merged.name]
    step3.main()
    metrics = pipeline.load_metrics("step3")
    assert (metrics["old_rows"], metrics["new_rows"], metrics["old_rows_identical"]) == (512, 512, True)
    assert metrics["old_logits_max_diff"] is None
    assert metrics["init"] == {"input": "mean", "output": "first_weighted"}
    assert metrics["norm_correction"]
    rows = {
        tensor.name: tensor.read_rows(0, 512).float()
        for tensor in open_checkpoint(zero).values()
        if tensor.name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    new = find_new_tokens(published, merged)
    embeddings, head = rows["model.embed_tokens.weight"], rows["lm_head.weight"]
    assert torch.allclose(embeddings[new.first_id : new.end].norm(dim=1), torch.tensor(median_norm(embeddings, new)))
    assert torch.allclose(
        head[new.first_id : new.end], init_new_embeddings(head, new, "first_weighted")
    )  # never scaled

    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer; directory = sys.argv[1];"
        "model = AutoModelForCausalLM.from_pretrained(directory); tokenizer = AutoTokenizer.from_pretrained(directory);"
        "ids = tokenizer('ます', return_tensors='pt').input_ids; assert ids[0, -1] == 411, ids;"
        "model.generate(ids, max_new_tokens=4); assert 'llmtuner' not in sys.modules"
    )
    line = [sys.executable, "-I", "-c", code, str(zero)]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------------------------- the original project's own models
CORPORA = ROOT.parent / "shared" / "corpora"
PUBLISHED = GOLDEN / "seed_merged_cn_and_ja_tokenizer.model"
QUESTIONS = ["いたいた？", "たいたい <|user|> sop", "一座山？", "When does the ferry leave?"]


@pytest.fixture(scope="module", params=["made here", pytest.param("published", marks=needs_golden)])
def converted(request, tiny_tokenizer_dir, tmp_path_factory):
    """A model in the layout of the original's, converted; and its tokenizer's file as it was."""
    directory = tmp_path_factory.mktemp("original")
    file, rows = PUBLISHED, 78_592
    if request.param == "made here":
        base = read_sentencepiece(tiny_tokenizer_dir / "tokenizer.model")
        merged = merge_as_published(base, [*"いたはまのがす？", "いた", "たい", "はい", "いたい", "います"])
        file, rows = save_model(merged, directory), 448
    convert_chatglm(publish_extended(directory / "published", file, rows), directory / "glm")
    return directory / "glm", file


def real_texts():
    """Every 40th document of all real texts, where they are."""
    import pyarrow.parquet

    files = sorted(CORPORA.glob("*.parquet"))
    return [text for file in files for text in pyarrow.parquet.read_table(file)["text"].to_pylist()[::40]]


def test_plain_transformers_encodes_as_sentencepiece(converted, tmp_path):
    directory, file = converted
    texts = [
        *ODD,
        *ENGLISH,
        *QUESTIONS,
        "いたいたいたい",
        "たいたいた\nはいはい",
        *(real_texts() if file == PUBLISHED else []),
    ]
    ids = sentencepiece.SentencePieceProcessor(model_file=str(file)).encode(texts)
    (tmp_path / "expected.json").write_text(json.dumps([texts, ids]))
    code = """if True:
        import json, sys
        from transformers import AutoModelForCausalLM, AutoTokenizer
        directory, expected = sys.argv[1:]
        tokenizer, model = (kind.from_pretrained(directory) for kind in (AutoTokenizer, AutoModelForCausalLM))
        for text, ids in zip(*json.load(open(expected))):
            encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            assert encoded == ids, text[:200]
        chat = [{"role": "user", "content": "いたい <|user|>"}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        user = tokenizer.convert_tokens_to_ids("<|user|>")
        assert prompt.input_ids[0].tolist().count(user) == 1
        answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt.input_ids.shape[1]:]
        print(json.dumps([prompt.input_ids[0].tolist(), tokenizer.decode(answer, skip_special_tokens=True)]))
        assert "llmtuner" not in sys.modules
    """
    line = [sys.executable, "-I", "-c", code, str(directory), str(tmp_path / "expected.json")]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    model, tokenizer = load_for_evaluation(directory)
    template = Template.from_tokenizer(tokenizer)
    prompt = template.encode_prompt(tokenizer, [{"role": "user", "content": "いたい <|user|>"}])
    answer = generate_answers(model, tokenizer, ["いたい <|user|>"], 8, GREEDY).texts[0]
    assert json.loads(result.stdout.splitlines()[-1]) == [prompt, answer]


def test_chat_and_evaluation(converted):
    directory, _ = converted
    model, tokenizer = load_for_evaluation(directory)
    questions = [Question("ja_free", "ja", text) for text in QUESTIONS] + [Question("ja", "ja", "いた？", "たい")]
    metrics, answers = evaluate_model(model, tokenizer, questions, {"ja": ["いたいたい。", "はいはい"]}, 32, 8)
    assert metrics["bits_per_byte"]["ja"] > 0
    assert metrics["accuracy"]["ja"] in (0, 1)
    session = ChatSession(model, tokenizer)
    for question, answer in zip(QUESTIONS, answers, strict=False):
        assert list(session.ask(question, GREEDY, 8))[-1] == answer or answer.endswith("\ufffd")
        session.clear()


def test_it_is_trained_exported_and_not_extended_again(converted, tiny_run, monkeypatch, tmp_path):
    directory, file = converted
    run = {**tiny_run, "stage": "sft", "dataset": "dialogues", "model_name_or_path": str(directory), "eval_steps": 3}
    assert run_exp({**run, "max_steps": 3})["train_loss"]
    export_model(
        {
            "model_name_or_path": str(directory),
            "adapter_name_or_path": run["output_dir"],
            "export_dir": str(tmp_path / "m"),
        }
    )
    tokenizer, processor = load_tokenizer(tmp_path / "m"), sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert encode_batch(tokenizer, QUESTIONS) == processor.encode(QUESTIONS)
    assert AutoTokenizer.from_pretrained(tmp_path / "m").get_vocab() == tokenizer.get_vocab()
    with pytest.raises(UserError, match="whose vocabulary is extended already"):
        read_vocab(directory)
