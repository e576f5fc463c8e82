"""Every setting of a training run or an export, under LLaMA-Factory's names, with all problems reported at once."""

import difflib
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from llmtuner.console import InputError


@dataclass
class ModelArguments:
    """Which model, and how it is loaded."""

    model_name_or_path: str
    """Directory of the model to train: config, safetensors and tokenizer."""
    flash_attn: str = "auto"
    """Attention kernel: `disabled` (plain matrix products), `sdpa`, `fa2`; `auto` is sdpa on a GPU, disabled on a CPU."""
    adapter_name_or_path: str | None = None
    """Directory of a trained adapter, for export."""
    export_dir: str | None = None
    """Where `export_model` writes the merged model."""
    export_size: int = 2
    """Largest size of one file of exported weights, in GB."""


@dataclass
class DataArguments:
    """Which rows, in which shares, cut and packed how."""

    dataset: list[str] = field(default_factory=list)
    """Names from dataset_info.json; a list, or one string with commas."""
    dataset_dir: str = "data"
    """Directory of dataset_info.json."""
    corpus_dir: str = "."
    """Directory in which the file names of dataset_info.json are looked up."""
    cache_dir: str = "cache"
    """Where tokenized data sets are kept for the next run."""
    mix_strategy: str = "concat"
    """`concat` takes every row once; `interleave_under` draws by interleave_probs until one set is used up,
    `interleave_over` until every set has been seen, repeating those that are used up."""
    interleave_probs: list[float] | None = None
    """Share of each data set in the trained tokens, in the order of `dataset`; must sum to 1."""
    template: str = "chatglm3"
    """Chat format of the sft stage."""
    cutoff_len: int = 1024
    """Tokens in one packed sequence; a longer document goes on in the next, a longer dialogue is cut."""
    max_samples: int | None = None
    """Reads at most this many rows of each data set."""
    val_size: float = 0.05
    """Share of documents or dialogues held out for the eval loss, chosen by a hash of their text."""
    max_eval_sequences: int = 512
    """At most this many packed sequences are used for the eval loss."""
    preprocessing_num_workers: int = 1
    """Processes that tokenize."""


@dataclass
class FinetuningArguments:
    """What is trained."""

    stage: str = "pt"
    """`pt`: continued pretraining on documents; `sft`: instruction tuning on dialogues."""
    finetuning_type: str = "lora"
    """`lora` trains low-rank adapters (and additional_target in full), `full` every parameter."""
    lora_rank: int = 8
    lora_alpha: int | None = None
    """Scale of the adapter; by default twice the rank."""
    lora_dropout: float = 0.0
    lora_target: list[str] = field(default_factory=lambda: ["all"])
    """Modules that get an adapter: names, or `all` linear layers except the output layer."""
    additional_target: list[str] = field(default_factory=list)
    """Modules trained in full beside the adapter, such as embed_tokens and lm_head."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732): keeps high ranks learning."""
    embedding_learning_rate: float | None = None
    """Learning rate of the embedding matrices; by default that of everything else."""
    plot_loss: bool = False
    """Draw training_loss.png and eval_loss.png into output_dir."""


Arguments = tuple[ModelArguments, DataArguments, TrainingArguments, FinetuningArguments]

STAGES = ("pt", "sft")
FINETUNING_TYPES = ("lora", "full")
MIX_STRATEGIES = ("concat", "interleave_under", "interleave_over")
TEMPLATES = ("chatglm3",)
ATTENTION = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}
# The original ChatGLM3 code's names of modules, and Glm's.
MODULE_NAMES = {
    "query_key_value": ["q_proj", "k_proj", "v_proj"],
    "dense": ["o_proj"],
    "dense_h_to_4h": ["gate_up_proj"],
    "dense_4h_to_h": ["down_proj"],
    "word_embeddings": ["embed_tokens"],
    "output_layer": ["lm_head"],
}


