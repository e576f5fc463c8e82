"""Runs one training job with one trainer, in the environment that runs this file, for `compare_trainers.py`.

    ENVIRONMENT/bin/python benchmarks/trainer_job.py TRAINER JOB.json      TRAINER: ours, trainer, llamafactory or trl

The others get rows of ids, labels and positions, so that tokenizing and packing cost them nothing. One callback, the same
for all, times the steps and evaluates the trained model on held-out rows.
"""

import contextlib
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from transformers import TrainerCallback

Job = dict[str, Any]
IGNORE_INDEX = -100


def main() -> None:
    trainer, job_file = sys.argv[1:]
    job: Job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    recorder = StepRecorder(job)
    {"ours": ours, "trainer": plain_trainer, "llamafactory": llamafactory, "trl": trl}[trainer](job, recorder)
    result = {**recorder.values(), "versions": versions(), "peak_memory_gb": peak_memory_gb()}
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


class StepRecorder(TrainerCallback):
    """Records when each step ended, logged losses and gradient norms, and the held-out loss after training."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.norms.append(float(logs.get("grad_norm", math.nan)))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.held_out = held_out_loss(model, self.job["held_out"])

    def values(self) -> Job:
        seconds = self.ends[-1] - self.ends[self.job["untimed"] - 1]
        steps = {"losses": self.losses, "gradient_norms": self.norms}
        return {"seconds": seconds, "held_out_loss": self.held_out, **steps}


@torch.no_grad()
def held_out_loss(model: Any, dataset: str) -> float:
    """Mean loss of the target tokens of held-out rows, one document or dialogue per row, in nats."""
    model.eval()
    total, count = 0.0, 0
    for row in load_from_disk(dataset):
        ids, labels = (torch.tensor([row[name]], device=model.device) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORE_INDEX, reduction="sum")
        total, count = total + float(loss), count + int((labels[0, 1:] != IGNORE_INDEX).sum())
    return total / count


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "peft", "accelerate", "trl", "llamafactory"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def peak_memory_gb() -> float:
    """Peak memory: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def shared_settings(job: Job) -> dict[str, Any]:
    """Settings that every trainer reads, under transformers' names."""
    settings = dict(output_dir=job["output"], max_steps=job["steps"], per_device_train_batch_size=job["batch"])
    settings |= dict(learning_rate=job["learning_rate"], lr_scheduler_type="constant", weight_decay=0.01, seed=42)
    settings |= dict(logging_steps=1, logging_nan_inf_filter=False, save_strategy="no", report_to="none")
    settings |= dict(train_sampling_strategy="sequential", disable_tqdm=True, use_cpu=job["cpu"], bf16=job["bf16"])
    return settings


def ours(job: Job, recorder: StepRecorder) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from benchmarks.compare_trainers import shuffled
    from llmtuner.train import workflow
    from llmtuner.train.tuner import run_exp

    class RecordedTrainer(workflow.PackedTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(recorder)

    def get_dataset(stage: str, *args: Any) -> Any:
        datasets = original(stage, *args)
        return datasets._replace(train=shuffled(datasets.train)) if stage == "sft" else datasets

    original, workflow.get_dataset = workflow.get_dataset, get_dataset
    workflow.PackedTrainer = RecordedTrainer  # type: ignore[misc]
    run_exp({**job["ours"], **shared_settings(job), "overwrite_output_dir": True, **job["lora"], **job["variant"]})


def adapted_model(job: Job, attention: str) -> Any:
    """The model with LoRA on all linear layers and both embedding matrices, as peft's documentation has it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(42)
    dtype = torch.bfloat16 if job["bf16"] else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False
    lora = job["lora"]
    targets = dict(target_modules="all-linear", exclude_modules=["lm_head"], modules_to_save=lora["additional_target"])
    rank = lora["lora_rank"]
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", **targets))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def plain_trainer(job: Job, recorder: StepRecorder) -> None:
    """transformers' Trainer with peft, and the collator that its documentation names for padded batches."""
    from transformers import Trainer, TrainingArguments

    variant = dict(job["variant"])
    model = adapted_model(job, variant.pop("attention", "sdpa"))
    isolated = variant.pop("isolated", False)

    def collate(rows: list[Job]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {}
        for name, pad in {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0}.items():
            batch[name] = torch.tensor([row[name] + [pad] * (longest - len(row[name])) for row in rows])
        batch["attention_mask"] = (batch["attention_mask"] > 0).long()
        if isolated:
            del batch["attention_mask"]
            positions = [row["position_ids"] + list(range(longest - len(row["position_ids"]))) for row in rows]
            batch["position_ids"] = torch.tensor(positions)
        return batch

    arguments = TrainingArguments(**{**shared_settings(job), "remove_unused_columns": False, **variant})
    data = load_from_disk(job["dataset"])
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[recorder]).train()


def llamafactory(job: Job, recorder: StepRecorder) -> None:
    # LLaMA-Factory imports torchaudio, which these stages never use: an empty module takes its place.
    import importlib.machinery
    import types

    empty = types.ModuleType("torchaudio")
    empty.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules.setdefault("torchaudio", empty)
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    from llamafactory.train.tuner import run_exp

    rows = Path(job["dataset"]).with_name("for_llamafactory")
    load_from_disk(job["dataset"]).remove_columns("position_ids").save_to_disk(str(rows))
    settings = {**shared_settings(job), **job["lora"], "lora_alpha": 2 * job["lora"]["lora_rank"]}
    # Its pt stage would train the prefix of every document too.
    settings |= dict(model_name_or_path=job["model"], stage="sft", do_train=True, finetuning_type="lora")
    settings |= dict(dataset="none", template="empty", cutoff_len=job["cutoff_len"], tokenized_path=str(rows))
    settings |= dict(overwrite_output_dir=True, disable_shuffling=True, **job["variant"])
    settings["additional_target"] = ",".join(job["lora"]["additional_target"])
    settings.pop("train_sampling_strategy")
    run_exp(settings, callbacks=[recorder])


def trl(job: Job, recorder: StepRecorder) -> None:
    """TRL's SFTTrainer; of such rows it reads ids and labels only, so packed documents attend to one another."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    variant = dict(job["variant"])
    model = adapted_model(job, variant.pop("attention", "sdpa"))
    settings = {**shared_settings(job), "max_length": job["cutoff_len"], "remove_unused_columns": False}
    settings["dataset_kwargs"] = {"skip_prepare_dataset": True}
    SFTTrainer(
        model=model,
        args=SFTConfig(**{**settings, **variant}),
        train_dataset=load_from_disk(job["dataset"]).select_columns(["input_ids", "labels"]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[recorder],
    ).train()


if __name__ == "__main__":
    main()
