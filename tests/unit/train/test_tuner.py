"""run_exp and export_model: runs of a few steps learn, merge to the same logits, and refuse bad input."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from llmtuner.console import UserError
from llmtuner.model.loading import load_model
from llmtuner.tokenizer.encoding import load_tokenizer
from llmtuner.train.trainer import PackedTrainer
from llmtuner.train.tuner import export_model, run_exp
from llmtuner.weights.merge_lora import merge_adapter
from tests.checkpoints import truncate
from tests.training import NO_FIGURES, SFT, STAGES, losses_of


@pytest.fixture
def model(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def test_training_finds_cut_weights_before_data_are_tokenized(model, tiny_run):
    file = truncate(model)
    with pytest.raises(UserError, match="damaged or truncated") as caught:
        run_exp({**tiny_run, "model_name_or_path": str(model)})
    assert str(file) in str(caught.value)
    assert not Path(tiny_run["cache_dir"]).exists()


# --------------------------------------------------------------------------------------------------------- whole runs
PLAIN = dict(flash_attn="disabled", fused_ops=False, chunked_loss=False)


FAST = dict(flash_attn="varlen", fused_ops=True, chunked_loss=True)


def logged(settings, directory):
    """Loss and gradient norm of each of twelve steps."""
    short = dict(max_steps=12, eval_strategy="no", eval_on_start=False, plot_loss=False)
    run_exp({**settings, **short, "output_dir": str(directory)})
    lines = [json.loads(line) for line in (directory / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line]


@pytest.mark.parametrize("stage", ["pt", "sft"])
@pytest.mark.parametrize("lever", [*FAST, "all"])
def test_a_run_learns_the_same_with_and_without(tiny_run, tmp_path, stage, lever):
    """Losses and gradient norms of twelve steps, one lever on or all, against none."""
    settings = {**tiny_run, "stage": stage, "dataset": {"pt": "documents", "sft": "dialogues"}[stage]}
    fast = PLAIN | (FAST if lever == "all" else {lever: FAST[lever]})
    wanted, own = logged({**settings, **PLAIN}, tmp_path / "plain"), logged({**settings, **fast}, tmp_path / "fast")
    assert len(own) == 12
    assert numpy.array(own) == pytest.approx(numpy.array(wanted), rel=1e-4)
    assert wanted[-1][0] < wanted[0][0]


def test_adam_in_8_bits_learns_about_the_same(tiny_run, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    settings = {**tiny_run, "embedding_learning_rate": 2e-3}
    wanted = logged(settings, tmp_path / "plain")
    own = logged({**settings, "optim": "adamw_8bit"}, tmp_path / "8bit")
    assert own != wanted
    assert [loss for loss, _ in own] == pytest.approx([loss for loss, _ in wanted], rel=0.01)


# ------------------------------------------------------------------------------------------------------------- learning
@pytest.mark.parametrize(("stage", "dataset"), STAGES)
def test_training_learns_and_merges_to_the_same_logits(tiny_run, tiny_model_dir, tmp_path, stage, dataset):
    from peft import PeftModel

    metrics = run_exp({**tiny_run, "stage": stage, "dataset": dataset, "plot_loss": True})
    assert metrics["eval_loss"]["last"] < metrics["eval_loss"]["first"]
    assert metrics["tokens"] > 0
    assert metrics["padding_ratio"] < 0.3  # a small set ends with sequences that fill its last batch up
    assert metrics["data"][dataset]["kept"] == 60
    assert (stage == "sft") == ("initial_loss" in metrics)
    for figure in ("training_loss.png", "eval_loss.png"):
        assert (tmp_path / "adapter" / figure).stat().st_size > 5_000

    merged_dir = tmp_path / "merged"
    names = {"adapter_name_or_path": str(tmp_path / "adapter"), "export_dir": str(merged_dir)}
    export_model({"model_name_or_path": str(tiny_model_dir), **names})
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


@pytest.mark.parametrize(
    "how",
    [
        dict(use_dora=True, use_rslora=True),
        dict(finetuning_type="freeze"),
        dict(finetuning_type="full", additional_target=[]),
        dict(bf16=True, gradient_checkpointing=True),
        dict(packing=False),
        dict(neat_packing=False),
        dict(additional_target="input_layernorm,norm"),
    ],
)
def test_other_ways_to_train_learn_too(tiny_run, how, monkeypatch):
    monkeypatch.setattr("llmtuner.hparams.transformers_args.cpu_supports_bf16", lambda: True)  # slowly if need be
    metrics = run_exp({**tiny_run, "learning_rate": 2e-3, **how})
    assert metrics["eval_loss"]["last"] < metrics["eval_loss"]["first"]


def test_training_goes_on_from_an_adapter(tiny_run, tmp_path):
    first = run_exp(tiny_run)
    second = run_exp(
        {**tiny_run, "adapter_name_or_path": str(tmp_path / "adapter"), "output_dir": str(tmp_path / "second")}
    )
    assert second["eval_loss"]["first"] == pytest.approx(first["eval_loss"]["last"], abs=1e-3)


def test_evaluation_alone_writes_no_adapter(tiny_run, tmp_path):
    metrics = run_exp({**tiny_run, "do_eval": True, "do_train": False, "eval_on_start": False})
    assert metrics.keys() == {"eval_loss", "data"}
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize("how", [{}, {"bf16": True}, {"do_train": False, "do_eval": True}])
def test_nothing_of_a_run_is_left_in_memory(tiny_run, monkeypatch, how):
    """The next model has the GPU for itself: reference cycles are collected, then the cache is returned to the system."""
    monkeypatch.setattr("llmtuner.hparams.transformers_args.cpu_supports_bf16", lambda: True)
    run, when_emptied = [], []
    create_optimizer, evaluate_loss = PackedTrainer.create_optimizer, PackedTrainer.evaluate_loss

    def note_optimizer(self, *args, **kwargs):
        optimizer = create_optimizer(self, *args, **kwargs)
        run.append(weakref.ref(optimizer))
        return optimizer

    def note_model(self, dataset):
        run.extend(weakref.ref(thing) for thing in (self, self.model, *self.model.parameters()))
        return evaluate_loss(self, dataset)

    def empty_cache():
        when_emptied.append([reference() is None for reference in run])

    monkeypatch.setattr(PackedTrainer, "create_optimizer", note_optimizer)
    monkeypatch.setattr(PackedTrainer, "evaluate_loss", note_model)
    settings = {**tiny_run, **NO_FIGURES, **how}
    on_gpu = SimpleNamespace(is_available=lambda: True, empty_cache=empty_cache)
    monkeypatch.setattr("llmtuner.train.process.torch", SimpleNamespace(cuda=on_gpu))
    gc.disable()
    try:
        run_exp(settings)
    finally:
        gc.enable()
    assert len(run) > 20
    assert when_emptied == [[True] * len(run)]


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lora_target="w_pack"), "matches no"),
        (dict(dataset="document"), "Did you mean documents"),
        (dict(val_size=0.9999999), "leaves none"),
        (dict(val_size=1e-9), "holds out none"),
        (dict(cutoff_len=300), "reads at most 256"),
        (dict(model_name_or_path="nowhere"), "nowhere"),
        (dict(adapter_name_or_path="nowhere"), "nowhere"),
    ],
)
def test_bad_targets_and_data_are_refused(tiny_run, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run_exp({**tiny_run, **change})
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()


# --------------------------------------------------------------------------------------------------- create_new_adapter
@pytest.mark.slow
@pytest.mark.parametrize("earlier", [{}, {"use_dora": True, "additional_target": None}], ids=["embeddings", "dora"])
def test_a_new_adapter_is_merged_after_the_one_it_was_trained_on(tiny_run, tiny_model_dir, tmp_path, earlier):
    first, second = str(tmp_path / "adapter"), str(tmp_path / "second")
    plain = {**tiny_run, **NO_FIGURES, "eval_strategy": "no", "max_steps": 3, "learning_rate": 0.02}
    run_exp(plain | earlier)
    settings = {
        **plain,
        **SFT,
        "additional_target": None,
        "lora_rank": 2,
        "output_dir": second,
        "save_strategy": "steps",
    }
    settings |= {"adapter_name_or_path": first, "create_new_adapter": True, "save_steps": 3}
    run_exp(settings)
    base = {"model_name_or_path": str(tiny_model_dir)}
    export_model({**base, "adapter_name_or_path": first, "export_dir": str(tmp_path / "merged")})
    # The same run on the exported model: its first loss shows that the same weights were there.
    step_by_step = {**settings, "model_name_or_path": str(tmp_path / "merged"), "output_dir": str(tmp_path / "third")}
    del step_by_step["adapter_name_or_path"], step_by_step["create_new_adapter"]
    run_exp(step_by_step)
    assert losses_of(second) == pytest.approx(losses_of(tmp_path / "third"), rel=1e-4)
    for adapter, name in ((second, "both"), (f"{second}/checkpoint-3", "of the checkpoint")):
        export_model({**base, "adapter_name_or_path": adapter, "export_dir": str(tmp_path / name)})
    merge_adapter(tmp_path / "merged", tmp_path / "third", tmp_path / "one by one")
    wanted = load_model(tmp_path / "one by one").state_dict()
    for name in ("both", "of the checkpoint"):
        for key, tensor in load_model(tmp_path / name).state_dict().items():
            assert torch.allclose(tensor, wanted[key], atol=2e-4), (name, key)
    assert not torch.allclose(wanted["model.layers.0.mlp.down_proj.weight"], load_model(tmp_path / "merged").state_dict()["model.layers.0.mlp.down_proj.weight"], atol=2e-4)  # fmt: skip


def test_the_adapter_below_must_be_there_unchanged(tiny_run, tiny_model_dir, tmp_path):
    first, second = tmp_path / "adapter", tmp_path / "second"
    plain = {**tiny_run, **NO_FIGURES, "eval_strategy": "no", "max_steps": 1, "additional_target": None}
    run_exp(plain)
    on_it = {**plain, "adapter_name_or_path": str(first), "output_dir": str(second), "create_new_adapter": True}
    run_exp({**on_it, "lora_rank": 2, "save_strategy": "steps", "save_steps": 1})
    weights = first / "adapter_model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + b"x")
    with pytest.raises(UserError, match="merged adapter: sha256"):  # a checkpoint on another base is not resumed
        run_exp({**on_it, "lora_rank": 2, "max_steps": 1, "save_strategy": "steps", "save_steps": 1})
    weights.write_bytes(sound)
    with pytest.raises(UserError, match="nothing is not a LoRA adapter"):
        run_exp({**on_it, "adapter_name_or_path": str(tmp_path / "nothing"), "output_dir": str(tmp_path / "third")})
    with pytest.raises(UserError, match=r"was itself trained with create_new_adapter.*Export it"):
        run_exp({**on_it, "adapter_name_or_path": str(second), "output_dir": str(tmp_path / "third")})
    export = {"model_name_or_path": str(tiny_model_dir), "adapter_name_or_path": str(second)}
    for content, problem in ((weights.read_bytes()[:-1] + b"x", "has changed since"), (None, "that is missing")):
        if content is None:
            weights.unlink()
        else:
            weights.write_bytes(content)
        with pytest.raises(UserError, match=problem):
            export_model({**export, "export_dir": str(tmp_path / "merged")})
    assert not (tmp_path / "merged").exists()


# --------------------------------------------------------------------------------------------------------------- export
def test_an_export_without_adapter_writes_the_model_as_it_is(tiny_model_dir, tmp_path):
    export_model({"model_name_or_path": str(tiny_model_dir), "export_dir": str(tmp_path / "exported")})
    before, after = (load_model(Path(directory)).state_dict() for directory in (tiny_model_dir, tmp_path / "exported"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(load_tokenizer(tmp_path / "exported")) == len(load_tokenizer(tiny_model_dir))
