"""The trainer: exact losses and learning rates, evaluation and early stopping."""

import json

import numpy
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from llmtuner.console import TrainingInterrupted, UserError
from llmtuner.data.loader import get_dataset
from llmtuner.data.packing import PackedDataset
from llmtuner.data.template import IGNORE_INDEX
from llmtuner.eval.bits_per_byte import bits_per_byte
from llmtuner.hparams import FinetuningArguments, get_train_args
from llmtuner.model.loading import load_model
from llmtuner.tokenizer.encoding import load_tokenizer
from llmtuner.train.callbacks import EarlyStopping
from llmtuner.train.flops import PRODUCT_SIDE
from llmtuner.train.loss import linear_cross_entropy_sum
from llmtuner.train.trainer import PackedTrainer, forward_packed
from llmtuner.train.tuner import run_exp
from tests.training import NO_FIGURES, STAGES, log_of, losses_of


def test_bits_per_byte_of_held_out_texts_are_logged_at_every_evaluation(tiny_run, tiny_model_dir, tmp_path):
    texts = {"zh": ["小镇的东边是一条河。", "一座山" * 40], "en": ["The ferry leaves at 9:30."]}
    run_exp(tiny_run, texts)
    lines = (tmp_path / "adapter" / "trainer_log.jsonl").read_text().splitlines()
    logged = [line for line in map(json.loads, lines) if "eval_loss" in line]
    model, tokenizer = load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)
    for language, own in texts.items():
        bits = [line[f"eval_bits_per_byte_{language}"] for line in logged]
        assert bits[0] == pytest.approx(bits_per_byte(model, tokenizer, own, tiny_run["cutoff_len"]), rel=1e-4)
        assert bits[-1] < bits[0]


def test_embedding_learning_rate_applies(tiny_run, tiny_model_dir, tmp_path):
    """With a rate of zero for the embeddings they stay as they were, and the adapter still learns."""
    run_exp({**tiny_run, "embedding_learning_rate": 0.0})
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    original = load_model(tiny_model_dir, torch.float32).get_input_embeddings().weight
    embeddings = [value for name, value in saved.items() if "embed_tokens" in name]
    assert embeddings
    assert torch.equal(embeddings[0], original)
    assert max(float(value.abs().max()) for name, value in saved.items() if "lora_B" in name) > 0


@pytest.mark.parametrize(
    "how",
    [
        dict(finetuning_type="freeze"),  # embeddings alone
        dict(),
        dict(learning_rate=0.0),
        dict(additional_target=[]),  # no embeddings
        dict(finetuning_type="freeze", embedding_learning_rate=None),
    ],
)
def test_each_learning_rate_is_logged_under_its_own_name(tiny_run, tmp_path, how, capsys):
    schedule = [1 - step / 6 for step in range(6)]  # linear, the rate that each of six steps was made with
    settings = {**tiny_run, "lr_scheduler_type": "linear", "embedding_learning_rate": 2e-3, "plot_loss": False, **how}
    run_exp(settings)
    lines = [line for line in log_of(tmp_path / "adapter") if "loss" in line]
    assert [line["learning_rate"] for line in lines] == pytest.approx(
        [settings["learning_rate"] * at for at in schedule]
    )
    bar = capsys.readouterr().err
    if settings["embedding_learning_rate"] is None or not settings["additional_target"]:
        assert all("embedding_learning_rate" not in line for line in lines)
        assert f"lr {settings['learning_rate']:.1e}," in bar
    else:
        assert [line["embedding_learning_rate"] for line in lines] == pytest.approx([2e-3 * at for at in schedule])
        assert f"lr {settings['learning_rate']:.1e}/2.0e-03," in bar


def test_loss_that_is_not_finite_stops_before_the_step_and_names_documents(tiny_run, tmp_path, monkeypatch):
    original = PackedTrainer._compute_loss_sum

    def poisoned(self, model, inputs):
        summed, trained = original(self, model, inputs)
        return summed * (float("nan") if self.state.global_step == 3 and model.training else 1), trained

    monkeypatch.setattr(PackedTrainer, "_compute_loss_sum", poisoned)
    with pytest.raises(UserError, match="loss of step 4 is not finite") as error:
        run_exp({**tiny_run, "save_strategy": "steps", "save_steps": 3})
    assert "documents.jsonl, line " in str(error.value)
    saved = load_file(tmp_path / "adapter" / "checkpoint-3" / "adapter_model.safetensors")
    assert all(value.isfinite().all() for value in saved.values())
    assert len(losses_of(tmp_path / "adapter")) == 3


