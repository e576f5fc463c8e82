"""Every setting of a training run or an export, under LLaMA-Factory's names, with all problems reported at once."""

import difflib
import fnmatch
import json
import math
import os
import platform
import re
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import torch
from transformers import TrainingArguments

from llmtuner import hparams_compat
from llmtuner.console import UserError, print0
from llmtuner.packages import missing_packages


@dataclass
class ModelArguments:
    """Which model, how it is loaded, and where its merge goes."""

    model_name_or_path: str
    """Directory of the model to train: config, safetensors and tokenizer."""
    flash_attn: str = "auto"
    """Attention kernel: `varlen` (one document after another, without a mask), `sdpa`, `fa2`, `disabled` (plain matrix
    products); `auto` is sdpa on a GPU, on a CPU varlen for Glm and disabled for other models."""
    disable_gradient_checkpointing: bool | None = None
    """Keep all activations for the backward pass; false computes them again there. Left out: false if memory asks for it."""
    adapter_name_or_path: str | None = None
    """Directory of one trained adapter: training goes on from its weights, an export merges it."""
    create_new_adapter: bool = False
    """Merge adapter_name_or_path into the model in memory and train a new adapter; an export then merges both."""
    export_dir: str | None = None
    """Where an export writes the merged model."""
    export_size: int = 2
    """Largest size of one file of exported weights, in GB."""
    export_device: str = "cpu"
    """LLaMA-Factory's files name it; the merge reads and writes tensor by tensor and needs no GPU."""
    export_legacy_format: bool = False
    """LLaMA-Factory's files name it; only false: weights are written as safetensors only."""


@dataclass
class DataArguments:
    """Which rows, in which shares, cut and packed how."""

    dataset: list[str] = field(default_factory=list)
    """Names from dataset_info.json; a list, or one string with commas."""
    eval_dataset: list[str] = field(default_factory=list)
    """Names of data sets whose rows are all held out; val_size must be 0 then. A row of `dataset` with the same text is not
    trained on."""
    dataset_dir: str = "data"
    """Directory of dataset_info.json."""
    corpus_dir: str | None = None
    """Directory in which file names are looked up; by default dataset_dir."""
    cache_dir: str = "cache"
    """Where tokenized data sets are kept for the next run."""
    tokenized_path: str | None = None
    """Directory in which tokenized data sets are kept under their plain names: made once, then used without the texts."""
    overwrite_cache: bool = False
    """Tokenize again, even if nothing has changed."""
    packing: bool = True
    """Several documents or dialogues in one sequence; false: one each, padded."""
    neat_packing: bool = True
    """Packed documents do not see one another; false: attention and positions run across them."""
    mix_strategy: str = "concat"
    """`concat`: every row once; `interleave_under`: until one set is used up; `interleave_over`: until all are seen."""
    interleave_probs: list[float] | None = None
    """Share of each data set in what is drawn, in the order of `dataset`; must sum to 1."""
    interleave_unit: str = "tokens"
    """What interleave_probs are shares of: `tokens`, `bytes` or `rows`."""
    template: str = "chatglm3"
    """Chat format of the sft stage."""
    cutoff_len: int = 1024
    """Tokens in one sequence; a longer document goes on in the next, a longer dialogue is cut."""
    max_samples: int | None = None
    """Reads at most this many rows of each data set."""
    default_system: str | None = None
    """System message of dialogues that have none (sft). The model does not keep it: give it again when chatting."""
    disable_shuffling: bool = False
    """Take rows in the order of the files, data set after data set or in the mix of interleave_probs."""
    val_size: float = 0.0
    """Held out for the eval loss: below 1 a share; an integer from 1 up: that many rows of each data set.
    A text that is held out of one data set is not trained on through another."""
    max_eval_samples: int = 512
    """At most this many sequences are used for the eval loss."""
    eval_on_each_dataset: bool = False
    """Log eval_<dataset>_loss beside eval_loss, over max_eval_samples of each data set."""
    preprocessing_num_workers: int = 1
    """Threads that tokenize."""
    train_on_prompt: bool = False
    """Train the questions of a dialogue too."""
    mask_history: bool = False
    """Train the last answer of a dialogue only; a dialogue longer than cutoff_len then loses its first turns, not its end."""
    max_invalid_ratio: float = 0.05
    """Share of a data set's rows that may be unusable; more stop the run."""


