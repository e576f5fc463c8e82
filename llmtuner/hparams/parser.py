"""Settings of a dict, a YAML file or a command line as checked arguments: nothing is printed, started or changed here."""

import difflib
import fnmatch
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_origin

from llmtuner.aliases import rename_settings
from llmtuner.console import UserError
from llmtuner.hparams import llamafactory
from llmtuner.hparams.data_args import DataArguments
from llmtuner.hparams.finetuning_args import EMBEDDING_MODULES, FinetuningArguments
from llmtuner.hparams.model_args import ModelArguments
from llmtuner.hparams.packages import missing_packages
from llmtuner.hparams.setting import REQUIRED, default_of, find_problem, matches_type, settings_of, types_of
from llmtuner.hparams.training_args import RESUME_SAFE, TrainerArguments

if TYPE_CHECKING:
    from transformers import TrainingArguments

Group = TypeVar("Group")
ValidationIssue = tuple[tuple[str, ...], str]  # the settings involved, and what is wrong with them

OWN_CLASSES = (ModelArguments, DataArguments, FinetuningArguments)
OWN: dict[str, Field] = {name: field for cls in OWN_CLASSES for name, field in settings_of(cls).items()}
OWN_DEFAULTS = {name: default_of(field) for name, field in OWN.items() if default_of(field) is not REQUIRED}
# The original ChatGLM3 code's names of modules, and Glm's.
MODULE_ALIASES = {
    "query_key_value": ["q_proj", "k_proj", "v_proj"],
    "dense": ["o_proj"],
    "dense_h_to_4h": ["gate_up_proj"],
    "dense_4h_to_h": ["down_proj"],
    "word_embeddings": ["embed_tokens"],
    "output_layer": ["lm_head"],
}
# Their product is the number of sequences of a step in one process.
MICRO_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
USAGE = "a settings file, then settings: FILE.yaml --learning_rate 5e-5 --plot_loss (also --name=value or name=value)"


