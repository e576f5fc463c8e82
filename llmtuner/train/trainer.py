"""One training step: the loss, the parameter groups, an eval loss that is exact however batches are cut, and a bar."""

import time
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from llmtuner.data.packing import PackedCollator
from llmtuner.data.template import IGNORE
from llmtuner.hparams import FinetuningArguments


class ProgressBar(TrainerCallback):
    """One bar for the whole run with loss, learning rate and time left; an eval loss gets a line of its own."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc="training", unit="step", disable=not state.is_world_process_zero)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}, lr {float(logs['learning_rate']):.1e}")
        if "eval_loss" in logs and state.is_world_process_zero:
            tqdm.write(f"step {state.global_step:>6,}: eval loss {logs['eval_loss']:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class InitialLoss(TrainerCallback):
    """The loss of each data set before the first step, once the model has been prepared for its devices."""

    def __init__(self, trainer: "PackedTrainer", samples: dict[str, Any]) -> None:
        self.trainer, self.samples = trainer, samples
        self.losses: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.losses = {name: round(self.trainer.loss_on(sample), 4) for name, sample in self.samples.items()}


class PackedTrainer(Trainer):
    """transformers' Trainer over packed sequences.

    A batch holds `input_ids`, `labels`, `position_ids`, each (sequences, tokens). Labels are aligned with the ids and
    are shifted in `compute_loss`. There is no attention mask: positions that restart at 0 separate the documents.
    """

    model: Any  # a Glm, or peft's wrapper around one

    def __init__(self, finetuning: FinetuningArguments, collator: PackedCollator, **kwargs: Any) -> None:
        super().__init__(data_collator=collator, **kwargs)
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(ProgressBar())
        self.finetuning = finetuning
        self.collator = collator
        # Trainer shall count the trained tokens of the whole accumulated batch on all ranks, and divide by nothing else.
        self.model_accepts_loss_kwargs = True
        self.seconds_in_evaluation = 0.0

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy in nats, summed over this micro-batch and divided by the trained tokens of the whole batch.

        Set a breakpoint here: everything that a step learns from passes through.
        """
        summed, trained, outputs = self._summed_loss(model, inputs)
        if num_items_in_batch is None:
            loss = summed / trained.clamp(min=1)
        else:
            # Gradients are averaged over ranks afterwards, so each rank's share counts once per rank.
            loss = summed / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    @staticmethod
    def _summed_loss(model: Any, inputs: dict) -> tuple[torch.Tensor, torch.Tensor, Any]:
        outputs = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)
        targets = inputs["labels"][:, 1:].flatten()
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return (
            cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum"),
            (targets != IGNORE).sum(),
            outputs,
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Trainer's, with the embedding matrices in a group of their own if they have a learning rate of their own."""
        rate = self.finetuning.embedding_learning_rate
        if self.optimizer is None and rate is not None:
            groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
            decayed = set(self.get_decay_parameter_names(self.model))
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    embedding = "embed_tokens" in name or "lm_head" in name
                    groups.setdefault((embedding, name in decayed), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                        "lr": rate if embedding else self.args.learning_rate,
                    }
                    for (embedding, decay), parameters in groups.items()
                ],
                **options,
            )
        return super().create_optimizer(*args, **kwargs)

    def loss_on(self, dataset: Any) -> float:
        """Mean loss per trained token over a data set, in nats; the same on every rank."""
        began = time.perf_counter()
        counted = self.collator.tokens, self.collator.padding
        model = self._wrap_model(self.model, training=False)
        model.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        loader = self.get_eval_dataloader(dataset)
        for batch in loader:
            with torch.no_grad(), self.compute_loss_context_manager():
                summed, trained, _ = self._summed_loss(model, self._prepare_inputs(batch))
            totals += torch.stack([summed.double().cpu(), trained.double().cpu()])
        self.collator.tokens, self.collator.padding = counted  # padding is reported for training alone
        self.seconds_in_evaluation += time.perf_counter() - began
        totals = self.accelerator.reduce(totals.to(self.args.device), reduction="sum").cpu()
        return float(totals[0] / totals[1].clamp(min=1))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Logs `eval_loss` over all trained tokens; called by Trainer at the eval steps."""
        metrics = {f"{metric_key_prefix}_loss": self.loss_on(eval_dataset or self.eval_dataset)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
