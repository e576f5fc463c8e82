"""Selects what is trained (LoRA and embeddings, some modules, or everything), and saves it as an adapter."""

import re
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from llmtuner.console import UserError, llmtuner_command, print0
from llmtuner.files import translate_disk_errors
from llmtuner.hparams import EMBEDDING_MODULES, FinetuningArguments
from llmtuner.model.model_dir import APPENDED_ROWS, MERGED_ADAPTER, adapter_checksum, read_json
from llmtuner.outputs import finish_publishing, publish_files
from llmtuner.tokenizer.encoding import copy_tokenizer

NO_LORA_ON_LM_HEAD = "the output layer is trained in full or not at all. Put it into additional_target."
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_CONFIG_FILES = (ADAPTER_CONFIG, "config.json")  # the one that is there shows a complete adapter, and its kind
WEIGHT_FILES = (ADAPTER_WEIGHTS, "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")


# ------------------------------------------------------------------------------------------------- trainable parameters
@dataclass
class LoraOnMergedConfig(LoraConfig):
    """Configures an adapter that is trained on its base with an earlier adapter merged into it."""

    merged_adapter: dict[str, str] | None = None
    """`path` and `sha256` of the earlier adapter; an export merges it first."""


def init_adapter(
    model: PreTrainedModel, finetuning: FinetuningArguments, adapter: Path | None = None, create_new: bool = False
) -> torch.nn.Module:
    """Freezes what is not trained, and casts what is trained to fp32, so that small updates are not rounded away.

    Frozen parameters keep the dtype in which they were loaded.

    Args:
        adapter: directory of a trained LoRA adapter to continue training; its own LoRA settings apply.
        create_new: merge that adapter into the model instead, and train a new one.

    Returns:
        the model; for LoRA, in peft's wrapper.

    Raises:
        UserError: if a target names no module of this model, or the adapter does not fit it.
    """
    prepared: Any = model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft reads it
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # `_add_adapter` ties
        if adapter is not None and create_new:
            prepared = _create_adapter_on_merged(model, finetuning, adapter)
        elif adapter is not None:
            prepared = _load_adapter(model, finetuning, adapter)
            print0(f"resuming from {adapter}: {_describe(prepared)}")
        elif finetuning.finetuning_type == "lora":
            prepared = _add_adapter(model, _get_lora_config(model, finetuning))
        elif finetuning.finetuning_type == "freeze":
            _setup_freeze_tuning(model, finetuning)
    _upcast_trainable(prepared)
    _free_original_modules(prepared)
    return prepared


def _add_adapter(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Adds an adapter to a model. Embeddings that are one matrix stay one, which is trained and saved once.

    peft itself would train a copy for the input and leave the output layer with the frozen original or, with its
    `ensure_weight_tying`, save the matrix twice. Set afterwards, that keeps plain peft from loading it for the input alone.

    Raises:
        UserError: if the adapter has trained them apart.
    """
    head: Any = model.get_output_embeddings()
    config.ensure_weight_tying = False  # type: ignore[attr-defined]
    adapted: Any = get_peft_model(model, config)
    embeddings: Any = model.get_input_embeddings()
    original = getattr(embeddings, "original_module", embeddings)
    if original.weight is head.weight and isinstance(embeddings, ModulesToSaveWrapper):
        if model.get_output_embeddings() is not head:
            raise UserError(
                "the adapter has trained input and output embeddings apart, which are one matrix in this model."
            )
        head.weight = embeddings.modules_to_save["default"].weight
        config.ensure_weight_tying = True  # type: ignore[attr-defined]
    return adapted


def _setup_freeze_tuning(model: PreTrainedModel, finetuning: FinetuningArguments) -> None:
    """Freezes everything but some layers, or some of their modules, and named modules outside the layers."""
    outside = _resolve_embeddings(model, [*finetuning.additional_target, *finetuning.freeze_extra_modules])
    _check_names(outside, _modules_with_parameters(model), "additional_target")
    num_trainable = finetuning.freeze_trainable_layers
    if num_trainable is None:
        num_trainable = 0 if finetuning.additional_target else 2
    # Parameter name -> layer index and module: model.layers.3.mlp.down_proj.weight -> 3, mlp.
    matches = {name: re.search(r"\.(\d+)\.(\w+)", name) for name, _ in model.named_parameters()}
    positions = {name: (int(match[1]), match[2]) for name, match in matches.items() if match}
    inside = [name for name in finetuning.freeze_trainable_modules if name != "all"]
    _check_names(inside, sorted({module for _, module in positions.values()}), "freeze_trainable_modules")
    num_layers = 1 + max((layer for layer, _ in positions.values()), default=-1)
    first = max(0, num_layers - num_trainable)
    layers = range(first, num_layers) if num_trainable > 0 else range(min(-num_trainable, num_layers))
    for name, parameter in model.named_parameters():
        layer, module = positions.get(name, (-1, ""))
        in_layer = layer in layers and (module in inside or "all" in finetuning.freeze_trainable_modules)
        parameter.requires_grad_(in_layer or not {*name.split(".")}.isdisjoint(outside))
    if layers:
        modules = ", ".join(finetuning.freeze_trainable_modules)
        print0(f"training layers {layers[0]} to {layers[-1]} of {num_layers}: {modules}")


def _upcast_trainable(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _free_original_modules(model: torch.nn.Module) -> None:
    """Frees the frozen originals that peft keeps of modules trained in full; nothing reads them during training.

    For ChatGLM3-6B's two embedding matrices these are 1.3 GB.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for module in wrapper.original_module.modules():
                for name in list(module._parameters):
                    module._parameters[name] = None


def embedding_modules(model: PreTrainedModel) -> tuple[str, str]:
    """Returns the names of the modules of input and output embeddings; the former twice if they are one matrix."""
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = getattr(embeddings, "weight", None) is getattr(head, "weight", None)
    return names[id(embeddings)], names[id(embeddings if is_tied else head)]


def embedding_parameters(model: Any) -> set[int]:
    """Returns the `id` of every parameter of input and output embeddings, of their adapters as well."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return {id(parameter) for layer in layers for parameter in layer.parameters()}


def _resolve_embeddings(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """Replaces `embed_tokens` and `lm_head` by this model's names of its embeddings, a tied matrix once."""
    names = dict(zip(EMBEDDING_MODULES, embedding_modules(model), strict=True))
    return list(dict.fromkeys(names.get(name, name) for name in targets))


def find_all_linear_modules(model: PreTrainedModel) -> list[str]:
    """Returns the names of all linear modules but the output layer."""
    lm_head = model.get_output_embeddings()
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not lm_head
        }
    )