@dataclass
class FinetuningArguments:
    """What is trained."""

    stage: str = "pt"
    """`pt`: continued pretraining on documents; `sft`: instruction tuning on dialogues."""
    finetuning_type: str = "lora"
    """`lora`: adapters, and additional_target in full; `full`: every parameter; `freeze`: some layers or modules alone."""
    lora_rank: int = 8
    """Rank of the adapters' matrices."""
    lora_alpha: float | None = None
    """Scale of the adapter; by default twice the rank."""
    lora_dropout: float = 0.0
    """Share of an adapter's inputs that is zeroed while training."""
    lora_target: list[str] = field(default_factory=lambda: ["all"])
    """Modules that get an adapter: names, or `all` linear layers except the output layer."""
    additional_target: list[str] = field(default_factory=list)
    """Modules trained in full beside the adapter, such as embed_tokens and lm_head."""
    freeze_trainable_layers: int | None = None
    """With freeze: the last n layers are trained, the first -n if negative. Left out: 2; none with additional_target."""
    freeze_trainable_modules: list[str] = field(default_factory=lambda: ["all"])
    """With freeze: which modules of those layers, such as self_attn or mlp; `all` of them."""
    freeze_extra_modules: list[str] = field(default_factory=list)
    """With freeze: modules outside the layers that are trained too; the same as additional_target there."""
    loraplus_lr_ratio: float | None = None
    """LoRA+ (arXiv 2402.12354): the B matrices' learning rate is learning_rate times this."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732): keeps high ranks learning."""
    use_dora: bool = False
    """Train the length of each weight row apart from its direction (arXiv 2402.09353)."""
    embedding_learning_rate: float | None = None
    """Learning rate of the embedding matrices; by default that of everything else."""
    embedding_rows: str = "all"
    """`new` trains only the rows that step 3 appended (with additional_target embed_tokens, lm_head)."""
    fused_ops: bool = True
    """On a CPU in fp32: LoRA as one product, RMSNorm in fewer passes; false computes both as peft and transformers do."""
    chunked_loss: bool = True
    """Form logits and their gradients some rows at a time; false forms all at once, as PyTorch does."""
    early_stopping_steps: int | None = None
    """Stop once eval_loss has not improved for so many evaluations; the adapter is that of the last step."""
    plot_loss: bool = False
    """Draw training_loss.png and eval_loss.png into output_dir."""
    overwrite_output_dir: bool = False
    """Delete an earlier run's checkpoints in output_dir and start anew; otherwise go on from the newest whole one."""


