"""What the tests share: no network, one thread, small models that are made on the spot, and a browser."""

import gc
import json
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.helpers import TEXTS


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory):
    """A Chinese-English tokenizer under ChatGLM3's rules, with the nine special tokens."""
    from llmtuner.tokenizer.chatglm3 import save_tokenizer
    from llmtuner.tokenizer.sentencepiece_bpe import split_sentences, train_bpe

    directory = tmp_path_factory.mktemp("tiny-tokenizer")
    sentences = [sentence for text in TEXTS for sentence in split_sentences(text)]
    train_bpe(sentences, directory / "trained.model", 400, character_coverage=1.0, threads=1)
    save_tokenizer(directory / "trained.model", directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_tokenizer_dir, tmp_path_factory):
    """A Glm of two layers with random weights beside that tokenizer."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    from llmtuner.tokenizer.encoding import copy_tokenizer, load_tokenizer

    directory = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(0)
    rows = -(-len(load_tokenizer(tiny_tokenizer_dir)) // 64) * 64
    config = GlmConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        attention_bias=True,
        pad_token_id=0,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = GlmForCausalLM(config)
    for parameter in model.parameters():  # nothing may hide behind a 0 or a 1
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(directory))
    copy_tokenizer(tiny_tokenizer_dir, directory)
    return directory


@pytest.fixture(scope="session", params=["qwen3", "llama"])
def family_dir(request, tmp_path_factory):
    """A tiny model of another family, with tied embeddings or without."""
    from tests.tiny_models import tiny_model

    return tiny_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def tiny_run(tiny_model_dir, tmp_path):
    """Settings of a run of a few steps over a few documents and dialogues."""
    texts = [f"小镇的第{number}条河，河边种满了柳树。The ferry leaves at {number}." for number in range(60)]
    (tmp_path / "documents.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
    )
    (tmp_path / "dialogues.jsonl").write_text(
        "".join(
            json.dumps({"instruction": f"第{number}条河？", "output": f"柳树 {number}"}) + "\n" for number in range(60)
        ),
        encoding="utf-8",
    )
    info = {
        "documents": {"file_name": "documents.jsonl", "columns": {"prompt": "text"}},
        "dialogues": {"file_name": "dialogues.jsonl", "columns": {"prompt": "instruction", "response": "output"}},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return dict(
        stage="pt",
        dataset="documents",
        model_name_or_path=str(tiny_model_dir),
        output_dir=str(tmp_path / "adapter"),
        dataset_dir=str(tmp_path),
        cache_dir=str(tmp_path / "cache"),
        cutoff_len=64,
        val_size=0.2,
        lora_rank=4,
        additional_target="word_embeddings,output_layer",
        learning_rate=5e-3,
        per_device_train_batch_size=4,
        max_steps=6,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=6,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        plot_loss=False,  # a second of each run
    )


CHROMIUM = shutil.which("chromium")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, where there is one."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt install chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


def pytest_collection_finish():
    """What was imported stays: each run of a test collects garbage several times, and would visit a million objects."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Tests that open a page in Chromium are marked by their fixture."""
    for item in items:
        if "browser" in item.fixturenames:
            item.add_marker("browser")


@pytest.fixture
def saving_run(tiny_run):
    return {
        **tiny_run,
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 14,
        "eval_steps": 5,
        "lora_dropout": 0.1,
    }
