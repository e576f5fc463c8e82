"""Settings, one training step, adapters and merging, growing embeddings."""

import json

import pytest
import torch

from llmtuner.console import InputError
from llmtuner.hparams import get_train_args, override
from llmtuner.model.growing import grow_checkpoint
from llmtuner.model.initialising import NewPieces
from llmtuner.model.loading import load_model
from llmtuner.tokenizer.fast import load_tokenizer
from llmtuner.train.tuner import export_model, run_exp

# ------------------------------------------------------------------------------------------------------------ settings
GOOD = {"model_name_or_path": "somewhere", "output_dir": "out", "dataset": "a,b", "interleave_probs": "0.7,0.3"}


def test_all_problems_are_reported_at_once(tmp_path):
    with pytest.raises(InputError) as error:
        get_train_args(
            {"stage": "ppo", "lorra_rank": 8, "warmup_steps": 0.1, "dataset": "a,b", "interleave_probs": "0.7,0.7,0.1"}
        )
    message = str(error.value)
    for part in (
        "stage is 'ppo'",
        "did you mean 'lora_rank'",
        "warmup_ratio",
        "3 shares for 2",
        "1.5",
        "model_name_or_path",
    ):
        assert part in message


def test_settings_are_sorted_and_translated(tmp_path):
    model, data, training, finetuning = get_train_args(
        {
            **GOOD,
            "output_dir": str(tmp_path),
            "lora_target": "query_key_value,dense",
            "warmup_ratio": 0.1,
            "report_to": "none",
        }
    )
    assert data.dataset == ["a", "b"]
    assert data.interleave_probs == [0.7, 0.3]
    assert finetuning.lora_target == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert training.get_warmup_steps(1000) == 100
    assert model.model_name_or_path == "somewhere"


def test_yaml_file_and_command_line(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(json.dumps({**GOOD, "output_dir": str(tmp_path), "report_to": "none"}), encoding="utf-8")
    assert get_train_args(path)[0].model_name_or_path == "somewhere"
    assert override({"a": 1, "b": 2}, ["--b", "0.5", "--c", "[x]"]) == {"a": 1, "b": 0.5, "c": ["x"]}
    changed = override({**GOOD, "output_dir": str(tmp_path), "report_to": "none"}, ["--learning_rate", "1e-3"])
    assert get_train_args(changed)[2].learning_rate == 0.001
    with pytest.raises(InputError, match="--name value"):
        override({}, ["learning_rate", "1"])
    with pytest.raises(InputError, match="cannot read"):
        get_train_args(tmp_path / "missing.yaml")


# ------------------------------------------------------------------------------------------------------------- growing
def test_growing_keeps_old_rows_and_never_wins_greedily(tiny_model_dir, tmp_path):
    first = 300
    new = NewPieces(first, [[5, 9], [7], [11, 12, 13]], unknown_id=0)
    grow_checkpoint(tiny_model_dir, tmp_path, new, 64)
    base, grown = (load_model(directory, torch.float32) for directory in (tiny_model_dir, tmp_path))
    for old, now in (
        (base.get_input_embeddings().weight, grown.get_input_embeddings().weight),
        (base.get_output_embeddings().weight, grown.get_output_embeddings().weight),
    ):
        assert now.shape[0] % 64 == 0
        assert torch.equal(old[:first], now[:first])
        assert torch.allclose(now[first], (old[5] + old[9]) / 2)
        assert torch.equal(now[first + 1], old[7])
        assert torch.equal(now[new.end :], old[0].expand_as(now[new.end :]))
    assert grown.config.vocab_size == grown.get_output_embeddings().weight.shape[0]
    ids = torch.randint(10, first, (4, 30))
    with torch.no_grad():
        before, after = base(input_ids=ids).logits[..., :first], grown(input_ids=ids).logits
    assert torch.equal(before, after[..., :first])
    # A mean of native logits can equal the greatest, but not pass it.
    assert (after[..., first:].max(dim=-1).values <= before.max(dim=-1).values + 1e-5).all()


# ------------------------------------------------------------------------------------------------------------ training
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
        model_name_or_path=str(tiny_model_dir),
        output_dir=str(tmp_path / "adapter"),
        dataset_dir=str(tmp_path),
        corpus_dir=str(tmp_path),
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
        plot_loss=True,
    )


