"""LLaMA-Factory's settings that this trainer does not have: what changes nothing is accepted, the rest refused by group."""

import fnmatch
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Feature:
    """A feature that is not supported."""

    reason: str
    """Why not, and what to use instead; completes "... is not supported: "."""
    switches: dict[str, Any]
    """Settings that turn it on, with the value at which they do not; null always leaves them off."""
    options: tuple[str, ...] = ()
    """Settings (patterns) that have a meaning only while it is on, so that any value is accepted."""


@dataclass(frozen=True)
class IgnoredSetting:
    """Settings that change nothing here, whatever their value."""

    names: tuple[str, ...]
    default: Any = None
    note: str = ""
    """Printed, after the name, for a value other than the default."""


OTHER_OPTIMIZERS = (
    "the optimizers are those that transformers names in optim, such as adamw_torch, adafactor or lion_32bit"
)
ONE_BACKEND = "training runs under torchrun, with DDP or DeepSpeed ZeRO-2; each process computes the whole model"

UNSUPPORTED = (
    Feature("frozen weights are held in bf16 or fp16 (bf16: true), not in 8 or 4 bits", {"quantization_bit": None},
        ("quantization_*", "double_quantization")),
    Feature("a model is exported in its own precision; quantize the exported one (llmtuner's command gguf, or GPTQModel)",
        {"export_quantization_bit": None}, ("export_quantization_*",)),
    Feature("the export writes to a directory; upload that (hf upload)", {"export_hub_model_id": None}),
    Feature("the stages are pt and sft, without preference or reward models", {"ref_model": None, "reward_model": None},
        ("pref_*", "dpo_*", "kto_*", "ppo_*", "simpo_*", "ref_model_*", "reward_model_*", "ld_alpha")),
    Feature("models and data of text only are trained; leave it out for a model of text",
        {"image_max_pixels": 768 * 768, "image_min_pixels": 32 * 32, "image_do_pan_and_scan": False,
        "crop_to_patches": False, "video_max_pixels": 256 * 256, "video_min_pixels": 16 * 16, "video_fps": 2.0,
        "video_maxlen": 128, "use_audio_in_video": False, "audio_sampling_rate": 16_000, "freeze_vision_tower": True,
        "freeze_multi_modal_projector": True, "freeze_language_model": False}, ("media_dir",)),
    Feature(f"GaLore: {OTHER_OPTIMIZERS}", {"use_galore": False}, ("galore_*",)),
    Feature(f"APOLLO: {OTHER_OPTIMIZERS}", {"use_apollo": False}, ("apollo_*",)),
    Feature(f"BAdam: {OTHER_OPTIMIZERS}", {"use_badam": False}, ("badam_*",)),
    Feature(OTHER_OPTIMIZERS, {"use_adam_mini": False}),
    Feature("the loss is cross-entropy, summed over the target tokens of the whole batch",
        {"use_dft_loss": False, "use_asft_loss": False, "use_eaft_loss": False, "ignore_pad_token_for_loss": True},
        ("asft_alpha", "eaft_alpha")),
    Feature("LoRA starts from A at random and B = 0; PiSSA and OFT are not here, rsLoRA, DoRA and LoRA+ are",
        {"pissa_init": False}, ("pissa_*", "oft_*", "module_dropout")),
    Feature("layers are neither inserted nor skipped; freeze_trainable_layers trains some of those that are there",
        {"use_llama_pro": False, "mixture_of_depths": None}),
    Feature("the router of experts gets no loss of its own", {"moe_aux_loss_coef": None}),
    Feature("the model's own attention and positions are kept", {"shift_attn": False, "rope_scaling": None}),
    Feature("weights are loaded, never drawn at random; make a model of random weights first",
        {"train_from_scratch": False}),
    Feature("what is trained is held in fp32, so that small updates are not rounded away; set bf16: true",
        {"pure_bf16": False}),
    Feature("frozen norms keep their precision; leave it out", {"upcast_layernorm": False}),
    Feature("matrix products are computed in bf16, fp16 or fp32",
        {"fp8": False, "fp8_enable_fsdp_float8_all_gather": False}, ("fp8_*",)),
    Feature("each data set is tokenized once into a memory-mapped file, so that it need not fit into memory anyway",
        {"streaming": False}, ("buffer_size",)),
    Feature("tools are written in ChatGLM3's own format", {"tool_format": None}),
    Feature("tokens are added to tokenizer and embeddings before training: step2_merge_tokenizer.py, step3_resize_model.py",
        {"resize_vocab": False, "add_tokens": None, "add_special_tokens": None, "new_special_tokens_config": None},
        ("init_special_tokens",)),
    Feature("models are read from local directories; download the model and name its directory in model_name_or_path",
        {"model_revision": "main", "adapter_folder": None}),
    Feature("answers are generated and graded after training: step7_eval_chat.py",
        {"predict_with_generate": False, "compute_accuracy": False},
        ("do_sample", "temperature", "top_p", "top_k", "num_beams", "max_length", "max_new_tokens",
        "repetition_penalty", "length_penalty", "skip_special_tokens", "eval_num_beams", "generation_*",
        "sortish_sampler")),
    Feature("training needs no inference engine; export the model, and serve that (docs/serving.md)",
        {"infer_backend": "huggingface"}, ("vllm_*", "sglang_*", "infer_dtype", "offload_folder", "use_kv_cache")),
    Feature(f"KTransformers: {ONE_BACKEND}", {"use_kt": False}, ("kt_*",)),
    Feature(f"Megatron and HyperParallel: {ONE_BACKEND}",
        {**dict.fromkeys(("use_mca", "use_megatron_bridge", "use_hyper_parallel", "sequence_parallel"), False),
        **dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
        "context_parallel_size", "hyper_parallel_cp_size"), 1)},
        ("hyper_parallel_args", "virtual_pipeline_model_parallel_size", "recompute_*",
        "account_for_*_in_pipeline_split", "bias_activation_fusion", "apply_rope_fusion", "masked_softmax_fusion",
        "cross_entropy_loss_fusion", "moe_grouped_gemm", "moe_token_dispatcher_type", "calculate_per_token_loss",
        "use_distributed_optimizer", "overlap_param_gather", "overlap_grad_reduce", "use_packed_sequences",
        "mixed_precision", "megatron_pretrained_checkpoint", "export_hf_on_finish", "extra_config")),
    Feature("FSDP: the loss reads the output matrix as one tensor; share gradients and optimizer by deepspeed: ds_config_zero2.json",
        {"fsdp": ""}, ("fsdp_*",)),
    Feature("runs are followed by report_to: tensorboard or wandb, and by trainer_log.jsonl",
        {"use_swanlab": False}, ("swanlab_*",)),
    Feature("wrap the call in torch.profiler yourself, or set a breakpoint in PackedTrainer.compute_loss",
        {"enable_torch_profiler": False}, ("profiler_*", "profile_modules")),
    Feature("weights are written as safetensors only", {"save_safetensors": True}),
)  # fmt: skip