@pytest.mark.parametrize("chunked_loss", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_without_target_tokens_has_loss_0(tiny_run, tmp_path, monkeypatch, accumulation, chunked_loss):
    """Such as one of the last tokens of documents that are one token longer than a sequence."""
    original = PackedDataset.__getitem__

    def without_targets(self, number):
        sequence = original(self, number)
        if number in (4, 5):
            sequence["labels"][:] = IGNORE_INDEX
        return sequence

    monkeypatch.setattr(PackedDataset, "__getitem__", without_targets)
    settings = {**tiny_run, "eval_strategy": "no", "eval_on_start": False, "plot_loss": False, "max_steps": 8}
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation}
    run_exp({**settings, "chunked_loss": chunked_loss, "train_sampling_strategy": "sequential"})
    losses = losses_of(tmp_path / "adapter")
    empty = {4 // accumulation, 5 // accumulation}
    assert [loss == 0 for loss in losses] == [step in empty for step in range(8)]
    assert all(loss >= 0 for loss in losses)  # numbers, that is
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(value.isfinite().all() for value in saved.values())


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
@pytest.mark.parametrize(("stage", "dataset"), STAGES)
def test_sequences_of_like_length_can_share_a_batch(tiny_run, tmp_path, strategy, stage, dataset):
    """All sequences are met once in an epoch; the empty ones behind them, which fill the last batch up, do no harm."""
    settings = {
        **tiny_run,
        "stage": stage,
        "dataset": dataset,
        "packing": False,
        "num_train_epochs": 1,
        "max_steps": -1,
    }
    settings |= {"eval_strategy": "no", "eval_on_start": False, "plot_loss": False}
    plain = run_exp({**settings, "output_dir": str(tmp_path / "plain")})
    grouped = run_exp({**settings, "train_sampling_strategy": strategy})

    def without_padding(metrics):
        return round(metrics["tokens"] * (1 - metrics["padding_ratio"]))

    assert grouped["steps"] == plain["steps"] > 3
    assert without_padding(grouped) == pytest.approx(without_padding(plain), abs=1)
    # Rebalancing is among processes, and here is one.
    assert (grouped["padding_ratio"] < plain["padding_ratio"]) == (strategy == "group_by_length")


def test_fp16_scales_the_loss_with_trained_embeddings(tiny_run, tmp_path, monkeypatch):
    """Loss scaling needs trained weights in fp32. The scaler is put in by hand, for Accelerate offers it on GPUs only."""
    scales = []
    init, step = PackedTrainer.__init__, PackedTrainer.training_step

    def with_scaler(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=100)
        self.accelerator.native_amp = True

    def noted(self, *args, **kwargs):
        scales.append(float(self.accelerator.scaler.get_scale()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PackedTrainer, "__init__", with_scaler)
    monkeypatch.setattr(AcceleratorState, "mixed_precision", "fp16")
    monkeypatch.setattr(PackedTrainer, "training_step", noted)
    monkeypatch.setattr("llmtuner.train.workflow.compute_dtype", lambda _: torch.float16)
    monkeypatch.setitem(PRODUCT_SIDE, "cpu", 64)  # CPUs take 20 s for the usual products in fp16
    metrics = run_exp({**tiny_run, "max_steps": 14, "eval_steps": 14})
    assert scales[-1] < scales[0] == 2.0**24  # it overflowed, skipped these steps, and found a scale that fits
    assert metrics["eval_loss"]["last"] < metrics["eval_loss"]["first"]
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in saved.values())


@pytest.mark.parametrize("setting", [None, True])
def test_batches_are_copied_while_computing_and_ddp_searches_only_if_asked(tiny_run, monkeypatch, setting):
    accelerators = []
    monkeypatch.setattr(PackedTrainer, "evaluate_loss", lambda self, _: accelerators.append(self.accelerator) or 1.0)
    run_exp({**tiny_run, "do_train": False, "do_eval": True, "ddp_find_unused_parameters": setting})
    [accelerator] = accelerators
    assert accelerator.non_blocking
    assert accelerator.ddp_handler.gradient_as_bucket_view
    assert accelerator.ddp_handler.find_unused_parameters == bool(setting)


# ----------------------------------------------------------------------------------------------------------------- bf16
class Products(TorchDispatchMode):
    """Collects the dtypes of the matrix products that are computed, forward and backward, by the name of their operator."""

    NAMES = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "linear")

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in self.NAMES or "attention" in name:
            inputs = args[:4]  # behind them attention's backward takes the logsumexp, in fp32
            self.found.setdefault(name, set()).update(
                value.dtype for value in inputs if isinstance(value, torch.Tensor)
            )
        return result