@dataclass(frozen=True)
class TrainArgs:
    """All arguments of a run or an export."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    finetuning: FinetuningArguments


ValidationIssue = tuple[tuple[str, ...], str]  # the settings involved, and what is wrong with them

STAGES = ("pt", "sft")
FINETUNING_TYPES = ("lora", "full", "freeze")
MIX_STRATEGIES = ("concat", "interleave_under", "interleave_over")
TEMPLATES = ("chatglm3",)
ATTN_IMPLEMENTATIONS = {
    "auto": None,
    "disabled": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "varlen": "varlen",
}
CHOICES = {
    "stage": STAGES,
    "finetuning_type": FINETUNING_TYPES,
    "mix_strategy": MIX_STRATEGIES,
    "interleave_unit": ("tokens", "bytes", "rows"),
    "template": TEMPLATES,
    "flash_attn": tuple(ATTN_IMPLEMENTATIONS),
    "embedding_rows": ("all", "new"),
    "export_device": ("cpu", "auto"),
}
# The original ChatGLM3 code's names of modules, and Glm's.
MODULE_ALIASES = {
    "query_key_value": ["q_proj", "k_proj", "v_proj"],
    "dense": ["o_proj"],
    "dense_h_to_4h": ["gate_up_proj"],
    "dense_4h_to_h": ["down_proj"],
    "word_embeddings": ["embed_tokens"],
    "output_layer": ["lm_head"],
}
EMBEDDING_MODULES = {"embed_tokens", "lm_head"}
CLASSES = (ModelArguments, DataArguments, TrainingArguments, FinetuningArguments)
FIELD_OWNER: dict[str, type] = {f.name: cls for cls in CLASSES for f in fields(cls)}
FIELD_TYPES: dict[str, Any] = {f.name: f.type for cls in CLASSES for f in fields(cls)}
DEPRECATED_ALIASES = {"evaluation_strategy": "eval_strategy", "gradient_checkpointing": "activation_checkpointing"}
DEPRECATED_ALIASES = {
    old: new for old, new in DEPRECATED_ALIASES.items() if new in FIELD_TYPES
}  # some versions know only the old one
GRADIENT_CHECKPOINTING = DEPRECATED_ALIASES.get("gradient_checkpointing", "gradient_checkpointing")
FIELD_TYPES["warmup_ratio"] = float  # of older transformers, and translated
TYPE_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list[str]: "names with commas, or a list of them",
    list[float]: "numbers with commas, or a list of them",
}
# Values of settings of this trainer or of transformers that are not supported: the one value there is, and why.
UNSUPPORTED = {
    "export_legacy_format": (False, "weights are written as safetensors only"),
    "load_best_model_at_end": (False, "every checkpoint is kept up to save_total_limit; export the one you want"),
    "average_tokens_across_devices": (True, "the loss is normalised over all ranks"),
    "label_smoothing_factor": (0, "the loss is plain cross-entropy"),
    "do_predict": (False, "a run trains, or measures the eval loss (do_eval)"),
}
Limit = tuple[Callable[[Any], bool], str]  # whether a number is accepted, and in words what is
AT_LEAST_1: Limit = (lambda value: value >= 1, "at least 1")
ABOVE_0: Limit = (lambda value: 0 < value < math.inf, "greater than 0")
NOT_NEGATIVE: Limit = (lambda value: 0 <= value < math.inf, "a number from 0 up")
BELOW_1: Limit = (lambda value: 0 <= value < 1, "from 0 to below 1")
LIMITS: dict[str, Limit] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "export_size"), AT_LEAST_1),
    **dict.fromkeys(("gradient_accumulation_steps", "save_total_limit", "lora_rank", "max_samples"), AT_LEAST_1),
    **dict.fromkeys(("max_eval_samples", "preprocessing_num_workers", "early_stopping_steps"), AT_LEAST_1),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps", "save_steps", "lora_alpha"), ABOVE_0),
    "loraplus_lr_ratio": ABOVE_0,
    **dict.fromkeys(("learning_rate", "embedding_learning_rate", "weight_decay"), NOT_NEGATIVE),
    **dict.fromkeys(("max_grad_norm", "adam_epsilon", "dataloader_num_workers"), NOT_NEGATIVE),
    **dict.fromkeys(("lora_dropout", "warmup_ratio", "adam_beta1", "adam_beta2"), BELOW_1),
    **dict.fromkeys(("seed", "data_seed"), (lambda value: 0 <= value < 2**32, "a whole number from 0 to below 2^32")),
    "optim_args": (lambda value: all("=" in part for part in value.split(",")), "name=value, with commas between"),
    "freeze_trainable_layers": (lambda value: value != 0, "the number of the last layers, or of the first if negative"),
    "cutoff_len": (lambda value: value >= 8, "at least 8 tokens"),
    "max_invalid_ratio": (lambda value: 0 <= value <= 1, "a share, from 0 to 1"),
    "max_steps": (lambda value: value == -1 or value >= 1, "a number of steps, or left out to train num_train_epochs"),
    "val_size": (lambda value: _is_ratio_or_count(value), "a share, from 0 to below 1, or a whole number of rows"),
    "warmup_steps": (lambda value: _is_ratio_or_count(value), "a whole number of steps, from 0 up"),
}
# Settings that do not change what is learned (patterns).
RESUME_SAFE = (
    *("logging_*", "log_*", "save_*", "eval_*", "max_eval_samples", "per_device_eval_batch_size", "*_full_eval"),
    *("report_to", "run_name", "project", "trackio_*", "hub_*", "push_to_hub", "plot_loss", "disable_tqdm", "debug"),
    *(
        "early_stopping_steps",
        "preprocessing_num_workers",
        "max_invalid_ratio",
        "overwrite_cache",
        "overwrite_output_dir",
        "output_dir",
    ),
    *("cache_dir", "tokenized_path", "corpus_dir", "resume_from_checkpoint", "do_train", "do_eval", "export_*"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("dataloader_multiprocessing_context", "ddp_timeout", "ddp_backend", "local_rank", "use_cpu"),
    *("activation_checkpointing*", "*gradient_checkpointing*", "skip_memory_metrics", "torch_empty_cache_steps"),
)
USAGE = "a settings file, then settings: FILE.yaml --learning_rate 5e-5 --plot_loss (also --name=value or name=value)"


def read_args(args: dict[str, Any] | str | Path | list[str] | None = None) -> dict[str, Any]:
    """Settings from a dict, a YAML file, or words of a command line (None: this process's own).

    Words are an optional YAML file, then settings as `parse_overrides` takes them.

    Raises:
        UserError: if the file cannot be read or holds no settings, or the words have another form.
    """
    if isinstance(args, dict):
        return dict(args)
    if isinstance(args, str | Path):
        return _read_yaml(args)
    words = sys.argv[1:] if args is None else args
    if not words:
        raise UserError(f"no settings are given. Write {USAGE}.")
    if re.match(r"--|\w+=", words[0]):
        return parse_overrides({}, words)
    return parse_overrides(_read_yaml(words[0]), words[1:])


def _read_yaml(path: str | Path) -> dict[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the settings file {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}.") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings. Write lines of the form `name: value`.")
    return settings


def parse_overrides(settings: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """Settings with those replaced that a command line gives as `--name value`, `--name=value`, `name=value` or `--flag`.

    Values are read as in YAML. A `--name` that another `--name` or nothing follows is true.

    Raises:
        UserError: if a word has none of these forms.
    """
    import yaml

    settings, words = dict(settings), list(words)
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        if not re.fullmatch(r"--\w[\w-]*" + (r"|\w+" if equals else ""), name):
            raise UserError(f"cannot take {word!r} for a setting. A command line has the form --name value: {USAGE}.")
        if not equals:
            text = words.pop(0) if words and not words[0].startswith("--") else "true"
        try:
            settings[name.removeprefix("--").replace("-", "_")] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"cannot read the value {text!r} of {name}. Put it in quotes within quotes.") from error
    return settings


def get_train_args(args: dict[str, Any] | str | Path | list[str] | None = None, for_export: bool = False) -> TrainArgs:
    """Checks settings and sorts them into model, data, training and finetuning arguments.

    Args:
        args: as for `read_args`.
        for_export: whether they are to merge an adapter, not to train.

    Raises:
        UserError: one message with every problem found.
    """
    given = {DEPRECATED_ALIASES.get(str(name), str(name)): value for name, value in read_args(args).items()}
    compat = hparams_compat.split_llamafactory_settings(given)
    given = compat.remaining
    unknown = [name for name in given if name not in FIELD_TYPES]
    settings = {name: _convert(name, value) for name, value in given.items() if name not in unknown}
    problems: list[ValidationIssue] = [*compat.problems, *(((name,), _describe_unknown(name)) for name in unknown)]
    problems += _validate_values(settings)
    if not for_export:
        problems += [((name,), text) for name, value in settings.items() for text in missing_packages(name, value)]
    usable = _drop_invalid(settings, problems)
    bad = settings.keys() - usable.keys()
    problems += [problem for problem in _validate_combinations(usable, for_export) if bad.isdisjoint(problem[0])]
    usable = _drop_invalid(usable, problems)

    # Building TrainingArguments joins the group of processes, which others would then wait for in vain.
    joins_processes = int(os.environ.get("WORLD_SIZE", "1")) > 1 or "deepspeed" in usable
    if not (problems and joins_processes):
        usable = _to_training_arguments(usable, for_export)
        try:
            training = _disable_data_parallel(_build(TrainingArguments, usable))
        except (TypeError, ValueError, ImportError, OSError) as error:
            problems.append(((), str(error)))
    if problems:
        raise UserError("settings:\n  - " + "\n  - ".join(text for _, text in problems))
    for note in compat.notes:
        print0(note)
    model, data, finetuning = (_build(cls, usable) for cls in (ModelArguments, DataArguments, FinetuningArguments))
    return TrainArgs(model, data, training, finetuning)


def _disable_data_parallel(training: TrainingArguments) -> TrainingArguments:
    """A process trains on one GPU, however many it sees; Trainer would split each batch among them (DataParallel)."""
    if training.n_gpu > 1:
        training._n_gpu = 1
    return training


def _drop_invalid(settings: dict[str, Any], problems: list[ValidationIssue]) -> dict[str, Any]:
    bad = {name for names, _ in problems for name in names}
    return {name: value for name, value in settings.items() if name not in bad}


def _build(cls: type, settings: dict[str, Any]) -> Any:
    return cls(**{name: value for name, value in settings.items() if FIELD_OWNER[name] is cls})


def _describe_unknown(name: str) -> str:
    near = difflib.get_close_matches(name, [*FIELD_TYPES, *DEPRECATED_ALIASES, *hparams_compat.known_names()], n=1)
    return f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _allowed_types(name: str) -> tuple[Any, ...]:
    """The types that a setting may have."""
    kind = FIELD_TYPES[name]
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _convert(name: str, value: Any) -> Any:
    """A value in the type of its setting, or as it was if it does not fit."""
    kinds = _allowed_types(name)
    if isinstance(value, Path):
        value = str(value)
    if value is False and name.endswith("_strategy"):  # YAML takes a bare `no` for false
        return "no"
    if name == "resume_from_checkpoint" and value is True:
        return None  # a run goes on from its newest checkpoint without being asked
    if list in [get_origin(kind) for kind in kinds] and FIELD_OWNER[name] is not TrainingArguments:
        if type(value) in (str, int, float):
            value = [part.strip() for part in str(value).split(",") if part.strip()]
        if list[float] in kinds and isinstance(value, list):
            value = [_number(one) for one in value]
        if name in ("lora_target", "additional_target", "freeze_extra_modules") and _matches_type(value, list[str]):
            value = list(dict.fromkeys(own for one in value for own in MODULE_ALIASES.get(one, [one])))
    elif str not in kinds and isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML takes 1e-4 for text, because it has no dot; people write it so
    if int in kinds and float not in kinds and isinstance(value, float) and value.is_integer():
        value = int(value)
    return value


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _matches_type(value: Any, kind: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_matches_type(one, get_args(kind)[0]) for one in value)
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and not math.isnan(value)
    return isinstance(value, kind)


def _is_ratio_or_count(value: float) -> bool:
    return 0 <= value < 1 or (value >= 1 and float(value).is_integer())


def _validate_values(settings: dict[str, Any]) -> Iterator[ValidationIssue]:
    for name, value in settings.items():
        kinds = [kind for kind in _allowed_types(name) if kind is not type(None)]
        if value is None and type(None) in _allowed_types(name):
            continue
        if all(kind in TYPE_NAMES for kind in kinds) and not any(_matches_type(value, kind) for kind in kinds):
            yield (name,), f"{name} is {value!r}; it must be {' or '.join(TYPE_NAMES[kind] for kind in kinds)}"
        elif name in CHOICES and value not in CHOICES[name]:
            yield (name,), f"{name} is {value!r}; it can be {' or '.join(CHOICES[name])}"
        elif name in UNSUPPORTED and value != UNSUPPORTED[name][0]:
            yield (name,), f"{name}: {str(value).lower()} is not supported: {UNSUPPORTED[name][1]}"
        elif name in LIMITS and not LIMITS[name][0](value):
            yield (name,), f"{name} is {value}; it must be {LIMITS[name][1]}"
        elif name == "deepspeed" and isinstance(value, str) and not value.startswith("{") and not Path(value).is_file():
            yield (name,), f"deepspeed names the file {value}, which does not exist"
        elif name == "deepspeed" and (stage := _zero_stage(value)) not in (0, 1, 2):
            yield (
                (name,),
                f"deepspeed: zero_optimization.stage is {stage!r}; ZeRO-3, which shards the weights themselves, is not supported: "
                "the loss reads the whole output matrix. Set it to 2, as ds_config_zero2.json does",
            )
        elif name == "adapter_name_or_path" and "," in value:
            yield (name,), f"adapter_name_or_path is {value}; it can be one directory only"


def _zero_stage(deepspeed: dict[str, Any] | str) -> Any:
    """zero_optimization.stage of a DeepSpeed configuration: a dict, JSON or a JSON file; 0 where it has none."""
    try:
        if isinstance(deepspeed, str):
            text = deepspeed if deepspeed.startswith("{") else Path(deepspeed).read_text(encoding="utf-8")
            deepspeed = json.loads(text)
        stage = deepspeed.get("zero_optimization", {}).get("stage", 0)  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):
        return 0  # transformers says what is wrong with the file
    return int(stage) if str(stage).isdigit() else stage


def _validate_combinations(settings: dict[str, Any], for_export: bool) -> Iterator[ValidationIssue]:
    """What does not go together, among settings that are each right by themselves."""
    ours = vars(ModelArguments("")) | vars(DataArguments()) | vars(FinetuningArguments()) | settings
    required = ("export_dir",) if for_export else ("dataset", "output_dir")
    for name in ("model_name_or_path", *required):
        if not ours.get(name):
            yield (name,), f"{name} is not given"

    if settings.get("output_dir") and settings.get("output_dir") == settings.get("model_name_or_path"):
        yield ("output_dir", "model_name_or_path"), "output_dir is the model's own directory; name another one"

    probs, strategy, involved = ours["interleave_probs"], ours["mix_strategy"], ("interleave_probs", "mix_strategy")
    if probs is not None:
        if len(probs) != (count := len(ours["dataset"])):
            yield (*involved, "dataset"), f"interleave_probs has {len(probs)} shares for {count} data sets"
        if abs(sum(probs) - 1) > 1e-6 or min(probs, default=0) < 0:
            yield involved, f"interleave_probs sums to {sum(probs):.4g}; shares are not negative and sum to 1"
        if strategy == "concat":
            yield involved, "interleave_probs is given, but mix_strategy is concat, which takes every row once"
    elif strategy != "concat":
        yield involved, f"mix_strategy {strategy} needs interleave_probs"

    share, sets = ours["val_size"], ours["eval_dataset"]
    if share and sets:
        yield ("eval_dataset", "val_size"), "eval_dataset and val_size are both given; leave one of them out"
    for name in sorted({*sets} & {*ours["dataset"]}):
        yield (
            ("eval_dataset", "dataset"),
            f"{name} is in dataset and in eval_dataset; hold out a val_size of it instead",
        )
    for name in ("eval_strategy", "do_eval", "eval_on_start", "eval_on_each_dataset"):
        value = settings.get(name)
        if value not in (None, "no", False) and not (share or sets):
            text = f"{name} is {str(value).lower()}, but nothing is held out: give val_size or eval_dataset"
            yield (name, "val_size", "eval_dataset"), text
    if settings.get("do_train") is False and not settings.get("do_eval"):
        yield ("do_train", "do_eval"), "do_train is false and do_eval is not true: there is nothing to do"
    if ours["early_stopping_steps"]:
        if settings.get("eval_strategy") in (None, "no"):
            text = "early_stopping_steps is given, but nothing is evaluated: set eval_strategy and eval_steps"
            yield ("early_stopping_steps", "eval_strategy"), text
        if settings.get("metric_for_best_model") not in (None, "loss", "eval_loss") or settings.get(
            "greater_is_better"
        ):
            text = "early_stopping_steps watches eval_loss, the smaller the better; leave the other two out"
            yield ("early_stopping_steps", "metric_for_best_model", "greater_is_better"), text
    if ours["disable_shuffling"] and settings.get("train_sampling_strategy") not in (None, "random", "sequential"):
        text = "disable_shuffling is true, but train_sampling_strategy asks for another order; leave one of them out"
        yield ("disable_shuffling", "train_sampling_strategy"), text
    if settings.get("packing") is False and settings.get("neat_packing"):
        yield ("packing", "neat_packing"), "neat_packing is true, but packing is false"
    if settings.get("fp16") and settings.get("bf16"):
        yield ("fp16", "bf16"), "fp16 and bf16 are both true; one of them can be"
    disabled = settings.get("disable_gradient_checkpointing")
    if disabled is not None and settings.get(GRADIENT_CHECKPOINTING) is disabled:
        text = "gradient_checkpointing and disable_gradient_checkpointing contradict each other; leave one of them out"
        yield (GRADIENT_CHECKPOINTING, "disable_gradient_checkpointing"), text
    if settings.get("warmup_steps") and settings.get("warmup_ratio"):
        yield ("warmup_steps", "warmup_ratio"), "warmup_steps and warmup_ratio are both given; set one of them to 0"

    kind, modules = ours["finetuning_type"], ours["additional_target"]
    of_lora = ("use_dora", "use_rslora", "loraplus_lr_ratio", "create_new_adapter")
    for name in (*of_lora, *(() if for_export else ("adapter_name_or_path",))):
        if ours[name] and kind != "lora":
            yield (name, "finetuning_type"), f"{name} is given, but finetuning_type {kind} has no adapters"
    for name, default in {"freeze_trainable_layers": 2, "freeze_trainable_modules": ["all"]}.items():
        if kind != "freeze" and ours[name] not in (None, default):
            yield (
                (name, "finetuning_type"),
                f"{name} is given, but finetuning_type {kind} does not train some layers alone",
            )
    if kind != "freeze" and ours["freeze_extra_modules"]:
        text = f"freeze_extra_modules is given, but finetuning_type is {kind}; name them in additional_target"
        yield ("freeze_extra_modules", "finetuning_type"), text
    if ours["embedding_rows"] == "new" and (kind != "lora" or EMBEDDING_MODULES.isdisjoint(modules)):
        text = "embedding_rows new needs finetuning_type lora, and embed_tokens or lm_head in additional_target"
        yield ("embedding_rows", "finetuning_type", "additional_target"), text


def _to_training_arguments(settings: dict[str, Any], for_export: bool) -> dict[str, Any]:
    """Settings without names of older transformers, with this trainer's defaults and what the machine asks for."""
    settings = {"logging_nan_inf_filter": False, "use_cpu": not torch.cuda.is_available(), **settings}
    settings["remove_unused_columns"] = False
    ratio, steps = settings.pop("warmup_ratio", None), settings.get("warmup_steps", 0)
    if 0 < steps < 1:
        print0(
            f"warmup_steps is {steps}, a share where a number of steps belongs: did you mean warmup_ratio: {steps}? "
            "It is taken as that; write so to be asked no more."
        )
    elif ratio:
        settings["warmup_steps"] = float(ratio)  # transformers takes a share in the place of a count
    if settings["use_cpu"] and (settings.get("fp16") or settings.get("bf16")):
        has_bf16 = cpu_supports_bf16()
        if settings.get("fp16"):
            print0(f"fp16 needs a GPU: computing in {'bf16' if has_bf16 else 'fp32'} on this CPU")
        elif not has_bf16:
            print0("bf16: this CPU has no instructions for it and would take many times as long: computing in fp32")
        settings |= {"fp16": False, "bf16": has_bf16}
    if settings.get(GRADIENT_CHECKPOINTING) is not None:
        settings["disable_gradient_checkpointing"] = not settings[GRADIENT_CHECKPOINTING]
    elif settings.get("disable_gradient_checkpointing") is False:
        settings[GRADIENT_CHECKPOINTING] = True
    if not settings.get("do_eval"):
        settings.setdefault("do_train", True)
    if for_export:
        settings.pop("deepspeed", None)
    if settings.get("deepspeed") and "RANK" not in os.environ:
        _set_single_process_env()
    return settings


def cpu_supports_bf16() -> bool:
    """Whether this machine's CPU multiplies bf16 by instructions of its own; x86 without them falls back to single numbers."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def _set_single_process_env() -> None:
    """Sets what torchrun would set for a single process: deepspeed reads it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    one = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in one.items():
        os.environ.setdefault(name, str(value))


def serialize_settings(args: TrainArgs) -> dict[str, Any]:
    """All settings of a run in one flat dict that JSON can hold, without those that are not set."""
    settings = {**asdict(args.model), **asdict(args.data), **args.training.to_dict(), **asdict(args.finetuning)}
    return {name: value for name, value in settings.items() if value is not None}


def diff_settings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Which settings that change what is learned differ, as lines of the form `learning_rate: 0.0001 -> 5e-05`.

    What was saved before a setting existed was made with its default.
    """
    defaults = vars(ModelArguments("")) | vars(DataArguments()) | vars(FinetuningArguments())
    before = {name: defaults[name] for name in after if defaults.get(name) is not None} | before
    return [
        f"{name}: {before.get(name, 'not set')} -> {after.get(name, 'not set')}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name) and not any(fnmatch.fnmatch(name, pattern) for pattern in RESUME_SAFE)
    ]