IGNORED = (
    IgnoredSetting(("trust_remote_code",), False, "no code of a model directory is run"),
    IgnoredSetting(("enable_liger_kernel", "use_liger_kernel", "use_unsloth", "use_unsloth_gc", "use_v1_kernels"),
        False, "no effect: fused_ops, chunked_loss and flash_attn take its place"),
    IgnoredSetting(("ray_num_workers",), 1, "no effect: torchrun starts the processes (NPROC_PER_NODE)"),
    IgnoredSetting(("ray_init_kwargs", "master_addr", "master_port"), None, "no effect: torchrun starts the processes"),
    IgnoredSetting(("hf_hub_token", "ms_hub_token", "om_hub_token"), None,
        "not read: set HF_TOKEN for data sets of the hub"),
    IgnoredSetting(("loraplus_lr_embedding",), 1e-6,
        "no effect: embeddings get no LoRA; embedding_learning_rate is theirs"),
    IgnoredSetting(("print_param_status",), False, "no effect: the number of trained parameters is printed"),
    # How rows are read and memory is used; text is never split into special tokens; thoughts are the chat template's matter;
    # logits are in fp32; tokens per second are always logged.
    IgnoredSetting(("preprocessing_batch_size", "use_fast_tokenizer", "low_cpu_mem_usage", "data_shared_file_system")),
    IgnoredSetting(("use_reentrant_gc", "split_special_tokens", "enable_thinking", "preserve_thinking")),
    IgnoredSetting(("upcast_lmhead_output", "include_effective_tokens_per_second")),
)  # fmt: skip

# Settings of this trainer that are null in LLaMA-Factory where they are left out.
NULL_IS_DEFAULT = (
    *("template", "dataset", "eval_dataset", "cache_dir", "packing", "preprocessing_num_workers", "additional_target"),
    *("interleave_probs", "freeze_extra_modules"),
)


@dataclass
class CompatResult:
    """What became of the settings of a file."""

    remaining: dict[str, Any] = field(default_factory=dict)
    """Those that are this trainer's, and those that nobody knows."""
    issues: list[tuple[tuple[str, ...], str]] = field(default_factory=list)
    """The settings of a group that ask for what is not supported, and why."""
    notes: list[str] = field(default_factory=list)
    """Lines to print about settings without effect."""


def split_settings(settings: dict[str, Any]) -> CompatResult:
    """Takes LLaMA-Factory's settings that this trainer does not have out of those that it is given."""
    result = CompatResult()
    on: dict[str, list[str]] = {}  # reason -> settings that ask for it
    for name, value in settings.items():
        ignored = next((entry for entry in IGNORED if name in entry.names), None)
        group = find_group(name)
        if ignored:
            if ignored.note and value not in (None, ignored.default):
                result.notes.append(f"{name}: {ignored.note}")
        elif group and name in group.switches:
            if value is not None and value != group.switches[name] and not (name == "fsdp" and not value):
                on.setdefault(group.reason, []).append(name)
        elif not group and not (value is None and name in NULL_IS_DEFAULT):
            result.remaining[name] = value
    for reason, names in on.items():
        asked = ", ".join(f"{name}: {json.dumps(settings[name], default=str)}" for name in names)
        result.issues.append((tuple(names), f"{asked} is not supported: {reason}"))
    return result


def find_group(name: str) -> Feature | None:
    """The group of unsupported settings that a name belongs to."""
    for group in UNSUPPORTED:
        if name in group.switches or any(fnmatch.fnmatchcase(name, pattern) for pattern in group.options):
            return group
    return None


def known_names() -> Iterator[str]:
    """Every name of the tables, without patterns."""
    for group in UNSUPPORTED:
        yield from (name for name in (*group.switches, *group.options) if "*" not in name)
    for entry in IGNORED:
        yield from entry.names
