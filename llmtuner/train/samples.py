"""Answers a few fixed prompts during training, so that one can read how the model changes."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from llmtuner.console import UserError
from llmtuner.data.chat_template import get_template
from llmtuner.data.packing import PackedSequence
from llmtuner.data.template import Message
from llmtuner.files import atomic_write_text
from llmtuner.hparams import TrainArgs
from llmtuner.tokenizer.encoding import encode_batch
from llmtuner.train.trackers import GuardedTracker
from llmtuner.train.trainer import PackedTrainer, forward_packed

SAMPLES_FILE = "samples.jsonl"  # in output_dir: one line for each prompt and step
MAX_NEW_TOKENS = 32
LENGTH_MULTIPLE = 16
SHOWN_CHARS = 60


class SampleCallback(TrainerCallback):
    """Answers `sample_prompts` greedily before the first step, every `sample_steps` and after the last; rank 0 only.

    Nothing of it reaches the training: no random number is drawn, and its time is not training time. A resumed run keeps
    the lines up to its checkpoint.

    Args:
        tokenizer: the model's.
        args: prompts continue as documents in the pt stage, and are questions in the sft stage.

    Raises:
        UserError: if a prompt is too long for the model.
    """

    def __init__(self, trainer: PackedTrainer, tokenizer: Any, args: TrainArgs) -> None:
        self.trainer, self.tokenizer = trainer, tokenizer
        self.prompts, self.every = args.finetuning.sample_prompts, args.finetuning.sample_steps
        self.template = get_template(tokenizer, args.data.template, args.data.document_end_token)
        system: list[Message] = [{"role": "system", "content": args.data.default_system or ""}]
        system = system if args.data.default_system else []
        if args.finetuning.stage == "pt":
            self.ids = [[*self.template.prefix, *ids] for ids in encode_batch(tokenizer, self.prompts)]
        else:
            dialogues = [[*system, Message(role="user", content=prompt)] for prompt in self.prompts]
            start = self.template.answer_start
            self.ids = [self.template.encode_prompt(tokenizer, dialogue, start) for dialogue in dialogues]
        longest, limit = max(map(len, self.ids)), getattr(trainer.model.config, "max_position_embeddings", None)
        if limit is not None and longest + MAX_NEW_TOKENS > limit:
            raise UserError(
                f"sample_prompts: the longest has {longest:,} tokens; with an answer of {MAX_NEW_TOKENS} it exceeds the "
                f"model's context of {limit:,} tokens. Shorten it."
            )
        self.last_step: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            kept = [sample for sample in read_samples(self.trainer.output_dir) if sample["step"] <= state.global_step]
            kept = kept if state.global_step else []  # of an earlier run
            lines = "".join(map(_to_line, kept))
            atomic_write_text(self.trainer.output_dir / SAMPLES_FILE, lines)
            self.last_step = kept[-1]["step"] if kept else None
        if state.global_step == 0:
            self.sample(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self.sample(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.trainer.should_stop:  # finished early; a run that is to be resumed has not ended
            self.sample(state.global_step)

    def sample(self, step: int) -> None:
        """Writes and prints the answers after a step, unless they are there already."""
        if not self.trainer.is_world_process_zero() or self.last_step == step:
            return
        self.last_step = step
        with self.trainer.meter.paused():
            answers = continue_greedily(self.trainer, self.ids, self.template.stop_token_ids, MAX_NEW_TOKENS)
            texts = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
            texts = [text.rstrip("\ufffd") for text in texts]  # a last character of which bytes are missing
            samples = [
                {"step": step, "prompt": prompt, "answer": text}
                for prompt, text in zip(self.prompts, texts, strict=True)
            ]
            with (self.trainer.output_dir / SAMPLES_FILE).open("a", encoding="utf-8") as lines:
                lines.writelines(map(_to_line, samples))
            for sample in samples:
                text = " ".join(sample["answer"].split())
                shown = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
                tqdm.write(f"step {step:>6,}: {sample['prompt']} → {shown}")
            for callback in self.trainer.callback_handler.callbacks:
                if isinstance(callback, GuardedTracker) and isinstance(callback.tracker, TensorBoardCallback):
                    callback.guard(partial(_write_text, callback.tracker.tb_writer, samples))


def _write_text(writer: Any, samples: list[dict[str, Any]]) -> None:
    """Sends samples to TensorBoard, whose writer is None after the end."""
    for sample in samples if writer else ():
        writer.add_text(f"samples/{sample['prompt']}", sample["answer"], sample["step"])


def _to_line(sample: dict[str, Any]) -> str:
    return json.dumps(sample, ensure_ascii=False) + "\n"


def read_samples(output_dir: Path) -> list[dict[str, Any]]:
    """Returns the samples of a run, oldest first; a line that a killed process left incomplete is left out."""
    samples = []
    file = output_dir / SAMPLES_FILE
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            samples.append(json.loads(line))
        except ValueError:
            continue
    return samples


@torch.no_grad()
def continue_greedily(
    trainer: PackedTrainer, prompts: list[list[int]], stop_ids: list[int], max_new_tokens: int
) -> list[list[int]]:
    """Returns the continuations of prompts by the model in training, each without the token that ends it.

    Every pass computes complete sequences, as in training: this needs no cache, and works with every kind of attention.
    Their length is a multiple of `LENGTH_MULTIPLE`, so that compiled functions see few shapes.
    """
    model, training = trainer.model, trainer.model.training
    rows = [list(prompt) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    unfinished = list(range(len(prompts)))
    model.eval()
    try:
        for _ in range(max_new_tokens):
            with trainer.compute_loss_context_manager():
                outputs = forward_packed(model, trainer.attention, _right_padded(trainer, rows))
            logits = outputs.logits.reshape(len(rows), -1, outputs.logits.shape[-1])
            ends = torch.tensor([len(row) - 1 for row in rows], device=logits.device)
            tokens = logits[torch.arange(len(rows), device=logits.device), ends].argmax(dim=-1).tolist()
            unfinished = [index for index in unfinished if tokens[index] not in stop_ids]
            for index in unfinished:
                rows[index].append(tokens[index])
                answers[index].append(tokens[index])
            if not unfinished:
                break
    finally:
        model.train(training)
    return answers


def _right_padded(trainer: PackedTrainer, rows: list[list[int]]) -> dict[str, Any]:
    """Makes a batch of one document each; attention is causal, so that nothing depends on what follows a row's end."""
    length = -(-max(map(len, rows)) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    ids = numpy.zeros((len(rows), length), dtype=numpy.int64)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    sequences: list[PackedSequence] = [
        {
            "input_ids": padded,
            "labels": padded,
            "position_ids": numpy.arange(length),
            "doc_ids": numpy.zeros(0, dtype=numpy.int64),
        }
        for padded in ids
    ]
    return trainer._prepare_inputs(trainer.data_collator(sequences))
