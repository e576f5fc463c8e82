"""LoRA: which modules get an adapter, what is trained in full beside it, and the merge back into plain weights."""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from llmtuner.console import InputError, whole_directory
from llmtuner.hparams import FinetuningArguments
from llmtuner.model.loading import load_model

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
    "special_tokens_map.json",
)


def linear_modules(model: PreTrainedModel) -> list[str]:
    """Names of all linear layers but the output layer."""
    output = model.get_output_embeddings()
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not output
        }
    )


def prepare_for_training(model: PreTrainedModel, finetuning: FinetuningArguments) -> torch.nn.Module:
    """Freezes what is not trained; what is trained is held in fp32, so that small updates are not rounded away.

    Raises:
        InputError: if a target names no module of this model.
    """
    if finetuning.finetuning_type == "full":
        return model.float()
    known = linear_modules(model)
    target = known if finetuning.lora_target == ["all"] else finetuning.lora_target
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for name in [*target, *finetuning.additional_target]:
        if name not in names:
            raise InputError(
                f"lora_target or additional_target {name!r} matches no module; this model has: {', '.join(known)}."
            )
    config = LoraConfig(
        r=finetuning.lora_rank,
        lora_alpha=finetuning.lora_alpha or 2 * finetuning.lora_rank,
        lora_dropout=finetuning.lora_dropout,
        use_rslora=finetuning.use_rslora,
        target_modules=target,
        modules_to_save=finetuning.additional_target or None,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def save_adapter(model: torch.nn.Module, directory: Path) -> None:
    """Writes the trained weights; the directory appears whole or not at all."""
    with whole_directory(directory) as partial:
        if isinstance(model, PeftModel):
            # Embeddings that are trained are saved as modules_to_save; frozen ones need not be.
            model.save_pretrained(str(partial), save_embedding_layers=False)
        elif isinstance(model, PreTrainedModel):
            model.save_pretrained(str(partial))


def merge_adapter(base: Path, adapter: Path, destination: Path, max_shard_gb: int = 2) -> None:
    """Adds an adapter to its base and saves a plain model with tokenizer, loadable without peft.

    The sum is formed in fp32 and stored in the base's dtype.

    Raises:
        InputError: if the adapter does not belong to this base.
    """
    model: Any = load_model(base)
    dtype = model.dtype
    if (adapter / "adapter_config.json").is_file():
        try:
            adapted = PeftModel.from_pretrained(model.float(), str(adapter))
        except (RuntimeError, ValueError) as error:
            raise InputError(f"the adapter {adapter} does not fit the model {base}: {error}") from error
        model = adapted.merge_and_unload()
    else:
        model = load_model(adapter)
    model = model.to(dtype)
    model.config.tie_word_embeddings = False
    with whole_directory(destination) as partial:
        model.save_pretrained(str(partial), max_shard_size=f"{max_shard_gb}GB")
        copy_tokenizer(base, partial)


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copies the tokenizer's files from one model directory to another."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