@pytest.mark.parametrize(("stage", "dataset"), [("pt", "documents"), ("sft", "dialogues")])
def test_training_learns_and_merges_to_the_same_logits(tiny_run, tiny_model_dir, tmp_path, stage, dataset):
    from peft import PeftModel

    metrics = run_exp({**tiny_run, "stage": stage, "dataset": dataset})
    assert metrics["eval_loss"]["last"] < metrics["eval_loss"]["first"]
    assert metrics["tokens"] > 0
    assert metrics["padding_share"] < 0.1
    assert (stage == "sft") == ("initial_loss" in metrics)
    for figure in ("training_loss.png", "eval_loss.png"):
        assert (tmp_path / "adapter" / figure).stat().st_size > 5_000

    merged_dir = tmp_path / "merged"
    names = {"adapter_name_or_path": str(tmp_path / "adapter"), "export_dir": str(merged_dir)}
    export_model(
        {
            "model_name_or_path": str(tiny_model_dir),
            "output_dir": str(tmp_path / "unused"),
            "report_to": "none",
            **names,
        }
    )
    merged = load_model(merged_dir, torch.float32)
    adapted = PeftModel.from_pretrained(load_model(tiny_model_dir, torch.float32), str(tmp_path / "adapter")).eval()
    base = load_model(tiny_model_dir, torch.float32)
    ids = torch.randint(10, 300, (2, 20))
    with torch.no_grad():
        difference = (merged(input_ids=ids).logits - adapted(input_ids=ids).logits).abs().max()
        moved = (merged(input_ids=ids).logits - base(input_ids=ids).logits).abs().max()
    assert difference < 1e-3 < moved
    assert not merged.config.tie_word_embeddings
    assert len(load_tokenizer(merged_dir)) == len(load_tokenizer(tiny_model_dir))


def test_tokenized_once_and_again_when_the_text_changes(tiny_run, tmp_path):
    run_exp({**tiny_run, "stage": "pt", "dataset": "documents"})
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/examples.arrow")}
    run_exp({**tiny_run, "stage": "pt", "dataset": "documents"})
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/examples.arrow")} == cached
    with (tmp_path / "documents.jsonl").open("a", encoding="utf-8") as lines:
        lines.write('{"text": "又一条河。"}\n')
    run_exp({**tiny_run, "stage": "pt", "dataset": "documents"})
    assert len(list((tmp_path / "cache").glob("*/examples.arrow"))) == len(cached) + 1


def test_embedding_learning_rate_applies(tiny_run, tiny_model_dir, tmp_path):
    """With a rate of zero for the embeddings they stay as they were, and the adapter still learns."""
    from safetensors.torch import load_file

    run_exp({**tiny_run, "stage": "pt", "dataset": "documents", "embedding_learning_rate": 0.0})
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    original = load_model(tiny_model_dir, torch.float32).get_input_embeddings().weight
    embeddings = [value for name, value in saved.items() if "embed_tokens" in name]
    assert embeddings
    assert torch.equal(embeddings[0], original)
    assert max(float(value.abs().max()) for name, value in saved.items() if "lora_B" in name) > 0


def test_bad_targets_and_data_are_refused(tiny_run, tmp_path):
    with pytest.raises(InputError, match="matches no module"):
        run_exp({**tiny_run, "stage": "pt", "dataset": "documents", "lora_target": "w_pack"})
    with pytest.raises(InputError, match="Did you mean documents"):
        run_exp({**tiny_run, "stage": "pt", "dataset": "document"})
    with pytest.raises(InputError, match="leaves none"):
        run_exp({**tiny_run, "stage": "pt", "dataset": "documents", "val_size": 0.9999999})


def test_loss_is_normalised_over_the_accumulated_batch(tiny_run, tmp_path):
    """Four sequences at once and one by one with accumulation give the same losses and the same weights."""
    from safetensors.torch import load_file

    losses, weights = [], []
    for size, accumulation in ((4, 1), (1, 4)):
        out = tmp_path / f"batch-{size}"
        run_exp(
            {
                **tiny_run,
                "stage": "sft",
                "dataset": "dialogues",
                "output_dir": str(out),
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": accumulation,
                "max_steps": 3,
            }
        )
        losses.append([entry["loss"] for entry in json.loads((out / "log.json").read_text()) if "loss" in entry])
        weights.append(load_file(out / "adapter_model.safetensors"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])
