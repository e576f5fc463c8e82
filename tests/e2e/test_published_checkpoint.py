"""Step 3 on a checkpoint in ChatGLM3's original format."""

import errno
import subprocess
import sys

import pytest
import torch

import constants
import pipeline
from llmtuner.console import UserError
from llmtuner.weights.embedding_init import find_new_tokens, init_new_embeddings, median_norm
from llmtuner.weights.lazy_checkpoint import open_checkpoint
from tests.checkpoints import publish


@pytest.fixture
def published(tmp_path, tiny_tokenizer_dir):
    return publish(tmp_path / "published", tokenizer=tiny_tokenizer_dir)


def fill_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_step_3_on_a_published_checkpoint_loads_without_this_project(published, tmp_path, monkeypatch):
    import step3_resize_model as step3
    from llmtuner.tokenizer.fast import save_tokenizer
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
