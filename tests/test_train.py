"""Settings to adapter: a run learns, is exact however its batch is cut, goes on where it stopped, and refuses bad input."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_hparams import PT_FILE, SFT_FILE

from llmtuner.console import TrainingInterrupted, UserError
from llmtuner.data.packing import PackedDataset
from llmtuner.data.template import IGNORE_INDEX
from llmtuner.eval.bits_per_byte import bits_per_byte
from llmtuner.files import MARKER
from llmtuner.hparams import GRADIENT_CHECKPOINTING
from llmtuner.model.loading import load_model
from llmtuner.tokenizer.fast import load_tokenizer
from llmtuner.train import checkpointing
from llmtuner.train.callbacks import GracefulStopSignal
from llmtuner.train.trainer import PackedTrainer
from llmtuner.train.tuner import export_model, run_exp

ROOT = Path(__file__).resolve().parent.parent


STAGES = [("pt", "documents"), ("sft", "dialogues")]
EXACT = ("step", "loss", "grad_norm", "learning_rate", "embedding_learning_rate", "eval_loss")


def log_of(directory):
    """The lines of a run's log, without what depends on the clock."""
    lines = [
        json.loads(line) for line in (Path(directory) / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [{name: line[name] for name in EXACT if name in line} for line in lines]


def losses_of(directory):
    return [line["loss"] for line in log_of(directory) if "loss" in line]


# ------------------------------------------------------------------------------------------------------------- learning
@pytest.mark.parametrize(("stage", "dataset"), STAGES)
def test_training_learns_and_merges_to_the_same_logits(tiny_run, tiny_model_dir, tmp_path, stage, dataset):
    from peft import PeftModel

    metrics = run_exp({**tiny_run, "stage": stage, "dataset": dataset})
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
    monkeypatch.setattr("llmtuner.hparams.cpu_supports_bf16", lambda: True)  # slowly if need be
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


def test_lengths_of_what_is_trained_on(tiny_run, tmp_path):
    for number in range(3):
        (tmp_path / "documents.jsonl").open("a").write(json.dumps({"text": "river " * 40 * (number + 1)}) + "\n")
    lengths = run_exp({**tiny_run, "val_size": 0.05})["lengths"]
    assert lengths["edges"] == [2**power for power in range(4, 4 + len(lengths["edges"]))]
    assert len(lengths["counts"]) == len(lengths["edges"]) - 1
    assert sum(lengths["counts"]) in range(57, 63)
    assert lengths["counts"][-1] >= 1  # the long ones, uncut


def test_tokenized_once_and_again_when_the_text_changes(tiny_run, tmp_path):
    def cached():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/tokens.arrow")}

    run_exp({**tiny_run, "output_dir": str(tmp_path / "one")})
    before = cached()
    run_exp({**tiny_run, "output_dir": str(tmp_path / "two")})
    assert cached() == before
    with (tmp_path / "documents.jsonl").open("a", encoding="utf-8") as lines:
        lines.write('{"text": "又一条河。"}\n')
    run_exp({**tiny_run, "output_dir": str(tmp_path / "three")})
    assert len(cached()) == len(before) + 1


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


def test_rows_whose_text_another_data_set_holds_out_are_counted(tiny_run, tmp_path, capsys):
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    info["copy"] = info["documents"]
    info["part"] = {**info["documents"], "num_samples": 25}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    run = {**tiny_run, "val_size": 0, "eval_dataset": "part", "max_steps": 1, "plot_loss": False}
    metrics = run_exp({**run, "dataset": "documents,copy"})
    assert [metrics["data"][name]["held_out_elsewhere"] for name in ("documents", "copy")] == [25, 25]
    said = capsys.readouterr().out
    assert "held out elsewhere" in said
    assert "50 rows are not trained on: the same text is held out of another data set" in said
    with pytest.raises(UserError, match=r"data set documents: all 60 rows.* are also held out"):
        run_exp({**run, "eval_dataset": "copy", "output_dir": str(tmp_path / "none")})
    run_exp({**tiny_run, "output_dir": str(tmp_path / "share"), "max_steps": 1, "plot_loss": False})
    assert "held out" not in capsys.readouterr().out


def test_run_of_which_every_dialogue_is_dropped_is_refused(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("llmtuner.train.workflow.load_model", None)
    (tmp_path / "dialogues.jsonl").write_text(
        "".join(
            json.dumps({"instruction": f"{number} " + "river " * 60, "output": "yes"}) + "\n" for number in range(9)
        ),
        encoding="utf-8",
    )
    with pytest.raises(UserError, match=r"data set dialogues: all .* dialogues are dropped"):
        run_exp({**tiny_run, "stage": "sft", "dataset": "dialogues", "cutoff_len": 40})


def test_eval_dataset_and_unusable_rows(tiny_run, tmp_path):
    with (tmp_path / "dialogues.jsonl").open("a", encoding="utf-8") as lines:
        lines.write('{"instruction": "第？", "output": null}\n')
    settings = {**tiny_run, "dataset": "dialogues", "stage": "sft", "eval_dataset": "others", "val_size": 0}
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    info["others"] = {**info["dialogues"], "num_samples": 7}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    metrics = run_exp(settings)
    assert metrics["data"].keys() == {"dialogues"}
    assert metrics["data"]["dialogues"]["invalid"] == 1
    assert metrics["eval_loss"]["last"] < metrics["eval_loss"]["first"]
    [rejected] = [json.loads(line) for line in (tmp_path / "adapter" / "invalid_rows.jsonl").open(encoding="utf-8")]
    assert rejected["line"] == 61
    assert rejected["file"].endswith("dialogues.jsonl")


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


@pytest.mark.parametrize(("stage", "dataset"), STAGES)
def test_a_model_with_another_tokenizer_is_refused(tiny_run, tiny_model_dir, tmp_path, monkeypatch, stage, dataset):
    """A text that becomes a prefix of ids 0 would be trained on without a word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    other = tmp_path / "other"
    other.mkdir()
    for file in ("config.json", "model.safetensors"):
        (other / file).symlink_to(tiny_model_dir / file)
    backend = Tokenizer(WordLevel({"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "a": 3}))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(other)
    monkeypatch.setattr("llmtuner.train.workflow.load_model", None)  # refused before that
    with pytest.raises(UserError, match=r"chatglm3 template: it has no special token \[gMASK\], sop, <\|system\|>"):
        run_exp({**tiny_run, "model_name_or_path": str(other), "stage": stage, "dataset": dataset})


def test_tokenizer_larger_than_the_model_is_refused_before_it_is_loaded(
    tiny_run, tiny_model_dir, tmp_path, monkeypatch
):
    import shutil

    small = tmp_path / "small"
    shutil.copytree(tiny_model_dir, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 320}))
    monkeypatch.setattr("llmtuner.train.workflow.load_model", None)
    with pytest.raises(UserError, match="only 320 rows"):
        run_exp({**tiny_run, "model_name_or_path": str(small)})


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


# ------------------------------------------------------------------------------------------------------- one step, exact
def start_two_processes(settings, directory):
    """Starts the trainer under torchrun with ZeRO-2 in two processes on the CPU."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {**settings, "deepspeed": str(ROOT / "ds_config_zero2.json"), "output_dir": str(directory)}
    (directory / "settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    command += ["-m", "llmtuner", "train", str(directory / "settings.yaml")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, cwd=directory, **output)


def in_two_processes(settings, directory):
    started = start_two_processes(settings, directory)
    output, _ = started.communicate(timeout=300)
    assert started.returncode == 0, output[-12000:]
    return output


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


def test_batch_accumulated_or_shared_by_processes_learns_the_same(tiny_run, tmp_path):
    """Four sequences at once, one by one, and under ZeRO-2 in two processes: the same losses over 24 steps in fp32."""
    settings = {**tiny_run, "stage": "sft", "dataset": "dialogues", "max_steps": 24, "embedding_learning_rate": 2e-3}
    settings |= {"eval_steps": 12, "plot_loss": False}

    def cut(size, accumulation):
        return {**settings, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}

    run_exp({**cut(4, 1), "output_dir": str(tmp_path / "once")})
    run_exp({**cut(1, 4), "output_dir": str(tmp_path / "accumulated")})
    in_two_processes(cut(1, 2), tmp_path / "shared")
    wanted = log_of(tmp_path / "once")
    assert len([line for line in wanted if "loss" in line]) == 24
    for other in ("accumulated", "shared"):
        for own, line in zip(log_of(tmp_path / other), wanted, strict=True):
            assert own == pytest.approx(line, abs=1e-5), other


def test_fp16_scales_the_loss_with_trained_embeddings(tiny_run, tmp_path, monkeypatch):
    """Loss scaling needs trained weights in fp32. The scaler is put in by hand, for Accelerate offers it on GPUs only."""
    scales = []
    init, step = PackedTrainer.__init__, PackedTrainer.training_step

    def with_scaler(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=100)
        self.accelerator.native_amp = True
        self.accelerator.state._shared_state["_mixed_precision"] = "fp16"

    def noted(self, *args, **kwargs):
        scales.append(float(self.accelerator.scaler.get_scale()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PackedTrainer, "__init__", with_scaler)
    monkeypatch.setattr(PackedTrainer, "training_step", noted)
    monkeypatch.setattr("llmtuner.train.workflow.compute_dtype", lambda _: torch.float16)
    metrics = run_exp({**tiny_run, "max_steps": 30, "eval_steps": 30})
    assert scales[-1] < scales[0] == 2.0**40  # it overflowed, skipped these steps, and found a scale that fits
    assert metrics["eval_loss"]["last"] < metrics["eval_loss"]["first"]
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in saved.values())


def test_tokens_of_steps_without_a_line_count_too(tiny_run, tmp_path):
    every = run_exp({**tiny_run, "output_dir": str(tmp_path / "every")})
    few = run_exp({**tiny_run, "output_dir": str(tmp_path / "few"), "logging_steps": 4})
    assert few["tokens"] == every["tokens"] > 5 * 4 * 40
    assert few["padding_ratio"] == every["padding_ratio"]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_frozen_weights_are_held_as_they_are_multiplied(precision, dtype):
    from llmtuner.train.workflow import compute_dtype

    assert compute_dtype(SimpleNamespace(bf16=precision == "bf16", fp16=precision == "fp16")) == dtype


def test_log_has_what_people_watch(tiny_run, tmp_path):
    run_exp(
        {
            **tiny_run,
            "report_to": "tensorboard",
            "embedding_learning_rate": 1e-3,
            "stage": "sft",
            "dataset": "dialogues",
        }
    )
    lines = [json.loads(line) for line in (tmp_path / "adapter" / "trainer_log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    wanted = {"grad_norm", "learning_rate", "embedding_learning_rate", "tokens_per_second", "target_tokens_per_second"}
    wanted |= {"padding_ratio", "peak_memory_gb", "eta_seconds", "epoch"}
    assert all(wanted <= line.keys() for line in steps)
    assert all(line["embedding_learning_rate"] == pytest.approx(line["learning_rate"] / 5) for line in steps)
    assert all(0 < line["target_tokens_per_second"] < line["tokens_per_second"] for line in steps)
    assert steps[-1]["eta_seconds"] == 0
    assert "initial_loss/dialogues" in lines[0]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = (tmp_path / "adapter").rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    assert [point.value for point in accumulator.Scalars("train/loss")] == pytest.approx(
        [line["loss"] for line in steps], rel=1e-6
    )
    assert {"train/grad_norm", "train/tokens_per_second", "eval/loss"} <= set(accumulator.Tags()["scalars"])


# ---------------------------------------------------------------------------------------------------------- checkpoints
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


def ended_at(monkeypatch, step, number):
    """Sends this process a signal while a step is computed."""
    original = PackedTrainer.training_step

    def signalled(self, *args, **kwargs):
        if self.state.global_step == step and not self.stop_signal.received:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PackedTrainer, "training_step", signalled)


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_stopped_run_goes_on_as_if_it_never_had(saving_run, tmp_path, monkeypatch, capsys, logging_steps):
    """SIGTERM in the middle of an epoch, of a logging interval and between two saves; then Ctrl-C; then to the end."""
    saving_run |= {"logging_steps": logging_steps, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    run_exp({**saving_run, "output_dir": str(tmp_path / "whole")})
    stopped = {**saving_run, "output_dir": str(tmp_path / "stopped")}
    for step, number, code in ((4, signal.SIGTERM, 143), (9, signal.SIGINT, 130)):
        with monkeypatch.context() as patch:
            ended_at(patch, step, number)
            with pytest.raises(TrainingInterrupted, match=f"checkpoint-{step + 1}") as end:
                run_exp(stopped)
        assert end.value.exit_code == code
        assert "same command resumes" in str(end.value)
        assert not (tmp_path / "stopped" / "adapter_config.json").exists()
    run_exp(stopped)
    assert f"resuming from {tmp_path}/stopped/checkpoint-10" in capsys.readouterr().out
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_processes_stop_together_and_go_on(saving_run, tmp_path):
    """SIGTERM to torchrun under ZeRO-2: both processes save at the same step, and the next start goes on from there."""
    settings = {
        **saving_run,
        "max_steps": 120,
        "per_device_train_batch_size": 2,
        "save_steps": 1_000,
        "plot_loss": False,
    }
    settings |= {"eval_steps": 1_000, "eval_on_start": False}
    in_two_processes(settings, tmp_path / "whole")
    started = start_two_processes(settings, tmp_path / "stopped")
    log = tmp_path / "stopped" / "trainer_log.jsonl"
    while started.poll() is None and not (log.exists() and log.read_text().count("loss") > 5):
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)
    output, _ = started.communicate(timeout=300)
    [saved] = checkpointing.list_checkpoints(tmp_path / "stopped")
    assert started.returncode != 0
    assert 5 < checkpointing.checkpoint_step(saved) < 120
    assert f"{saved}. The same command resumes" in output
    assert f"resuming from {saved}" in in_two_processes(settings, tmp_path / "stopped")
    one, other = (log_of(tmp_path / name) for name in ("whole", "stopped"))
    assert len([line for line in one if "loss" in line]) == 120
    for own, line in zip(other, one, strict=True):
        assert own == pytest.approx(line, abs=1e-6)


def test_second_signal_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with GracefulStopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_damaged_newest_checkpoint_is_reported_and_the_one_before_used(saving_run, tmp_path, capsys):
    out = tmp_path / "adapter"
    metrics = run_exp(saving_run)
    assert [path.name for path in checkpointing.list_checkpoints(out)] == [
        "checkpoint-14",
        "checkpoint-12",
        "checkpoint-8",
        "checkpoint-4",
    ]
    wanted = log_of(out)
    assert run_exp(saving_run)["eval_loss"] == metrics["eval_loss"]  # it has finished: nothing is trained again
    assert log_of(out) == wanted
    with (out / "checkpoint-14" / "optimizer.pt").open("r+b") as file:  # same size, another byte
        file.seek(2_000)
        byte = file.read(1)
        file.seek(2_000)
        file.write(bytes([byte[0] ^ 1]))
    os.truncate(out / "checkpoint-12" / "adapter_model.safetensors", 1_000)
    (out / "checkpoint-8" / checkpointing.CHECKSUM_FILE).unlink()
    again = run_exp(saving_run)
    said = capsys.readouterr().out
    assert "checkpoint-14 failed verification (optimizer.pt has other bytes" in said
    assert "checkpoint-12 failed verification (adapter_model.safetensors has 1,000 of" in said
    assert "checkpoint-8 failed verification (checksums.json cannot be read" in said
    assert "resuming from" in said
    assert "checkpoint-4" in said
    assert log_of(out) == wanted
    assert again["eval_loss"] == metrics["eval_loss"]
    assert not checkpointing.verify_checkpoint(out / "checkpoint-14")


def test_named_checkpoint_is_gone_on_from_or_refused(saving_run, tmp_path, capsys):
    first = tmp_path / "adapter"
    run_exp(saving_run)
    second = {**saving_run, "output_dir": str(tmp_path / "second")}
    run_exp({**second, "resume_from_checkpoint": str(first / "checkpoint-8")})
    assert f"resuming from {first}/checkpoint-8" in capsys.readouterr().out
    assert log_of(tmp_path / "second") == log_of(first)
    with pytest.raises(UserError, match="nowhere cannot be resumed from"):
        run_exp({**second, "overwrite_output_dir": False, "resume_from_checkpoint": str(tmp_path / "nowhere")})


def test_limit_of_checkpoints_and_starting_anew(saving_run, tmp_path):
    out = tmp_path / "adapter"
    run_exp({**saving_run, "save_total_limit": 2})
    assert [path.name for path in checkpointing.list_checkpoints(out)] == ["checkpoint-14", "checkpoint-12"]
    with pytest.raises(UserError, match=r"learning_rate: 0\.005 -> 0\.001"):
        run_exp({**saving_run, "learning_rate": 1e-3})
    with (tmp_path / "documents.jsonl").open("a", encoding="utf-8") as lines:
        lines.write('{"text": "又一条河。"}\n')
    with pytest.raises(UserError, match="data set documents: "):
        run_exp(saving_run)
    run_exp({**saving_run, "learning_rate": 1e-3, "overwrite_output_dir": True, "max_steps": 5, "save_total_limit": 2})
    assert [path.name for path in checkpointing.list_checkpoints(out)] == ["checkpoint-5", "checkpoint-4"]
    assert len(losses_of(out)) == 5


def test_checkpoint_of_weights_alone_is_not_resumed(saving_run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "adapter"
    saving_run |= {"save_only_model": True, "plot_loss": False}
    with monkeypatch.context() as patch:
        ended_at(patch, 5, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted, match=r"checkpoint-6.*weights only, and the run cannot be resumed"):
            run_exp(saving_run)
    assert "a run that stops early cannot be resumed" in capsys.readouterr().out
    for changed in (saving_run, {**saving_run, "save_only_model": False}):
        with pytest.raises(
            UserError, match=f"checkpoint-6 cannot be resumed.*adapter_name_or_path: {out}/checkpoint-6"
        ):
            run_exp(changed)
    assert len(losses_of(out)) == 6  # and nothing was touched
    named = {"adapter_name_or_path": str(out / "checkpoint-6"), "output_dir": str(tmp_path / "second")}
    finished = {**saving_run, **named, "max_steps": 4}
    metrics = run_exp(finished)  # as the message says
    assert log_of(tmp_path / "second")[1]["learning_rate"] == saving_run["learning_rate"]
    assert run_exp(finished)["eval_loss"] == metrics["eval_loss"]  # a finished run needs no optimizer
    early = {**saving_run, "learning_rate": 0.0, "early_stopping_steps": 1, "output_dir": str(tmp_path / "early")}
    assert run_exp(early)["steps"] < 14
    assert run_exp(early)["steps"] < 14  # nor does one that has stopped early
    full = {**saving_run, "finetuning_type": "full", "additional_target": [], "output_dir": str(tmp_path / "full")}
    run_exp({**full, "max_steps": 6})
    with pytest.raises(UserError, match=r"checkpoint-4 cannot be resumed.*set model_name_or_path"):
        run_exp({**full, "max_steps": 6, "resume_from_checkpoint": str(tmp_path / "full" / "checkpoint-4")})


def test_checkpoint_of_weights_alone_is_not_resumed_under_deepspeed(saving_run, tmp_path):
    out = tmp_path / "shared"
    settings = {**saving_run, "per_device_train_batch_size": 2, "max_steps": 6, "save_only_model": True}
    in_two_processes({**settings, "plot_loss": False}, out)
    with pytest.raises(UserError, match=r"checkpoint-4 cannot be resumed: it was saved with save_only_model: true"):
        checkpointing.check_resumable(out / "checkpoint-4")
    (out / "checkpoint-4" / "global_step4").mkdir()  # where DeepSpeed keeps the optimizer's state
    checkpointing.check_resumable(out / "checkpoint-4")


def test_changed_intervals_take_effect_on_resume(saving_run, tmp_path, monkeypatch):
    out = tmp_path / "adapter"
    saving_run |= {"eval_on_start": False, "plot_loss": False}
    with monkeypatch.context() as patch:
        ended_at(patch, 5, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted):
            run_exp({**saving_run, "save_steps": 4, "eval_steps": 5, "logging_steps": 1})
    assert [path.name for path in checkpointing.list_checkpoints(out)] == ["checkpoint-6", "checkpoint-4"]
    assert [line["step"] for line in log_of(out) if "eval_loss" in line] == [5]
    changed = {"save_steps": 5, "eval_steps": 4, "logging_steps": 3, "save_total_limit": 2}
    with monkeypatch.context() as patch:
        ended_at(patch, 12, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted):
            run_exp({**saving_run, **changed})
    assert [path.name for path in checkpointing.list_checkpoints(out)] == ["checkpoint-13", "checkpoint-10"]
    assert [line["step"] for line in log_of(out) if "eval_loss" in line] == [5, 8, 12]
    assert [line["step"] for line in log_of(out) if "loss" in line] == [1, 2, 3, 4, 5, 6, 9, 12]
    strategies = {"save_strategy": "no", "eval_strategy": "epoch", "logging_strategy": "epoch"}
    run_exp({**saving_run, **strategies})
    assert [path.name for path in checkpointing.list_checkpoints(out)] == ["checkpoint-13", "checkpoint-10"]
    assert json.loads((out / "training_args.json").read_text())["logging_strategy"] == "epoch"


def test_settings_say_what_the_estimate_of_memory_decided(saving_run, tmp_path, monkeypatch, capsys):
    """And another GPU, for which it decides otherwise, may go on with the run."""
    out = tmp_path / "adapter"

    def recomputes(directory):
        return json.loads((directory / "training_args.json").read_text())[GRADIENT_CHECKPOINTING]

    saving_run["plot_loss"] = False
    with monkeypatch.context() as patch:
        patch.setattr("llmtuner.train.workflow.free_memory", lambda: 1)
        ended_at(patch, 5, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted):
            run_exp(saving_run)
    assert recomputes(out / "checkpoint-4") is recomputes(out / "checkpoint-6") is True
    monkeypatch.setattr("llmtuner.train.workflow.free_memory", lambda: 10**15)
    run_exp(saving_run)
    assert f"resuming from {out}/checkpoint-6" in capsys.readouterr().out
    assert recomputes(out / "checkpoint-6") is True
    assert recomputes(out / "checkpoint-8") is recomputes(out) is False
    monkeypatch.setattr("llmtuner.train.workflow.free_memory", lambda: 1)
    run_exp({**saving_run, "output_dir": str(tmp_path / "short")})
    assert recomputes(tmp_path / "short") is True


def test_full_disk_while_saving_keeps_what_is_older(saving_run, tmp_path, monkeypatch):
    import errno

    original = PackedTrainer._save_optimizer_and_scheduler

    def full(self, output_dir):
        original(self, output_dir)
        if self.state.global_step == 8:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PackedTrainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(UserError, match=r"disk filled up.*checkpoint-8") as error:
            run_exp({**saving_run, "save_total_limit": 1})
    assert "checkpoint-4 is untouched" in str(error.value)
    out = tmp_path / "adapter"
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["checkpoint-4"]
    run_exp(saving_run)
    assert len(losses_of(out)) == 14


def test_output_that_cannot_be_written_is_refused(tiny_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to.*Set output_dir"):
        run_exp({**tiny_run, "output_dir": str(tmp_path / "file" / "adapter")})


# ------------------------------------------------------------------------------------------------------ command line
@pytest.mark.parametrize(("content", "file"), [(PT_FILE, "documents"), (SFT_FILE, "dialogues")])
def test_files_written_for_the_original_project_run_as_they_are(tiny_run, tmp_path, content, file):
    """The settings of its steps 5 and 6, with other paths; DeepSpeed in one process, fp16 on a machine without a GPU."""
    paths = {"model_name_or_path": ROOT / "mini" / "base", "deepspeed": ROOT / "ds_config_zero2.json"}
    paths |= {"dataset_dir": tmp_path, "output_dir": tmp_path / "lora"}
    for name, path in paths.items():
        content = re.sub(rf"^{name}: .*$", f"{name}: {path}", content, flags=re.MULTILINE)
    (tmp_path / "settings.yaml").write_text(content, encoding="utf-8")
    entry = json.loads((tmp_path / "dataset_info.json").read_text())[file]
    names = yaml.safe_load(content)["dataset"].split(",")
    (tmp_path / "dataset_info.json").write_text(json.dumps(dict.fromkeys(names, entry)))
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    result = subprocess.run(
        [sys.executable, "-m", "llmtuner", "train", str(tmp_path / "settings.yaml")],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "did you mean warmup_ratio: 0.1?" in result.stdout
    assert "fp16 needs a GPU" in result.stdout
    assert (tmp_path / "lora" / "adapter_config.json").is_file()


def test_bad_input_on_the_command_line_is_one_message(tiny_run, tmp_path):
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({**tiny_run, "cutoff_len": 100_000}), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-m", "llmtuner", "train", str(tmp_path / "settings.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1
    assert "cutoff_len is 100,000" in result.stderr
    assert not (tmp_path / "adapter").exists()


# ------------------------------------------------------------------------------------------------ an earlier run's files
def test_settings_data_and_model_are_checked_before_anything_is_deleted(saving_run, tmp_path):
    out = tmp_path / "adapter"
    run_exp(saving_run)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = {**saving_run, "overwrite_output_dir": True}
    (tmp_path / "broken").mkdir()
    for wrong in (
        {"learing_rate": 1e-4},
        {"dataset": "nowhere"},
        {"model_name_or_path": str(tmp_path / "broken")},
        {"additional_target": "no_such_module"},
    ):
        with pytest.raises(UserError):
            run_exp({**again, **wrong})
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_changed_model_is_not_resumed_on(saving_run, tiny_model_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    run = {**saving_run, "model_name_or_path": str(model)}
    run_exp(run)
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x01")
    with pytest.raises(UserError, match="model checksum: "):
        run_exp(run)


def test_output_dir_of_another_program_is_left_alone(tiny_run, tmp_path):
    out = tmp_path / "adapter"
    (out / "checkpoint-500").mkdir(parents=True)
    (out / "checkpoint-500" / "adapter_model.safetensors").write_bytes(b"another trainer's")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="no run of this project wrote, such as checkpoint-500"):
            run_exp({**tiny_run, "overwrite_output_dir": overwrite})
    assert [str(path.relative_to(out)) for path in out.rglob("*")] == [
        "checkpoint-500",
        "checkpoint-500/adapter_model.safetensors",
    ]
    (out / "checkpoint-500").rename(tmp_path / "elsewhere")
    (out / "model.safetensors").write_bytes(b"a merged model of our own")
    (out / MARKER).write_text(json.dumps({"made_by": "llmtuner", "files": ["model.safetensors"]}))
    with pytest.raises(UserError, match=r"wrote, such as model\.safetensors"):
        run_exp({**tiny_run, "overwrite_output_dir": True})
    (out / "model.safetensors").unlink()
    (out / MARKER).unlink()
    (out / "notes.txt").write_text("mine")  # of no name that a run uses
    run_exp({**tiny_run, "max_steps": 1})
    assert (out / "notes.txt").read_text() == "mine"


def test_two_runs_in_one_output_dir(tiny_run, tmp_path):
    code = "import sys, time; from pathlib import Path; from llmtuner.locks import acquire_lock; "
    code += "acquire_lock(Path(sys.argv[1]), 'it'); print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path / "adapter" / ".lock")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"adapter is in use by process {holder.pid} "):
            run_exp(tiny_run)
    finally:
        holder.kill()
        holder.wait()
    run_exp({**tiny_run, "max_steps": 1})


def test_interrupted_run_that_overwrites_says_how_to_resume(saving_run, tmp_path, monkeypatch):
    run_exp(saving_run)
    with monkeypatch.context() as patch:
        ended_at(patch, 5, signal.SIGINT)
        with pytest.raises(TrainingInterrupted, match="again without overwrite_output_dir"):
            run_exp({**saving_run, "overwrite_output_dir": True})
    run_exp(saving_run)
    assert len(losses_of(tmp_path / "adapter")) == 14
