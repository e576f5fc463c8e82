"""Which model is trained, how it is loaded, and where its merge goes."""

from dataclasses import dataclass
from typing import Literal

from llmtuner.hparams.setting import AT_LEAST_1, REQUIRED, setting

# Values of flash_attn -> transformers' names of attention; None: the trainer chooses.
ATTN_IMPLEMENTATIONS = {
    "auto": None,
    "disabled": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "varlen": "varlen",
}
ONE_ADAPTER = (lambda value: "," not in value, "one directory only")


@dataclass(frozen=True)
class ModelArguments:
    """Settings of model and export."""

    model_name_or_path: str = setting(REQUIRED, "Directory of the model to train: config, safetensors and tokenizer.")
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2", "varlen"] = setting(
        "auto",
        "Attention: varlen needs no mask; disabled is plain; auto: varlen for Glm where the GPU has it, or on a CPU.",
    )
    disable_gradient_checkpointing: bool | None = setting(
        None, "Keep all activations for the backward pass; left out: unless memory is short.", resume_safe=True
    )
    adapter_name_or_path: str | None = setting(
        None, "A trained adapter: training continues from its weights, an export merges it.", ONE_ADAPTER
    )
    create_new_adapter: bool = setting(
        False, "Merge adapter_name_or_path into the model in memory and train a new adapter; an export merges both."
    )
    export_dir: str | None = setting(None, "Where an export writes the merged model.", resume_safe=True)
    export_size: int = setting(2, "Largest size of one file of exported weights, in GB.", AT_LEAST_1, resume_safe=True)
    export_device: Literal["cpu", "auto"] = setting("cpu", "No effect: a merge needs no GPU.", resume_safe=True)
    export_legacy_format: bool = setting(
        False, "Pickle exported weights.", unsupported="weights are written as safetensors only", resume_safe=True
    )