@pytest.fixture
def bf16(monkeypatch):
    """Settings of a run in bf16, which PyTorch computes on any CPU, slowly where it has no instructions for it."""
    monkeypatch.setattr("llmtuner.hparams.transformers_args.cpu_supports_bf16", lambda: True)
    return {**NO_FIGURES, "bf16": True}


@pytest.mark.parametrize("how", [{}, {"chunked_loss": False}])
@pytest.mark.parametrize(("stage", "dataset"), STAGES)
def test_a_bf16_run_multiplies_and_keeps_bf16(tiny_run, bf16, monkeypatch, stage, dataset, how):
    """In training and evaluation, in the output layer too; what is trained stays in fp32."""
    products, dtypes, kept = Products(), set(), []

    def keep(tensor):
        if tensor.is_floating_point() and tensor.ndim and tensor.shape[-1] >= 8:  # not angles, nor statistics of a norm
            kept.append(tensor)
        return tensor

    training_step, evaluate = PackedTrainer.training_step, PackedTrainer.evaluate

    def watched_step(self, *args, **kwargs):
        with products, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = training_step(self, *args, **kwargs)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        dtypes.update(tensor.dtype for parameter in trained for tensor in (parameter, parameter.grad))
        dtypes.add(loss.dtype)
        return loss

    def watched_evaluation(self, *args, **kwargs):
        with products:
            return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(PackedTrainer, "training_step", watched_step)
    monkeypatch.setattr(PackedTrainer, "evaluate", watched_evaluation)
    texts = {"zh": ["小镇的东边是一条河。"]} if stage == "pt" else {}
    metrics = run_exp({**tiny_run, **bf16, **how, "stage": stage, "dataset": dataset, "eval_on_start": True}, texts)
    assert {"mm", "addmm_", "baddbmm"} <= products.found.keys()
    assert {dtype for found in products.found.values() for dtype in found} == {torch.bfloat16}, products.found
    if not how:  # the plain loss keeps the logits in fp32
        assert {tensor.dtype for tensor in kept} == {torch.bfloat16}
    assert dtypes == {torch.float32}
    assert metrics["eval_loss"]["last"] < metrics["eval_loss"]["first"]


def test_autocast_keeps_no_casts(tiny_run, bf16, monkeypatch):
    """It would keep that of the output layer, of the call without logits, beside the loss's own: 0.6 GB of the real model."""
    caches = []

    def note(*_):
        caches.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))

    def watched_loss(*args):
        note()
        return linear_cross_entropy_sum(*args)

    def watched_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.model.get_output_embeddings().register_forward_hook(note)

    init = PackedTrainer.__init__
    monkeypatch.setattr(PackedTrainer, "__init__", watched_init)
    monkeypatch.setattr("llmtuner.train.trainer.linear_cross_entropy_sum", watched_loss)
    run_exp({**tiny_run, **bf16, "max_steps": 1})
    assert len(caches) > 4
    assert set(caches) == {(True, False)}