@dataclass(frozen=True)
class TrainArgs:
    """All arguments of a run or an export."""

    model: ModelArguments
    data: DataArguments
    training: "TrainingArguments"
    finetuning: FinetuningArguments
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What to tell the user of how the settings were taken."""


def read_args(args: dict[str, Any] | str | Path | list[str] | None = None) -> dict[str, Any]:
    """Settings from a dict, a YAML file, or arguments of a command line (None: this process's own).

    Arguments are an optional YAML file, then settings as `parse_overrides` takes them.

    Raises:
        UserError: if the file cannot be read or holds no settings, or the arguments have another form.
    """
    if isinstance(args, dict):
        return dict(args)
    if isinstance(args, str | Path):
        return _read_yaml(args)
    arguments = sys.argv[1:] if args is None else args
    if not arguments:
        raise UserError(f"no settings are given. Write {USAGE}.")
    if re.match(r"--|\w+=", arguments[0]):
        return parse_overrides({}, arguments)
    return parse_overrides(_read_yaml(arguments[0]), arguments[1:])


def read_dataclass(path: str | Path, cls: type[Group], find_problems: Callable[[Group], Iterable[str]]) -> Group:
    """Reads the settings of a dataclass from a YAML file.

    Args:
        find_problems: what is wrong with settings that are each valid.

    Raises:
        UserError: one message with every problem found.
    """
    given, fields = _read_yaml(path), settings_of(cls)
    problems = [_describe_unknown(str(name), [*fields]) for name in given if name not in fields]
    problems += [
        text for name, value in given.items() if name in fields and (text := find_problem(fields[name], value))
    ]
    problems += [
        f"{name} is not given. {field.metadata['help']}"
        for name, field in fields.items()
        if name not in given and default_of(field) is REQUIRED
    ]
    settings = None if problems else cls(**given)
    problems += find_problems(settings) if settings else []
    if problems or not settings:
        raise UserError(f"{path}:\n  - " + "\n  - ".join(problems))
    return settings


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


def parse_overrides(settings: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """Settings with those replaced that a command line gives as `--name value`, `--name=value`, `name=value` or `--flag`.

    Values are read as in YAML. A `--name` followed by another `--name` or by nothing is true.

    Raises:
        UserError: if an argument has none of these forms.
    """
    import yaml

    settings, arguments = dict(settings), list(arguments)
    while arguments:
        argument = arguments.pop(0)
        name, equals, text = argument.partition("=")
        if not re.fullmatch(r"--\w[\w-]*" + (r"|\w+" if equals else ""), name):
            raise UserError(
                f"cannot take {argument!r} for a setting. A command line has the form --name value: {USAGE}."
            )
        if not equals:
            text = arguments.pop(0) if arguments and not arguments[0].startswith("--") else "true"
        try:
            settings[name.removeprefix("--").replace("-", "_")] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"cannot read the value {text!r} of {name}. Put it in quotes within quotes.") from error
    return settings


def get_train_args(args: dict[str, Any] | str | Path | list[str] | None = None, for_export: bool = False) -> TrainArgs:
    """Checks settings and sorts them into model, data, training and finetuning arguments.

    Its `training` has joined no other processes yet: `llmtuner.train.process.join_processes` does.

    Args:
        args: as for `read_args`.
        for_export: whether they are to merge an adapter, not to train.

    Raises:
        UserError: one message with every problem found.
    """
    # Imported here, so that a step's --help and its first message need not wait for torch.
    from llmtuner.hparams.transformers_args import SYNONYMS, CheckedTrainingArguments, to_training_arguments

    given, notes = rename_settings(
        {SYNONYMS.get(str(name), str(name)): value for name, value in read_args(args).items()}
    )
    compat = llamafactory.split_settings(given)
    known = settings_of(CheckedTrainingArguments) | settings_of(TrainerArguments) | OWN
    settings, issues = _validate(compat.remaining, known, [*known, *SYNONYMS], for_export)
    settings, hints = to_training_arguments(settings, for_export)
    issues = [*compat.issues, *issues]
    try:
        training = CheckedTrainingArguments(**{name: value for name, value in settings.items() if name not in OWN})
    except (TypeError, ValueError, ImportError, OSError) as error:
        issues.append(((), str(error)))
    if issues:
        raise UserError("settings:\n  - " + "\n  - ".join(text for _, text in issues))
    model, data = _build(ModelArguments, settings), _build(DataArguments, settings)
    return TrainArgs(model, data, training, _build(FinetuningArguments, settings), (*notes, *compat.notes, *hints))


def _build(cls: type[Group], settings: dict[str, Any]) -> Group:
    return cls(**{name: settings[name] for name in settings_of(cls) if name in settings})


def _validate(
    given: dict[str, Any], known: dict[str, Field], names: list[str], for_export: bool
) -> tuple[dict[str, Any], list[ValidationIssue]]:
    """Converts settings to their types; returns those that are valid, and what is wrong with the others."""
    settings = {name: _convert(known[name], value) for name, value in given.items() if name in known}
    issues: list[ValidationIssue] = [((name,), _describe_unknown(name, names)) for name in given if name not in known]
    issues += _validate_values(settings, known)
    if not for_export:
        issues += [((name,), text) for name, value in settings.items() for text in missing_packages(name, value)]
    valid = _drop_invalid(settings, issues)
    # A value that is wrong by itself is not reported in combination, too.
    combined = _validate_combinations(valid, for_export)
    issues += [issue for issue in combined if all(name in valid or name not in settings for name in issue[0])]
    return _drop_invalid(valid, issues), issues


def _drop_invalid(settings: dict[str, Any], issues: list[ValidationIssue]) -> dict[str, Any]:
    invalid = {name for names, _ in issues for name in names}
    return {name: value for name, value in settings.items() if name not in invalid}


def _describe_unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, [*known, *llamafactory.known_names()], n=1)
    return f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _convert(entry: Field, value: Any) -> Any:
    """A value in the type of its setting, or as it was if it does not fit."""
    name, types = entry.name, types_of(entry)
    if isinstance(value, Path):
        value = str(value)
    if value is False and name.endswith("_strategy"):  # YAML takes a bare `no` for false
        return "no"
    if name == "resume_from_checkpoint" and value is True:
        return None  # a run resumes from its latest checkpoint without being asked
    if name in OWN and list in [get_origin(kind) for kind in types]:
        if type(value) in (str, int, float):
            value = [part.strip() for part in str(value).split(",") if part.strip()]
        if list[float] in types and isinstance(value, list):
            value = [_to_number(item) for item in value]
        if name in ("lora_target", "additional_target", "freeze_extra_modules") and matches_type(value, list[str]):
            value = list(dict.fromkeys(target for module in value for target in MODULE_ALIASES.get(module, [module])))
    elif str not in types and isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML takes 1e-4 for text, because it has no dot; people write it so
    if int in types and float not in types and isinstance(value, float) and value.is_integer():
        value = int(value)
    return value


def _to_number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _validate_values(settings: dict[str, Any], known: dict[str, Field]) -> Iterator[ValidationIssue]:
    for name, value in settings.items():
        if problem := find_problem(known[name], value):
            yield (name,), problem
        elif name == "deepspeed" and isinstance(value, str) and not value.startswith("{") and not Path(value).is_file():
            yield (name,), f"deepspeed names the file {value}, which does not exist"
        elif name == "deepspeed" and (stage := _zero_stage(value)) not in (0, 1, 2):
            text = f"deepspeed: zero_optimization.stage is {stage!r}; ZeRO-3, which shards the weights themselves, is not supported: "
            yield (name,), text + "the loss reads the whole output matrix. Set it to 2, as ds_config_zero2.json does"


def _zero_stage(deepspeed: dict[str, Any] | str | None) -> Any:
    """zero_optimization.stage of a DeepSpeed configuration; 0 where it has none."""
    try:
        stage = read_deepspeed_config(deepspeed).get("zero_optimization", {}).get("stage", 0)
    except (OSError, ValueError, AttributeError):
        return 0  # transformers says what is wrong with the file
    return int(stage) if str(stage).isdigit() else stage


def read_deepspeed_config(deepspeed: dict[str, Any] | str | None) -> Any:
    """A DeepSpeed configuration from a dict, JSON or a JSON file.

    Raises:
        OSError, ValueError: if the file cannot be read, or holds no JSON.
    """
    if not isinstance(deepspeed, str):
        return deepspeed
    return json.loads(deepspeed if deepspeed.startswith("{") else Path(deepspeed).read_text(encoding="utf-8"))


def _validate_combinations(settings: dict[str, Any], for_export: bool) -> Iterator[ValidationIssue]:
    """Finds what does not go together, among settings that are each valid by themselves."""
    values = OWN_DEFAULTS | settings
    for name in ("model_name_or_path", *(("export_dir",) if for_export else ("dataset", "output_dir"))):
        if not values.get(name):
            yield (name,), f"{name} is not given"
    if settings.get("packing") is False and settings.get("neat_packing"):
        yield ("packing", "neat_packing"), "neat_packing is true, but packing is false"
    yield from _validate_mix(values)
    yield from _validate_evaluation(values)
    yield from _validate_training(values)
    yield from _validate_method(values, for_export)


def _validate_mix(values: dict[str, Any]) -> Iterator[ValidationIssue]:
    probs, strategy, names = values["interleave_probs"], values["mix_strategy"], ("interleave_probs", "mix_strategy")
    if probs is None and strategy != "concat":
        yield names, f"mix_strategy {strategy} needs interleave_probs"
    if probs is not None and len(probs) != (count := len(values["dataset"])):
        yield (*names, "dataset"), f"interleave_probs has {len(probs)} ratios for {count} data sets"
    if probs is not None and (abs(sum(probs) - 1) > 1e-6 or min(probs, default=0) < 0):
        yield names, f"interleave_probs sums to {sum(probs):.4g}; ratios are not negative and sum to 1"
    if probs is not None and strategy == "concat":
        yield names, "interleave_probs is given, but mix_strategy is concat, which takes every row once"
    if values["disable_shuffling"] and values.get("train_sampling_strategy") not in (None, "random", "sequential"):
        text = "disable_shuffling is true, but train_sampling_strategy asks for another order; leave one of them out"
        yield ("disable_shuffling", "train_sampling_strategy"), text


def _validate_evaluation(values: dict[str, Any]) -> Iterator[ValidationIssue]:
    val_size, sets, patience = values["val_size"], values["eval_dataset"], values["early_stopping_steps"]
    if val_size and sets:
        yield ("eval_dataset", "val_size"), "eval_dataset and val_size are both given; leave one of them out"
    for name in sorted({*sets} & {*values["dataset"]}):
        text = f"{name} is in dataset and in eval_dataset; hold out a val_size of it instead"
        yield ("eval_dataset", "dataset"), text
    for name in ("eval_strategy", "do_eval", "eval_on_start", "eval_on_each_dataset"):
        if (value := values.get(name)) not in (None, "no", False) and not (val_size or sets):
            text = f"{name} is {str(value).lower()}, but nothing is held out: give val_size or eval_dataset"
            yield (name, "val_size", "eval_dataset"), text
    if values.get("do_train") is False and not values.get("do_eval"):
        yield ("do_train", "do_eval"), "do_train is false and do_eval is not true: there is nothing to do"
    if patience and values.get("eval_strategy") in (None, "no"):
        text = "early_stopping_steps is given, but nothing is evaluated: set eval_strategy and eval_steps"
        yield ("early_stopping_steps", "eval_strategy"), text
    if values["sample_steps"] and not values["sample_prompts"]:
        yield ("sample_steps", "sample_prompts"), "sample_steps is given, but no sample_prompts"
    if values["sample_prompts"] and not values["sample_steps"]:
        yield ("sample_steps", "sample_prompts"), "sample_prompts are given, but sample_steps does not say how often"
    yield from _validate_best_checkpoint(values)


def _validate_best_checkpoint(values: dict[str, Any]) -> Iterator[ValidationIssue]:
    for name in ("metric_for_best_model", "load_best_model_at_end"):
        if not values[name]:
            continue
        for strategy in ("eval_strategy", "save_strategy"):
            if values.get(strategy, "no" if strategy == "eval_strategy" else "steps") == "no":
                text = f"{name} is given, but {strategy} is no: the best checkpoint has to be evaluated and saved"
                yield (name, strategy), text
    if values["load_best_model_at_end"] and values.get("save_only_model") and values.get("deepspeed"):
        text = "load_best_model_at_end under DeepSpeed needs its optimizer state in checkpoints: set save_only_model: false"
        yield ("load_best_model_at_end", "save_only_model"), text
    if values["max_retention_loss"] is not None:
        if not (values["metric_for_best_model"] or values["load_best_model_at_end"]):
            text = "max_retention_loss bounds the choice of the best checkpoint: give metric_for_best_model, too"
            yield ("max_retention_loss", "metric_for_best_model"), text
        if not values.get("eval_on_start"):
            text = "max_retention_loss compares with the model before training: set eval_on_start: true"
            yield ("max_retention_loss", "eval_on_start"), text
    if values["save_minutes"] is not None and values.get("save_strategy") == "no":
        yield ("save_minutes", "save_strategy"), "save_minutes is given, but save_strategy is no; leave one of them out"


def _validate_training(values: dict[str, Any]) -> Iterator[ValidationIssue]:
    if values.get("output_dir") and values["output_dir"] == values.get("model_name_or_path"):
        yield ("output_dir", "model_name_or_path"), "output_dir is the model's own directory; name another one"
    if values.get("fp16") and values.get("bf16"):
        yield ("fp16", "bf16"), "fp16 and bf16 are both true; one of them can be"
    if values.get("warmup_steps") and values.get("warmup_ratio"):
        yield ("warmup_steps", "warmup_ratio"), "warmup_steps and warmup_ratio are both given; set one of them to 0"
    disabled = values["disable_gradient_checkpointing"]
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if disabled is not None and values.get(name) is disabled:
            text = "gradient_checkpointing and disable_gradient_checkpointing contradict each other; leave one out"
            yield (name, "disable_gradient_checkpointing"), text


def _validate_method(values: dict[str, Any], for_export: bool) -> Iterator[ValidationIssue]:
    method = values["finetuning_type"]
    of_lora = ("use_dora", "use_rslora", "loraplus_lr_ratio", "create_new_adapter")
    for name in (*of_lora, *(() if for_export else ("adapter_name_or_path",))):
        if values[name] and method != "lora":
            yield (name, "finetuning_type"), f"{name} is given, but finetuning_type {method} has no adapters"
    if values["use_muon"] and method != "full":
        text = f"use_muon is for finetuning_type full, and this one is {method}; leave it out"
        yield ("use_muon", "finetuning_type"), text
    if values["use_muon"] and values.get("deepspeed"):
        text = "use_muon needs complete matrices, of which DeepSpeed's optimizer sees parts; leave one of them out"
        yield ("use_muon", "deepspeed"), text
    for name, default in {"freeze_trainable_layers": 2, "freeze_trainable_modules": ["all"]}.items():
        if method != "freeze" and values[name] not in (None, default):
            text = f"{name} is given, but finetuning_type {method} does not train some layers only"
            yield (name, "finetuning_type"), text
    if method != "freeze" and values["freeze_extra_modules"]:
        text = f"freeze_extra_modules is given, but finetuning_type is {method}; name them in additional_target"
        yield ("freeze_extra_modules", "finetuning_type"), text
    if values["train_new_tokens_only"] and (
        method != "lora" or {*EMBEDDING_MODULES}.isdisjoint(values["additional_target"])
    ):
        text = "train_new_tokens_only needs finetuning_type lora, and embed_tokens or lm_head in additional_target"
        yield ("train_new_tokens_only", "finetuning_type", "additional_target"), text


def serialize_settings(args: TrainArgs) -> dict[str, Any]:
    """All settings of a run in one flat dict that JSON can hold, without those that are not set."""
    settings = {**asdict(args.model), **asdict(args.data), **args.training.to_dict(), **asdict(args.finetuning)}
    return {name: value for name, value in settings.items() if value is not None}


def diff_settings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Which settings that change what is learned differ, as lines of the form `learning_rate: 0.0001 -> 5e-05`.

    What was saved before a setting existed was made with its default, and may stand under its deprecated name.
    """
    before, _ = rename_settings(before)
    before = {name: OWN_DEFAULTS[name] for name in after if OWN_DEFAULTS.get(name) is not None} | before
    # How the sequences of a step are split into micro-batches changes nothing, and depends on the GPU.
    same_step = len({math.prod(settings.get(name, 0) for name in MICRO_BATCH) for settings in (before, after)}) == 1
    return [
        f"{name}: {before.get(name, 'not set')} -> {after.get(name, 'not set')}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name) and not _is_resume_safe(name) and not (same_step and name in MICRO_BATCH)
    ]


def _is_resume_safe(name: str) -> bool:
    if name in OWN:
        return OWN[name].metadata["resume_safe"]
    return any(fnmatch.fnmatch(name, pattern) for pattern in RESUME_SAFE)
