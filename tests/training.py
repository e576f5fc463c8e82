"""What tests of training runs share: the log of a run and files written for LLaMA-Factory."""

import json
import os
from pathlib import Path

import torch

from llmtuner.train.trainer import PackedTrainer


def gradients(of, inputs, along):
    """The value of a function, and its gradients along a direction."""
    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    value = of(*leaves)
    return value.detach(), torch.autograd.grad((value * along).sum(), leaves)


PT_FILE = """\
### model
model_name_or_path: models/chatglm3-6b

### method
stage: pt
do_train: true
finetuning_type: lora
lora_target: query_key_value,dense_h_to_4h,dense_4h_to_h,dense
additional_target: word_embeddings,output_layer

### ddp
ddp_timeout: 180000000
deepspeed: DEEPSPEED

### dataset
dataset: ja-wiki,ja-news_2023,zh-web,en-books
dataset_dir: data
cutoff_len: 1024
overwrite_cache: true
preprocessing_num_workers: 16

### output
output_dir: saves/chatglm3-6b/lora/pretrain
logging_steps: 100
save_steps: 10000
plot_loss: true
overwrite_output_dir: false

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 4
learning_rate: 1.0e-4
num_train_epochs: 1.0
lr_scheduler_type: cosine
warmup_steps: 0.1
fp16: true

### eval
val_size: 0.05
per_device_eval_batch_size: 1
evaluation_strategy: steps
eval_steps: 10000
"""
SFT_DATASETS = "ja-qa,ja-chat-1,ja-chat-2,ja-dolly_15k,zh-qa,zh-alpaca,en-qa,en-oasst2,ja-zh-translation"
SFT_FILE = (
    PT_FILE.replace("stage: pt", "stage: sft")
    .replace("additional_target: word_embeddings,output_layer\n", "")
    .replace("ja-wiki,ja-news_2023,zh-web,en-books", SFT_DATASETS + "\ntemplate: chatglm3")
    .replace("lora/pretrain", "lora/sft")
)


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


def ended_at(monkeypatch, step, number):
    """Sends this process a signal while a step is computed."""
    original = PackedTrainer.training_step

    def signalled(self, *args, **kwargs):
        if self.state.global_step == step and not self.stop_signal.received:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PackedTrainer, "training_step", signalled)


NO_FIGURES = {"plot_loss": False, "eval_on_start": False}
SFT = {"stage": "sft", "dataset": "dialogues"}