@pytest.mark.parametrize(("stage", "dataset"), STAGES)
def test_evaluation_alone_computes_in_bf16_as_training_does(tiny_run, bf16, stage, dataset):
    settings = {**tiny_run, **bf16, "stage": stage, "dataset": dataset}
    trained = run_exp({**settings, "eval_on_start": True, "max_steps": 1})
    alone = run_exp({**settings, "do_eval": True, "do_train": False, "output_dir": settings["output_dir"] + "2"})
    assert round(alone["eval_loss"], 4) == trained["eval_loss"]["first"]
    in_fp32 = {**settings, "bf16": False, "do_eval": True, "do_train": False}
    exact = run_exp({**in_fp32, "output_dir": settings["output_dir"] + "3"})["eval_loss"]
    assert alone["eval_loss"] != exact
    assert alone["eval_loss"] == pytest.approx(exact, rel=0.01)


# ------------------------------------------------------------------------------------------------------------ attention
def test_attention_gets_the_bounds_of_documents():
    positions = torch.tensor([[0, 1, 2, 0], [0, 1, 0, 1]])
    batch = {"input_ids": positions + 7, "position_ids": positions}
    batch |= {"seq_lens": [3, 1, 2, 2], "cu_seqlens": torch.tensor([0, 3, 4, 6, 8], dtype=torch.int32)}
    calls = {
        name: forward_packed(lambda **given: given, name, batch) for name in ("sdpa", "flash_attention_2", "varlen")
    }
    assert calls["sdpa"].keys() == {"input_ids", "position_ids", "use_cache"}
    flash = calls["flash_attention_2"]
    assert flash["input_ids"].shape == flash["position_ids"].shape == (1, 8)
    assert flash["cu_seq_lens_q"] is flash["cu_seq_lens_k"] is batch["cu_seqlens"]
    assert flash["max_length_q"] == flash["max_length_k"] == 3
    documents = calls["varlen"]["documents"]
    assert (documents.lengths, documents.cu_seqlens, documents.max_length) == ([3, 1, 2, 2], batch["cu_seqlens"], 3)