def _modules_with_parameters(model: PreTrainedModel) -> list[str]:
    return sorted({name.split(".")[-2] for name, _ in model.named_parameters()})


def _check_names(names: list[str], known: list[str], setting: str) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{setting} {name!r} matches no module; this model has: {', '.join(known)}.")


def _get_lora_config(
    model: PreTrainedModel, finetuning: FinetuningArguments, merged_adapter: dict[str, str] | None = None
) -> LoraConfig:
    additional, known = _resolve_embeddings(model, finetuning.additional_target), find_all_linear_modules(model)
    _check_names(additional, _modules_with_parameters(model), "additional_target")
    if finetuning.lora_target == ["all"]:
        target = [name for name in known if name not in additional]
    else:
        target = finetuning.lora_target
        if not {"lm_head", embedding_modules(model)[1]}.isdisjoint(target):
            raise UserError(f"lora_target lm_head: {NO_LORA_ON_LM_HEAD}")
        _check_names(target, known, "lora_target")
    if both := sorted({*target} & {*additional}):
        raise UserError(f"{', '.join(both)}: named in lora_target and in additional_target. Train it in one way.")
    by_row = [name for name in additional if name in embedding_modules(model) and finetuning.train_new_tokens_only]
    config: dict[str, Any] = dict(
        r=finetuning.lora_rank,
        lora_alpha=finetuning.lora_alpha or 2 * finetuning.lora_rank,
        lora_dropout=finetuning.lora_dropout,
        use_rslora=finetuning.use_rslora,
        use_dora=finetuning.use_dora,
        target_modules=target,
        modules_to_save=[name for name in additional if name not in by_row] or None,
        trainable_token_indices={name: _new_token_indices(model) for name in by_row} or None,
        task_type="CAUSAL_LM",
    )
    return LoraOnMergedConfig(**config, merged_adapter=merged_adapter) if merged_adapter else LoraConfig(**config)


def _new_token_indices(model: PreTrainedModel) -> list[int]:
    """Returns the embedding rows that step 3 appended for new tokens."""
    first_and_end = getattr(model.config, APPENDED_ROWS, None)
    if not first_and_end:
        raise UserError(
            f"{model.config.name_or_path} was not resized by step 3: its config.json has no {APPENDED_ROWS}, which "
            "train_new_tokens_only needs. Resize it again (step3_resize_model.py), or leave train_new_tokens_only out."
        )
    return list(range(*first_and_end))


