"""Runs one training job with one trainer, in the environment that runs this file, for `compare_trainers.py`.

    PEER/bin/python benchmarks/trainer_job.py TRAINER JOB.json      TRAINER: ours, trainer, llamafactory or trl

A peer gets ready rows (ids, labels, positions), so that its own tokenizing and packing cost it nothing. Steps are timed, and
the trained model is examined on held-out rows, by one callback, which is the same in all of them.
"""

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

Job = dict[str, Any]
IGNORE_INDEX = -100


def main() -> None:
    trainer, job_file = sys.argv[1:]
    job: Job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    import torch

    torch.set_num_threads(job["threads"])
    watch = watcher(job)
    {"ours": ours, "trainer": plain_trainer, "llamafactory": llamafactory, "trl": trl}[trainer](job, watch)
    result = {**watch.lines(), "versions": versions(), "peak_memory_gb": peak_memory_gb()}
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "peft", "accelerate", "trl", "llamafactory"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_gb() -> float:
    """Most memory in use at a time: of the GPU if there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def watcher(job: Job) -> Any:
    """A callback that notes when each step ended, the logged losses and gradient norms, and the held-out loss at the end."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.losses: list[float] = []
            self.norms: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if args.device.type == "cuda":
                import torch

                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))
                self.norms.append(float(logs.get("grad_norm", math.nan)))

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.held_out = held_out_loss(model, job)

        def lines(self) -> Job:
            seconds = self.ends[-1] - self.ends[job["untimed"] - 1]
            steps = {"losses": self.losses, "gradient_norms": self.norms}
            return {"seconds": seconds, "held_out_loss": self.held_out, **steps}

    return Watcher()


def held_out_loss(model: Any, job: Job) -> float:
    """Mean loss of the trained tokens of held-out rows, one document or dialogue a row, in nats."""
    import torch
    from datasets import load_from_disk

    model.eval()
    total = count = 0.0
    rows = load_from_disk(job["held_out"])
    with torch.no_grad():
        for row in rows:
            ids, labels = (torch.tensor([row[name]], device=model.device) for name in ("input_ids", "labels"))
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORE_INDEX, reduction="sum")
            total, count = total + float(loss), count + int((labels[0, 1:] != IGNORE_INDEX).sum())
    return total / count


def shared(job: Job) -> dict[str, Any]:
    """Settings that every trainer reads, under transformers' names."""
    return dict(
        output_dir=job["output"],
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.01,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        seed=42,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        use_cpu=job["cpu"],
        bf16=job["bf16"],
    )


def ours(job: Job, watch: Any) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from llmtuner.train import trainer as trainer_module
    from llmtuner.train.tuner import run_exp

    class Watched(trainer_module.PackedTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(watch)

    from benchmarks.compare_trainers import in_chance_order
    from llmtuner.train import workflow

    def get_dataset(stage: str, *args: Any) -> Any:
        datasets = original(stage, *args)
        return datasets._replace(train=in_chance_order(datasets.train)) if stage == "sft" else datasets

    original, workflow.get_dataset = workflow.get_dataset, get_dataset
    workflow.PackedTrainer = Watched  # type: ignore[misc]
    settings = {**job["ours"], **shared(job), "overwrite_output_dir": True, **job["lora"], **job["variant"]}
    run_exp(settings)


def adapted_model(job: Job, attention: str) -> Any:
    """The model with LoRA on all linear layers and both embedding matrices, as peft's documentation has it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(42)
    dtype = torch.bfloat16 if job["bf16"] else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False
    lora = job["lora"]
    config = LoraConfig(
        r=lora["lora_rank"],
        lora_alpha=2 * lora["lora_rank"],
        target_modules="all-linear" if lora["lora_target"] == "all" else lora["lora_target"],
        exclude_modules=["lm_head"],
        modules_to_save=lora["additional_target"] or None,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def plain_trainer(job: Job, watch: Any) -> None:
    """transformers' Trainer with peft, and the collator that its documentation names for padded batches."""
    import torch
    from datasets import load_from_disk
    from transformers import Trainer, TrainingArguments

    variant = dict(job["variant"])
    model = adapted_model(job, variant.pop("attention", "sdpa"))
    isolated = variant.pop("isolated", False)
    data = load_from_disk(job["dataset"])

    def collate(rows: list[Job]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0}
        batch = {
            name: torch.tensor([row[name] + [pad] * (longest - len(row[name])) for row in rows])
            for name, pad in fill.items()
        }
        if isolated:
            positions = [row["position_ids"] + list(range(longest - len(row["position_ids"]))) for row in rows]
            batch["position_ids"] = torch.tensor(positions)
            del batch["attention_mask"]
        else:
            batch["attention_mask"] = (batch["attention_mask"] > 0).long()
        return batch

    arguments = TrainingArguments(**{**shared(job), "remove_unused_columns": False, **variant})
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[watch])
    trainer.train()


def llamafactory(job: Job, watch: Any) -> None:
    # torchaudio is asked for and never used by these stages; an empty module answers.
    import importlib.machinery
    import types

    silent = types.ModuleType("torchaudio")
    silent.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules.setdefault("torchaudio", silent)
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    from datasets import load_from_disk
    from llamafactory.train.tuner import run_exp

    rows = Path(job["dataset"]).with_name("for_llamafactory")
    load_from_disk(job["dataset"]).remove_columns("position_ids").save_to_disk(str(rows))
    settings = {
        "model_name_or_path": job["model"],
        "stage": "sft",  # its pt stage would train the prefix of every document too
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": "none",
        "template": "empty",
        "cutoff_len": job["cutoff_len"],
        "tokenized_path": str(rows),
        "overwrite_output_dir": True,
        "disable_shuffling": True,
        "lora_alpha": 2 * job["lora"]["lora_rank"],
        **shared(job),
        **job["lora"],
        **job["variant"],
    }
    settings["additional_target"] = ",".join(job["lora"]["additional_target"])
    settings.pop("train_sampling_strategy")
    run_exp(settings, callbacks=[watch])


def trl(job: Job, watch: Any) -> None:
    """TRL's SFTTrainer; of ready rows it reads ids and labels, so packed documents see one another."""
    from datasets import load_from_disk
    from trl import SFTConfig, SFTTrainer

    variant = dict(job["variant"])
    model = adapted_model(job, variant.pop("attention", "sdpa"))
    rows = load_from_disk(job["dataset"])
    rows = rows.remove_columns([name for name in rows.column_names if name not in ("input_ids", "labels")])
    from transformers import AutoTokenizer

    arguments = SFTConfig(
        **{
            **shared(job),
            "max_length": job["cutoff_len"],
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "remove_unused_columns": False,
            **variant,
        }
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[watch],
    )
    trainer.train()


if __name__ == "__main__":
    main()