# ------------------------------------------------------------------------------------------------- eval_on_each_dataset
def with_second_dataset(tiny_run, tmp_path):
    info = json.loads((tmp_path / "dataset_info.json").read_text(encoding="utf-8"))
    info["short"] = {"file_name": "short.jsonl", "columns": {"prompt": "text"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    lines = "".join(json.dumps({"text": f"{number}: 柳絮"}) + "\n" for number in range(40))
    (tmp_path / "short.jsonl").write_text(lines, encoding="utf-8")
    return {**tiny_run, "dataset": "documents,short"}


def test_each_dataset_has_an_eval_loss_and_together_they_make_eval_loss(tiny_run, tmp_path):
    settings = with_second_dataset(tiny_run, tmp_path) | {"eval_on_each_dataset": True}
    run_exp(settings)
    lines = [json.loads(line) for line in (tmp_path / "adapter" / "trainer_log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "eval_loss" in line]
    assert len(lines) == 2
    args = get_train_args(settings)
    held_out = get_dataset("pt", args.data, args.training.seed, load_tokenizer(tiny_run["model_name_or_path"])).eval
    counts = [
        sum(int((part[number]["labels"][1:] != -100).sum()) for number in range(len(part)))
        for part in (held_out.select_dataset(0), held_out.select_dataset(1), held_out)
    ]
    for line in lines:
        losses = [line["eval_documents_loss"], line["eval_short_loss"]]
        assert losses[0] != pytest.approx(losses[1], abs=0.05)
        # Targets after a boundary within a sequence are none, so the counts of the parts sum to that of the whole.
        assert numpy.average(losses, weights=counts[:2]) == pytest.approx(line["eval_loss"], rel=1e-5)
    alone = run_exp({**settings, "do_train": False, "do_eval": True}).keys()
    assert alone == {"eval_loss", "eval_documents_loss", "eval_short_loss", "data"}


# ------------------------------------------------------------------------------------------------------- early stopping
def test_early_stopping_counts_evaluations_without_improvement():
    def due(*losses, patience=2):
        history = [{"eval_loss": loss, "step": step} for step, loss in enumerate(losses)] + [{"loss": 0.1}]
        return EarlyStopping(FinetuningArguments(early_stopping_steps=patience)).is_due(history)

    assert not due()
    assert not due(3.0, 2.0, 2.5)
    assert due(3.0, 2.0, 2.5, 2.0)
    assert not due(3.0, 2.5, 2.6, 2.4)
    assert due(3.0, 2.0, float("nan"), float("nan"))
    assert not due(float("nan"), 2.0)
    assert not due(1.0, 2.0, 3.0, patience=None)


def with_eval_losses(monkeypatch, losses):
    """Lets the evaluations of a run find these losses."""
    given = iter(losses)
    monkeypatch.setattr(PackedTrainer, "evaluate_loss", lambda self, dataset: next(given))


def test_a_run_that_stops_early_is_finished_and_stays_so(tiny_run, tmp_path, monkeypatch, capsys):
    settings = {**tiny_run, **NO_FIGURES, "max_steps": 9, "eval_steps": 1, "early_stopping_steps": 2}
    with_eval_losses(monkeypatch, [3.0, 2.0, 2.5, 2.5, 0.0])
    metrics = run_exp(settings)
    assert metrics["steps"] == 4
    assert "finished early, after step 4: eval_loss has not improved for 2 evaluations" in capsys.readouterr().out
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    with_eval_losses(monkeypatch, [])  # nothing is evaluated or trained again
    again = run_exp(settings)
    assert again["steps"] == 4
    assert again["eval_loss"] == metrics["eval_loss"]
    for name, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, weights[name])


def test_patience_is_the_same_after_a_restart(tiny_run, monkeypatch):
    settings = {**tiny_run, **NO_FIGURES, "max_steps": 9, "eval_steps": 1, "early_stopping_steps": 3}
    with_eval_losses(monkeypatch, [2.0, 2.5])
    stop_after_two(monkeypatch)
    with pytest.raises(TrainingInterrupted):
        run_exp(settings)
    monkeypatch.undo()
    with_eval_losses(monkeypatch, [2.5, 2.5, 0.0])
    assert run_exp(settings)["steps"] == 4  # the third evaluation without improvement, one of them before the restart


def stop_after_two(monkeypatch):
    finish = PackedTrainer._finish_step

    def finish_and_stop(self):
        finish(self)
        self.should_stop = self.state.global_step == 1  # the second step is being made

    monkeypatch.setattr(PackedTrainer, "_finish_step", finish_and_stop)


# ---------------------------------------------------------------------------------------------------------------- LoRA+
def test_loraplus_sets_the_rate_of_the_b_matrices_beside_that_of_the_embeddings(tiny_run, monkeypatch):
    optimizers = []
    create = PackedTrainer.create_optimizer

    def created(self, *args, **kwargs):
        optimizer = create(self, *args, **kwargs)
        optimizers.append((optimizer, {id(parameter): name for name, parameter in self.model.named_parameters()}))
        return optimizer

    monkeypatch.setattr(PackedTrainer, "create_optimizer", created)
    settings = {**tiny_run, **NO_FIGURES, "eval_strategy": "no", "max_steps": 2, "lr_scheduler_type": "constant"}
    settings |= {"learning_rate": 1e-3, "embedding_learning_rate": 1e-4}
    run_exp({**settings, "loraplus_lr_ratio": 16})
    rates = {
        names[id(parameter)]: group["lr"]
        for optimizer, names in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    kinds = {
        kind: {rate for name, rate in rates.items() if kind in name}
        for kind in ("lora_A", "lora_B", "embed_tokens", "lm_head")
    }
    assert kinds == {"lora_A": {1e-3}, "lora_B": {16e-3}, "embed_tokens": {1e-4}, "lm_head": {1e-4}}
    log = log_of(settings["output_dir"])
    assert [line["learning_rate"] for line in log if "loss" in line] == [1e-3, 1e-3]


def test_loraplus_changes_what_is_learned(tiny_run):
    settings = {**tiny_run, **NO_FIGURES, "eval_strategy": "no", "additional_target": None}
    run_exp(settings)
    run_exp({**settings, "loraplus_lr_ratio": 16, "output_dir": settings["output_dir"] + "2"})
    plain, plus = losses_of(settings["output_dir"]), losses_of(settings["output_dir"] + "2")
    assert plain[0] == plus[0]
    assert plus[-1] != pytest.approx(plain[-1], abs=1e-3)