def read_args(args: dict[str, Any] | str | Path | None = None) -> dict[str, Any]:
    """Settings from a dict, a YAML file, or (None) a command line that names a YAML file.

    Raises:
        InputError: if the file does not exist or holds no settings.
    """
    if isinstance(args, dict):
        return dict(args)
    if args is None:
        if len(sys.argv) != 2:
            raise InputError("give one YAML file of settings: python -m llmtuner train FILE.yaml")
        args = sys.argv[1]
    import yaml

    try:
        settings = yaml.safe_load(Path(args).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the settings file {args}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise InputError(f"{args} is not valid YAML: {error}.") from error
    if not isinstance(settings, dict):
        raise InputError(f"{args} holds no settings. Write lines of the form `name: value`.")
    return settings


def override(settings: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """Settings with those replaced that a command line names as `--name value`.

    Raises:
        InputError: if the words are not pairs of that form.
    """
    import yaml

    names, values = words[::2], words[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        raise InputError(f"settings on the command line have the form --name value; got: {' '.join(words)}")
    return {**settings, **{name[2:]: yaml.safe_load(value) for name, value in zip(names, values, strict=True)}}


def get_train_args(args: dict[str, Any] | str | Path | None = None) -> Arguments:
    """Checks settings and sorts them into model, data, training and finetuning arguments.

    Raises:
        InputError: one message with every problem found.
    """
    settings = {name: _number(value) for name, value in read_args(args).items()}
    ratio = settings.pop("warmup_ratio", None)
    classes = (ModelArguments, DataArguments, TrainingArguments, FinetuningArguments)
    owner = {f.name: cls for cls in classes for f in fields(cls) if f.init}
    problems = []
    for name in settings:
        if name not in owner:
            near = difflib.get_close_matches(name, owner, n=1)
            problems.append(f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    for name in ("dataset", "lora_target", "additional_target", "interleave_probs"):
        if isinstance(settings.get(name), str):
            settings[name] = [part.strip() for part in settings[name].split(",") if part.strip()]
    for name in ("lora_target", "additional_target"):
        if isinstance(settings.get(name), list):
            settings[name] = [own for given in settings[name] for own in MODULE_NAMES.get(given, [given])]
    if isinstance(settings.get("interleave_probs"), list):
        settings["interleave_probs"] = [float(share) for share in settings["interleave_probs"]]
    if "model_name_or_path" not in settings:
        problems.append("model_name_or_path is not given")
    problems += _contradictions(settings)
    if problems:
        raise InputError("settings:\n  - " + "\n  - ".join(problems))

    def build(cls: type) -> Any:
        return cls(**{name: value for name, value in settings.items() if owner[name] is cls})

    if ratio is not None:
        settings["warmup_steps"] = float(ratio)  # transformers takes a share in the place of a count
    if not torch.cuda.is_available():
        settings.setdefault("use_cpu", True)
    try:
        training = build(TrainingArguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"settings: {error}") from error
    return build(ModelArguments), build(DataArguments), training, build(FinetuningArguments)


def _number(value: Any) -> Any:
    """YAML takes 1e-4 for text, because it has no dot; people write it so."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) else value


def _contradictions(settings: dict[str, Any]) -> list[str]:
    problems = []
    for name, known, default in (
        ("stage", STAGES, "pt"),
        ("finetuning_type", FINETUNING_TYPES, "lora"),
        ("mix_strategy", MIX_STRATEGIES, "concat"),
        ("template", TEMPLATES, "chatglm3"),
        ("flash_attn", tuple(ATTENTION), "auto"),
    ):
        if settings.get(name, default) not in known:
            problems.append(f"{name} is {settings[name]!r}; it can be {' or '.join(known)}")
    probs, datasets = settings.get("interleave_probs"), settings.get("dataset") or []
    if probs is not None:
        if len(probs) != len(datasets):
            problems.append(f"interleave_probs has {len(probs)} shares for {len(datasets)} data sets")
        if abs(sum(probs) - 1) > 1e-6 or min(probs, default=0) < 0:
            problems.append(f"interleave_probs sums to {sum(probs):.4g}; shares are not negative and sum to 1")
    if settings.get("mix_strategy", "concat") != "concat" and probs is None:
        problems.append(f"mix_strategy {settings['mix_strategy']} needs interleave_probs")
    if not 0 <= settings.get("val_size", 0.05) < 1:
        problems.append(f"val_size is {settings['val_size']}; it is a share of the documents, from 0 to below 1")
    if settings.get("cutoff_len", 1024) < 8:
        problems.append(f"cutoff_len is {settings['cutoff_len']}; it must be at least 8 tokens")
    warmup = settings.get("warmup_steps", 0)
    if isinstance(warmup, float) and 0 < warmup < 1:
        problems.append(f"warmup_steps is {warmup}, a ratio where a count of steps belongs; use warmup_ratio instead?")
    return problems