def _create_adapter_on_merged(model: PreTrainedModel, finetuning: FinetuningArguments, adapter: Path) -> PeftModel:
    """Merges a LoRA adapter into its base, each parameter in its own dtype, and adds a new adapter."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    rank = read_json(adapter / ADAPTER_CONFIG).get("r") if (adapter / ADAPTER_CONFIG).is_file() else None
    earlier = replace(finetuning, lora_rank=rank or finetuning.lora_rank)
    # The new adapter is initialized, on the CPU, as it would be on the exported model.
    with torch.random.fork_rng(devices=[]):
        merged: Any = _load_adapter(model, earlier, adapter).merge_and_unload()
    for name, parameter in merged.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    print0(f"{adapter} is merged into the model in memory; a new adapter is trained on that")
    merged_adapter = {"path": str(adapter.resolve()), "sha256": adapter_checksum(adapter)}
    return _add_adapter(merged, _get_lora_config(merged, finetuning, merged_adapter))


def _load_adapter(model: PreTrainedModel, finetuning: FinetuningArguments, adapter: Path) -> PeftModel:
    """Loads a LoRA adapter onto its base, to continue training."""
    finish_publishing(adapter)
    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (adapter / name).is_file()]
    if missing or finetuning.finetuning_type != "lora":
        why = f"{adapter} has no {missing[0]}" if missing else f"finetuning_type is {finetuning.finetuning_type}"
        raise UserError(
            f"only a LoRA adapter can be trained further: {why}. Merge what was trained and start from the merged model."
        )
    settings = read_json(adapter / ADAPTER_CONFIG)
    if settings.get(MERGED_ADAPTER):
        raise UserError(
            f"{adapter} was itself trained with create_new_adapter, on a base with another adapter merged into it. Export "
            f"it ({llmtuner_command()} export), and train on the exported model."
        )
    rank = settings.get("r")
    if rank != finetuning.lora_rank:
        raise UserError(
            f"the adapter {adapter} has rank {rank}, but lora_rank is {finetuning.lora_rank}. Set lora_rank: {rank}; "
            "an adapter keeps its rank and its targets."
        )
    try:
        config: Any = PeftConfig.from_pretrained(str(adapter))
        config.inference_mode = False
        adapted: Any = _add_adapter(model, config)
        _upcast_trainable(adapted)  # before its weights are loaded, or the model's dtype would round them
        weights = load_file(adapter / ADAPTER_WEIGHTS)
        if differing := weights.keys() ^ get_peft_model_state_dict(adapted, save_embedding_layers=False).keys():
            raise ValueError(f"only one of them has {min(differing)}")
        set_peft_model_state_dict(adapted, weights)
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the adapter {adapter} does not fit the model {model.config.name_or_path}: {error}. Name the model it was "
            "trained on."
        ) from error
    if not {"lm_head", embedding_modules(model)[1]}.isdisjoint(
        config.target_modules
    ):  # the loss reads the matrix, not the layer
        raise UserError(f"the adapter {adapter} holds LoRA of lm_head: {NO_LORA_ON_LM_HEAD}")
    return adapted


def _describe(adapted: Any) -> str:
    config = adapted.peft_config["default"]
    others = [*(config.modules_to_save or []), *(f"rows of {name}" for name in config.trainable_token_indices or [])]
    return f"rank {config.r} on {', '.join(sorted(config.target_modules))}; also {', '.join(others) or 'nothing else'}"


# --------------------------------------------------------------------------------------------------------------- saving
def save_adapter(
    model: torch.nn.Module, directory: Path, tokenizer_from: Path, trained: dict[str, torch.Tensor] | None = None
) -> None:
    """Saves what was trained, and the base's tokenizer, in a run's directory beside its logs and checkpoints.

    An older adapter of any kind is replaced completely or, if the process is killed, not at all (`publish_files`).

    Args:
        trained: parameter name -> trained tensor; by default those of the model.

    Raises:
        UserError: if it cannot be written; an older adapter is then unchanged.
    """
    if directory.resolve() == tokenizer_from.resolve():
        raise UserError(f"{directory} holds the base model of this run. Set another output_dir.")
    partial = directory / ".partial"
    try:
        with translate_disk_errors(directory):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write_adapter(model, partial, trained)
            copy_tokenizer(tokenizer_from, partial)
            publish_files(
                partial,
                [old.name for pattern in (*ADAPTER_CONFIG_FILES, *WEIGHT_FILES) for old in directory.glob(pattern)],
            )
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_adapter(model: Any, directory: Path, trained: dict[str, torch.Tensor] | None) -> None:
    if isinstance(model, PeftModel):
        # Embeddings that are trained are saved as modules_to_save; frozen ones need not be.
        model.save_pretrained(str(directory), save_embedding_layers=False, state_dict=trained)
        (directory / "README.md").unlink(missing_ok=True)  # an empty form
    else:
        if trained is None:
            trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        model.save_pretrained(str(directory), state_dict=trained)
