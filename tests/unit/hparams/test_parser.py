"""Settings: what is taken from files and command lines, and every problem that is reported."""

import contextlib
import json
import os
import sys
from dataclasses import FrozenInstanceError

import pytest
import torch
import yaml

from llmtuner.console import UserError
from llmtuner.hparams import (
    ModelArguments,
    diff_settings,
    get_train_args,
    parse_overrides,
    read_args,
    serialize_settings,
    transformers_args,
)
from tests.training import PT_FILE, SFT_FILE

GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def without_torchrun(monkeypatch):
    """No test leaves behind, or finds, the environment of a group of processes."""
    for name in GROUP:
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)


@pytest.fixture
def good(tmp_path):
    return {"model_name_or_path": "somewhere", "output_dir": str(tmp_path), "dataset": "a,b"}


def problems_of(settings, **options):
    with pytest.raises(UserError) as error:
        get_train_args(settings, **options)
    return str(error.value)


def parts(problems):
    assert problems.startswith("settings:\n  - ")
    return problems.removeprefix("settings:\n  - ").split("\n  - ")


# ------------------------------------------------------------------------------------------------------------ problems
NO_EVAL_DATA = "nothing is held out: give val_size or eval_dataset"
SINGLE_VALUES = [
    ("lora_rank", "abc", "lora_rank is 'abc'; it must be a whole number"),
    ("lora_rank", "8", "lora_rank is '8'; it must be a whole number"),
    ("lora_rank", 1.5, "it must be a whole number"),
    ("lora_rank", True, "it must be a whole number"),
    ("lora_rank", None, "lora_rank is None; it must be a whole number"),
    ("lora_rank", 0, "lora_rank is 0; it must be at least 1"),
    ("lora_alpha", 0, "it must be greater than 0"),
    ("loraplus_lr_ratio", 0, "it must be greater than 0"),
    ("early_stopping_steps", 0, "it must be at least 1"),
    ("freeze_trainable_layers", 0, "it must be the number of the last layers, or of the first if negative"),
    ("lora_dropout", 1, "lora_dropout is 1; it must be from 0 to below 1"),
    ("lora_dropout", -0.1, "from 0 to below 1"),
    ("lora_dropout", "much", "it must be a number"),
    ("plot_loss", "please", "plot_loss is 'please'; it must be true or false"),
    ("plot_loss", 1, "it must be true or false"),
    ("model_name_or_path", 6, "model_name_or_path is 6; it must be text"),
    ("dataset", {"a": 1}, "it must be names with commas, or a list of them"),
    ("dataset", [1, 2], "it must be names with commas, or a list of them"),
    ("dataset", True, "it must be names with commas, or a list of them"),
    ("interleave_probs", "a,b", "it must be numbers with commas, or a list of them"),
    ("interleave_probs", [True, False], "it must be numbers with commas, or a list of them"),
    ("cutoff_len", 7, "cutoff_len is 7; it must be at least 8 tokens"),
    ("val_size", -0.1, "val_size is -0.1; it must be a ratio"),
    ("val_size", 1.5, "or a whole number of rows"),
    ("max_samples", 0, "at least 1"),
    ("max_eval_samples", 0, "at least 1"),
    ("preprocessing_num_workers", 0, "at least 1"),
    ("max_invalid_ratio", 1.01, "a ratio, from 0 to 1"),
    ("max_invalid_ratio", -0.01, "a ratio, from 0 to 1"),
    ("export_size", 0, "at least 1"),
    ("embedding_learning_rate", -1e-5, "a number from 0 up"),
    ("stage", "ppo", "stage is 'ppo'; it can be pt or sft"),
    ("finetuning_type", "qlora", "it can be lora or full or freeze"),
    ("mix_strategy", "shuffle", "it can be concat or interleave_under or interleave_over"),
    ("interleave_unit", "words", "it can be tokens or bytes or rows"),
    ("template", "llama3", "it can be auto or chatglm3"),
    ("flash_attn", "fa9", "it can be auto or disabled or sdpa or fa2"),
    ("train_new_tokens_only", "new", "it must be true or false"),
    ("embedding_rows", "old", "train_new_tokens_only is 'old'; it must be true or false"),
    ("export_device", "tpu", "it can be cpu or auto"),
    ("export_legacy_format", True, "weights are written as safetensors only"),
    ("save_safetensors", False, "weights are written as safetensors only"),
    ("greater_is_better", True, "greater_is_better: true is not supported: all figures of the log"),
    ("save_minutes", -1, "save_minutes is -1; it must be greater than 0"),
    ("price_per_hour", -0.5, "price_per_hour is -0.5; it must be a number from 0 up"),
    ("max_retention_loss", -0.01, "a number from 0 up"),
    ("average_tokens_across_devices", False, "the loss is normalised over all ranks"),
    ("label_smoothing_factor", 0.1, "plain cross-entropy"),
    ("do_predict", True, "do_predict: true is not supported"),
    ("adapter_name_or_path", "one,two", "one directory only"),
    ("max_steps", 0, "max_steps is 0; it must be a number of steps, or left out to train num_train_epochs"),
    ("max_steps", -2, "left out to train num_train_epochs"),
    ("max_steps", 2.5, "it must be a whole number"),
    ("num_train_epochs", 0, "greater than 0"),
    ("per_device_train_batch_size", 0, "at least 1"),
    ("per_device_train_batch_size", 1.5, "a whole number"),
    ("per_device_eval_batch_size", 0, "at least 1"),
    ("gradient_accumulation_steps", 0, "at least 1"),
    ("learning_rate", -1, "a number from 0 up"),
    ("learning_rate", float("nan"), "it must be a number"),
    ("learning_rate", float("inf"), "a number from 0 up"),
    ("learning_rate", "fast", "it must be a number"),
    ("weight_decay", -0.1, "a number from 0 up"),
    ("max_grad_norm", float("nan"), "it must be a number"),
    ("logging_steps", 0, "greater than 0"),
    ("eval_steps", 0, "greater than 0"),
    ("save_steps", -1, "greater than 0"),
    ("save_total_limit", 0, "at least 1"),
    ("warmup_ratio", 1, "from 0 to below 1"),
    ("warmup_ratio", -0.1, "from 0 to below 1"),
    ("warmup_steps", 2.5, "warmup_steps is 2.5; it must be a whole number of steps"),
    ("warmup_steps", -1, "a whole number of steps"),
    ("seed", "lucky", "seed is 'lucky'; it must be a whole number"),
    ("lr_scheduler_type", "cosin", "cosin is not a valid SchedulerType"),
    ("optim", "adam_of_tomorrow", "adam_of_tomorrow is not a valid OptimizerNames"),
    ("logging_steps", 2.5, "--logging_steps must be an integer"),
    ("deepspeed", "nowhere/zero2.json", "deepspeed names the file nowhere/zero2.json, which does not exist"),
]


@pytest.mark.parametrize(("name", "value", "text"), SINGLE_VALUES)
def test_a_value_that_cannot_be_is_the_one_problem(good, name, value, text):
    found = parts(problems_of({**good, name: value}))
    assert len(found) == 1
    assert text in found[0]


EVAL = {"val_size": 0.1, "eval_strategy": "steps"}
CONTRADICTIONS = [
    ({"mix_strategy": "interleave_under"}, "mix_strategy interleave_under needs interleave_probs"),
    ({"interleave_probs": [0.5, 0.5]}, "but mix_strategy is concat, which takes every row once"),
    ({"mix_strategy": "interleave_over", "interleave_probs": 1.0}, "interleave_probs has 1 ratios for 2 data sets"),
    ({"mix_strategy": "interleave_over", "interleave_probs": "0.5,0.6"}, "interleave_probs sums to 1.1"),
    ({"mix_strategy": "interleave_over", "interleave_probs": "1.5,-0.5"}, "ratios are not negative"),
    ({"eval_dataset": "c", "val_size": 0.1}, "eval_dataset and val_size are both given"),
    ({"eval_dataset": "c,b"}, "b is in dataset and in eval_dataset"),
    ({"eval_strategy": "steps"}, f"eval_strategy is steps, but {NO_EVAL_DATA}"),
    ({"evaluation_strategy": "epoch"}, f"eval_strategy is epoch, but {NO_EVAL_DATA}"),
    ({"do_eval": True}, f"do_eval is true, but {NO_EVAL_DATA}"),
    ({"eval_on_start": True}, f"eval_on_start is true, but {NO_EVAL_DATA}"),
    ({"do_train": False}, "there is nothing to do"),
    ({"packing": False, "neat_packing": True}, "neat_packing is true, but packing is false"),
    ({"fp16": True, "bf16": True}, "fp16 and bf16 are both true"),
    ({"warmup_steps": 10, "warmup_ratio": 0.1}, "warmup_steps and warmup_ratio are both given"),
    ({"warmup_steps": 0.1, "warmup_ratio": 0.1}, "warmup_steps and warmup_ratio are both given"),
    ({"freeze_trainable_layers": 1}, "freeze_trainable_layers is given, but finetuning_type lora"),
    ({"freeze_trainable_modules": "mlp", "finetuning_type": "full"}, "freeze_trainable_modules is given, but"),
    ({"freeze_extra_modules": "norm"}, "name them in additional_target"),
    ({"finetuning_type": "full", "loraplus_lr_ratio": 16}, "loraplus_lr_ratio is given, but finetuning_type full"),
    ({"finetuning_type": "full", "create_new_adapter": True}, "create_new_adapter is given, but finetuning_type full"),
    ({"eval_on_each_dataset": True}, f"eval_on_each_dataset is true, but {NO_EVAL_DATA}"),
    ({"early_stopping_steps": 3, "val_size": 0.1}, "early_stopping_steps is given, but nothing is evaluated"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end is given, but eval_strategy is no"),
    ({"metric_for_best_model": "loss", "save_strategy": "no", **EVAL}, "_best_model is given, but save_strategy is no"),
    (
        {"load_best_model_at_end": True, "save_only_model": True, "deepspeed": {"zero_optimization": {}}, **EVAL},
        "needs its optimizer state in checkpoints",
    ),
    ({"max_retention_loss": 0.02, "eval_on_start": True, **EVAL}, "max_retention_loss bounds the choice of the best"),
    ({"max_retention_loss": 0.02, "metric_for_best_model": "loss", **EVAL}, "set eval_on_start: true"),
    ({"save_minutes": 30, "save_strategy": "no"}, "save_minutes is given, but save_strategy is no"),
    ({"disable_shuffling": True, "train_sampling_strategy": "group_by_length"}, "asks for another order"),
    ({"finetuning_type": "full", "use_dora": True}, "use_dora is given, but finetuning_type full has no adapters"),
    ({"finetuning_type": "full", "use_rslora": True}, "use_rslora is given, but finetuning_type full"),
    ({"finetuning_type": "full", "adapter_name_or_path": "x"}, "adapter_name_or_path is given, but finetuning_type"),
    ({"use_muon": True}, "use_muon is for finetuning_type full, and this one is lora"),
    ({"use_muon": True, "finetuning_type": "full", "deepspeed": "{}"}, "use_muon needs complete matrices"),
    ({"train_new_tokens_only": True}, "train_new_tokens_only needs"),
    ({"train_new_tokens_only": True, "additional_target": "q_proj"}, "embed_tokens or lm_head in additional_target"),
    (
        {"train_new_tokens_only": True, "additional_target": "embed_tokens", "finetuning_type": "full"},
        "train_new_tokens_only needs finetuning_type lora",
    ),
    ({"dataset": ""}, "dataset is not given"),
    ({"output_dir": None}, "output_dir is not given"),
    ({"model_name_or_path": ""}, "model_name_or_path is not given"),
]


@pytest.mark.parametrize(("changed", "text"), CONTRADICTIONS)
def test_contradictions(good, capsys, changed, text):
    found = parts(problems_of({**good, **changed}))
    assert len(found) == 1
    assert text in found[0]
    assert capsys.readouterr().out == ""  # nothing is said of how they would be taken


@pytest.mark.parametrize(
    "changed",
    [
        {"mix_strategy": "interleave_under", "interleave_probs": "0.7,0.3"},
        {"eval_dataset": "c", "eval_strategy": "steps"},
        {"val_size": 200, "do_eval": True},
        {"val_size": 1.0, "do_eval": True},
        {"eval_strategy": False},  # a bare `no` in YAML
        {"packing": False},
        {"packing": False, "neat_packing": False},
        {"finetuning_type": "freeze", "additional_target": "word_embeddings"},
        {"finetuning_type": "freeze", "freeze_trainable_layers": -1, "freeze_trainable_modules": "mlp,self_attn"},
        {"freeze_trainable_layers": 2, "freeze_trainable_modules": "all", "freeze_extra_modules": None},
        {"create_new_adapter": True, "loraplus_lr_ratio": 16, "embedding_learning_rate": 1e-5},
        {"early_stopping_steps": 3, "val_size": 0.1, "eval_strategy": "steps", "metric_for_best_model": "eval_loss"},
        {"finetuning_type": "full", "lora_rank": 4},
        {"train_new_tokens_only": True, "additional_target": "output_layer"},
        {"adapter_name_or_path": "x", "use_dora": True},
        {"warmup_steps": 0, "warmup_ratio": 0.1},
        {"max_steps": -1, "lora_dropout": 0, "max_invalid_ratio": 1, "export_device": "auto"},
        {"trust_remote_code": True, "enable_liger_kernel": True, "use_unsloth": False, "use_liger_kernel": True},
        {"save_safetensors": True, "export_legacy_format": False, "load_best_model_at_end": False},
        {"max_samples": None, "save_total_limit": None, "eval_steps": None},
        {"deepspeed": None},
    ],
)
def test_what_goes_together(good, changed):
    get_train_args({**good, **changed})


def test_a_value_of_a_wrong_type_is_no_contradiction_as_well(good):
    assert len(parts(problems_of({**good, "val_size": "abc", "eval_strategy": "steps"}))) == 1
    assert len(parts(problems_of({**good, "interleave_probs": "x", "mix_strategy": "interleave_under"}))) == 1


def test_all_problems_are_reported_at_once():
    found = problems_of(
        {
            "stage": "ppo",
            "lorra_rank": 8,
            "dataset": "a,b",
            "mix_strategy": "interleave_under",
            "interleave_probs": "0.7,0.7,0.1",
            "learning_rate": "fast",
            "val_size": 2.5,
        }
    )
    wanted = ["stage is", "'lora_rank'", "3 ratios for 2", "sums to 1.5", "learning_rate is", "val_size is 2.5"]
    wanted += ["model_name_or_path is not given", "output_dir is not given"]
    assert all(part in found for part in wanted)
    assert len(parts(found)) == len(wanted)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_what_transformers_refuses_is_reported_beside_our_own_problems(good, monkeypatch, processes):
    wrong = {**good, "lorra_rank": 8, "lora_rank": 0, "seed": "x", "lr_scheduler_type": "cosin"}
    wrong |= {"fp16": True, "bf16": True}
    monkeypatch.setenv("WORLD_SIZE", processes)  # none of which waits for another
    assert len(parts(problems_of(wrong))) == 5


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("learnig_rate", "learning_rate"),
        ("lora_ranks", "lora_rank"),
        ("evaluation_stratgy", "evaluation_strategy"),
        ("gradient_checkpoint", "gradient_checkpointing"),
        ("warm_up_ratio", "warmup_ratio"),
        ("save_safetensor", "save_safetensors"),
    ],
)
def test_an_unknown_setting_names_the_nearest(good, name, near):
    assert parts(problems_of({**good, name: 1})) == [f"unknown setting {name!r}; did you mean {near!r}?"]


def test_an_unknown_setting_like_no_other(good):
    assert parts(problems_of({**good, "zzz": 1})) == ["unknown setting 'zzz'"]
    assert "unknown setting 'deepspeed_plugin'" in problems_of({**good, "deepspeed_plugin": 1})  # not for settings
    assert "unknown setting 'True'" in problems_of({**good, True: 1})  # YAML takes `on: 1` for it


# ------------------------------------------------------------------------------------------------------- what is taken
def test_settings_are_sorted_and_translated(good, tmp_path):
    args = get_train_args(
        {
            **good,
            "model_name_or_path": tmp_path / "model",
            "dataset": "a, b",
            "eval_dataset": "c",
            "mix_strategy": "interleave_under",
            "interleave_probs": "0.7,3e-1",
            "lora_target": "query_key_value,dense,q_proj",
            "additional_target": "word_embeddings,output_layer,embed_tokens",
            "lora_rank": 16.0,
            "learning_rate": "1e-4",
            "run_name": "1e4",
            "evaluation_strategy": "steps",
            "gradient_checkpointing": True,
            "warmup_ratio": 0.1,
            "per_device_train_batch_size": 2.0,
        }
    )
    model, data, training, finetuning = args.model, args.data, args.training, args.finetuning
    assert model.model_name_or_path == str(tmp_path / "model")
    assert (data.dataset, data.eval_dataset, data.interleave_probs) == (["a", "b"], ["c"], [0.7, 0.3])
    assert finetuning.lora_target == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert finetuning.additional_target == ["embed_tokens", "lm_head"]
    assert (finetuning.lora_rank, type(finetuning.lora_rank)) == (16, int)
    assert (training.learning_rate, training.run_name) == (1e-4, "1e4")
    assert training.eval_strategy == "steps"
    assert training.gradient_checkpointing
    assert training.activation_checkpointing
    assert training.get_warmup_steps(1000) == 100
    assert (training.per_device_train_batch_size, type(training.per_device_train_batch_size)) == (2, int)


def test_names_of_modules_of_the_original(good):
    wanted = "query_key_value,dense_h_to_4h,dense_4h_to_h,dense"
    assert get_train_args({**good, "lora_target": wanted}).finetuning.lora_target == [
        *("q_proj", "k_proj", "v_proj", "gate_up_proj", "down_proj", "o_proj"),
    ]
    assert get_train_args(good).finetuning.lora_target == ["all"]
    assert get_train_args({**good, "lora_target": "all"}).finetuning.lora_target == ["all"]


def test_defaults_of_this_trainer(good):
    args = get_train_args(good)
    data, training = args.data, args.training
    assert data.val_size == 0
    assert data.corpus_dir is None
    assert not training.logging_nan_inf_filter
    assert not training.remove_unused_columns
    assert training.average_tokens_across_devices
    assert training.report_to == []
    assert training.save_strategy == "steps"
    assert training.use_cpu == (not torch.cuda.is_available())
    assert get_train_args({**good, "logging_nan_inf_filter": True}).training.logging_nan_inf_filter
    assert get_train_args({**good, "ddp_timeout": 180000000}).training.ddp_timeout == 180000000


@pytest.mark.parametrize(
    ("given", "train", "evaluate"),
    [
        ({}, True, False),
        ({"do_train": True}, True, False),
        ({"do_eval": False}, True, False),
        ({"do_eval": True}, False, True),
        ({"do_train": True, "do_eval": True}, True, True),
        ({"do_train": False, "do_eval": True}, False, True),
        ({"eval_strategy": "steps"}, True, True),
    ],
)
def test_training_evaluation_or_both(good, given, train, evaluate):
    training = get_train_args({**good, "val_size": 0.1, **given}).training
    assert (training.do_train, training.do_eval) == (train, evaluate)


def test_a_ratio_as_warmup_steps_is_taken_as_one_and_noted(good):
    args = get_train_args({**good, "warmup_steps": 0.1})
    assert args.training.get_warmup_steps(1000) == 100
    assert args.notes == ("warmup_steps: 0.1 is read as warmup_ratio: 0.1; write that instead",)
    for given, steps in (({"warmup_steps": 7}, 7), ({"warmup_steps": 5, "warmup_ratio": 0}, 5)):
        args = get_train_args({**good, **given})
        assert (args.training.get_warmup_steps(1000), args.notes) == (steps, ())


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_cpu_computes_in_what_it_has_instructions_for(good, monkeypatch, has_bf16):
    monkeypatch.setattr(transformers_args, "cpu_supports_bf16", lambda: has_bf16)
    args = get_train_args({**good, "fp16": True, "use_cpu": True})
    assert (args.training.fp16, args.training.bf16) == (False, has_bf16)
    assert args.notes == (f"fp16 needs a GPU: computing in {'bf16' if has_bf16 else 'fp32'} on this CPU",)
    args = get_train_args({**good, "bf16": True, "use_cpu": True})
    assert args.training.bf16 == has_bf16
    assert ["computing in fp32" in note for note in args.notes] == ([] if has_bf16 else [True])
    assert not get_train_args({**good, "use_cpu": True}).training.bf16


@pytest.mark.parametrize(
    ("machine", "known", "has_bf16"),
    [
        ("x86_64", {"avx512_bf16": True}, True),
        ("x86_64", {"avx512_bf16": False, "amx_bf16": True}, True),
        ("AMD64", {"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ("arm64", {}, True),
    ],
)
def test_bf16_instructions_are_read_off_the_cpu(monkeypatch, machine, known, has_bf16):
    monkeypatch.setattr(transformers_args.platform, "machine", lambda: machine)
    monkeypatch.setattr(transformers_args.torch.cpu, "get_capabilities", lambda: known)
    assert transformers_args.cpu_supports_bf16() == has_bf16


@pytest.mark.parametrize(
    ("given", "disabled", "on"),
    [
        ({}, None, False),
        ({"gradient_checkpointing": True}, False, True),
        ({"gradient_checkpointing": False}, True, False),
        ({"disable_gradient_checkpointing": False}, False, True),
        ({"disable_gradient_checkpointing": True}, True, False),
        ({"gradient_checkpointing": True, "disable_gradient_checkpointing": False}, False, True),
    ],
)
def test_both_names_of_checkpointing_say_the_same(good, given, disabled, on):
    args = get_train_args({**good, **given})
    model, training = args.model, args.training
    assert (model.disable_gradient_checkpointing, training.gradient_checkpointing) == (disabled, on)


def test_names_of_checkpointing_may_not_contradict_each_other(good):
    for both in (True, False):
        with pytest.raises(UserError, match="contradict each other"):
            get_train_args({**good, "gradient_checkpointing": both, "disable_gradient_checkpointing": both})


def test_fp16_stays_on_a_gpu(good, monkeypatch):
    monkeypatch.setattr(transformers_args.torch.cuda, "is_available", lambda: True)
    taken, notes = transformers_args.to_training_arguments({**good, "fp16": True}, for_export=False)
    assert not notes
    assert taken["fp16"]
    assert not taken["use_cpu"]
    assert "bf16" not in taken


def test_an_export_needs_other_settings(good, tmp_path):
    names = {"model_name_or_path": "base", "adapter_name_or_path": "adapter", "export_dir": str(tmp_path / "merged")}
    model = get_train_args({**names, "export_device": "cpu", "finetuning_type": "full"}, for_export=True).model
    assert model == ModelArguments(**names)
    assert parts(problems_of(good, for_export=True)) == ["export_dir is not given"]


# ----------------------------------------------------------------------------------------------------------- deepspeed
@pytest.mark.parametrize("stage", [3, "3", "auto"])
@pytest.mark.parametrize("form", [dict, json.dumps, "file"])
def test_sharded_weights_are_refused(good, tmp_path, stage, form):
    config = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto"}
    (tmp_path / "zero.json").write_text(json.dumps(config))
    given = str(tmp_path / "zero.json") if form == "file" else form(config)
    assert "ZeRO-3, which shards the weights themselves, is not supported" in problems_of({**good, "deepspeed": given})


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {"stage": 2}}, {"zero_optimization": {}}])
@pytest.mark.parametrize("form", [dict, json.dumps])
def test_other_stages_of_zero_are_not(good, config, form):
    assert get_train_args({**good, "deepspeed": form(config)}).training.deepspeed == form(config)


def test_an_export_does_without_deepspeed(good):
    names = {"adapter_name_or_path": "adapter", "export_dir": "merged", "deepspeed": {}}
    assert get_train_args({**good, **names}, for_export=True).training.deepspeed is None


# ------------------------------------------------------------------------------------------------------------ effects
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"deepspeed": {"zero_optimization": {"stage": 2}}},
        {"torch_compile": True},
        {"tf32": False},
        {"lora_rank": 0},
    ],
    ids=str,
)
def test_settings_are_checked_without_effects(good, monkeypatch, capfd, given):
    """Also under torchrun: nothing is printed, no environment variable is set, no other process is waited for."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "0.0.0.0"}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with contextlib.suppress(UserError):
        get_train_args({**good, "warmup_steps": 0.1, "max_eval_sequences": 3, **given})
    assert os.environ == before
    assert capfd.readouterr() == ("", "")
    assert not torch.distributed.is_initialized()


def test_arguments_are_immutable(good):
    args = get_train_args(good)
    for part in (args, args.model, args.data, args.finetuning):
        with pytest.raises(FrozenInstanceError):
            part.model = None


# -------------------------------------------------------------------------------------------- files and command lines
def test_forms_of_a_command_line():
    words = ["--b", "0.5", "--c", "[x]", "--names", "a,b", "--rate=1.5", "d=-1", "--plot", "--e", "-2"]
    words += ["--with-dash", "yes", "--none=", "--f", "k=v", "--flag"]
    assert parse_overrides({"a": 1, "b": 2}, words) == {
        **{"a": 1, "b": 0.5, "c": ["x"], "names": "a,b", "rate": 1.5, "plot": True, "flag": True, "d": -1, "e": -2},
        **{"with_dash": True, "none": None, "f": "k=v"},
    }


def test_a_command_line_changes_nothing_it_was_given():
    settings, words = {"a": 1}, ["--a", "2"]
    assert parse_overrides(settings, words) == {"a": 2}
    assert (settings, words) == ({"a": 1}, ["--a", "2"])


@pytest.mark.parametrize("words", [["learning_rate", "1"], ["--a", "1", "2"], ["-a", "1"], ["--"], ["--=1"], ["=1"]])
def test_words_that_are_no_settings_name_the_form(words):
    with pytest.raises(UserError, match="--name value"):
        parse_overrides({}, words)


def test_a_value_that_is_no_yaml_is_named():
    with pytest.raises(UserError, match=r"the value '\[x' of --a"):
        parse_overrides({}, ["--a", "[x"])


def test_values_of_the_command_line_are_read_as_in_yaml(good, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(json.dumps(good), encoding="utf-8")
    words = [str(path), "--learning_rate", "1e-3", "--lora_rank", "8", "--evaluation_strategy", "no"]
    args = get_train_args(words)
    training, finetuning = args.training, args.finetuning
    assert (training.learning_rate, finetuning.lora_rank, training.eval_strategy) == (0.001, 8, "no")


def test_a_file_and_words(good, tmp_path, monkeypatch):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(good), encoding="utf-8")
    assert read_args(path) == read_args(str(path)) == read_args([str(path)]) == read_args(good) == good
    assert read_args([str(path), "--lora_rank", "8"]) == {**good, "lora_rank": 8}
    assert read_args(["--lora_rank", "8"]) == read_args(["lora_rank=8"]) == {"lora_rank": 8}
    monkeypatch.setattr(sys, "argv", ["train", str(path), "--lora_rank=4"])
    assert read_args() == {**good, "lora_rank": 4}
    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(UserError, match=r"FILE\.yaml --learning_rate"):
        read_args()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot read the settings file"),
        (b"a: [1", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"", "holds no settings"),
        (b"- a\n- b\n", "holds no settings"),
    ],
)
def test_files_that_are_no_settings(tmp_path, content, text):
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=text):
        read_args(path)


@pytest.mark.parametrize(("content", "stage", "sets"), [(PT_FILE, "pt", 4), (SFT_FILE, "sft", 9)])
def test_files_written_for_llama_factory(tmp_path, content, stage, sets):
    config = tmp_path / "ds_config_zero2.json"
    config.write_text("{}", encoding="utf-8")
    path = tmp_path / "run.yaml"
    path.write_text(content.replace("DEEPSPEED", str(config)), encoding="utf-8")
    args = get_train_args(path)
    model, data, training, finetuning = args.model, args.data, args.training, args.finetuning
    assert training.deepspeed == str(config)
    assert model.model_name_or_path == "models/chatglm3-6b"
    assert (finetuning.stage, len(data.dataset), data.template) == (
        stage,
        sets,
        "auto" if stage == "pt" else "chatglm3",
    )
    assert finetuning.lora_target == ["q_proj", "k_proj", "v_proj", "gate_up_proj", "down_proj", "o_proj"]
    assert finetuning.additional_target == (["embed_tokens", "lm_head"] if stage == "pt" else [])
    assert (data.val_size, data.preprocessing_num_workers, data.overwrite_cache) == (0.05, 16, True)
    assert finetuning.plot_loss
    assert not finetuning.overwrite_output_dir
    assert (training.do_train, training.eval_strategy, training.eval_steps) == (True, "steps", 10000)
    assert training.ddp_timeout == 180000000
    assert training.get_warmup_steps(1000) == 100
    assert training.learning_rate == 1e-4
    assert training.fp16 == torch.cuda.is_available()
    assert args.notes[0].startswith("warmup_steps: 0.1 is read as warmup_ratio: 0.1")


# ---------------------------------------------------------------------------------------------------- saved settings
def test_saved_settings_are_json_and_lead_to_the_same_run(good):
    args = get_train_args({**good, "val_size": 0.1, "eval_strategy": "steps", "warmup_ratio": 0.1})
    saved = serialize_settings(args)
    assert json.loads(json.dumps(saved)) == saved
    assert None not in saved.values()
    assert saved["eval_strategy"] == "steps"
    assert saved["dataset"] == ["a", "b"]
    assert saved["model_name_or_path"] == "somewhere"
    assert saved["lora_rank"] == 8
    assert (
        diff_settings(saved, serialize_settings(get_train_args({**good, "val_size": 0.1, "warmup_ratio": 0.1}))) == []
    )


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("learning_rate", 1e-4, "learning_rate: 5e-05 -> 0.0001"),
        ("max_samples", 10, "max_samples: not set -> 10"),
        ("dataset", "a", "dataset: ['a', 'b'] -> ['a']"),
        ("val_size", 0.1, "val_size: 0.0 -> 0.1"),
        ("seed", 7, "seed: 42 -> 7"),
        ("lora_rank", 4, "lora_rank: 8 -> 4"),
        ("dataloader_drop_last", True, "dataloader_drop_last: False -> True"),
        ("model_name_or_path", "elsewhere", "model_name_or_path: somewhere -> elsewhere"),
        ("flash_attn", "sdpa", "flash_attn: auto -> sdpa"),
        ("max_grad_norm", 2.0, "max_grad_norm: 1.0 -> 2.0"),
        ("disable_shuffling", True, "disable_shuffling: False -> True"),
        ("default_system", "x", "default_system: not set -> x"),
        ("loraplus_lr_ratio", 16.0, "loraplus_lr_ratio: not set -> 16.0"),
    ],
)
def test_a_change_of_what_is_learned_is_a_line(good, name, value, line):
    before, after = (serialize_settings(get_train_args(settings)) for settings in (good, {**good, name: value}))
    assert diff_settings(before, after) == [line]


def test_settings_saved_before_one_existed_had_its_default(good):
    now = serialize_settings(get_train_args(good))
    before = {name: value for name, value in now.items() if name != "disable_shuffling"}
    assert diff_settings(before, now) == []
    assert diff_settings(before, now | {"disable_shuffling": True}) == ["disable_shuffling: False -> True"]


@pytest.mark.parametrize(("size", "accumulation", "lines"), [(4, 2, 0), (1, 8, 0), (8, 1, 0), (4, 4, 1), (1, 4, 2)])
def test_how_a_step_is_split_into_micro_batches_changes_nothing(good, size, accumulation, lines):
    def saved(size, accumulation):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        return serialize_settings(get_train_args({**good, **split}))

    assert len(diff_settings(saved(4, 2), saved(size, accumulation))) == lines


def test_deepspeed_changes_what_is_learned():
    assert diff_settings({}, {"deepspeed": "zero2.json"}) == ["deepspeed: not set -> zero2.json"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("logging_steps", 3), ("save_steps", 3), ("save_total_limit", 3), ("save_strategy", "no"), ("eval_steps", 3)),
        *(("max_eval_samples", 3), ("report_to", "tensorboard"), ("run_name", "x"), ("plot_loss", True)),
        *(("preprocessing_num_workers", 3), ("dataloader_num_workers", 3), ("disable_tqdm", True)),
        *(("overwrite_cache", True), ("overwrite_output_dir", True), ("resume_from_checkpoint", "x")),
        *(("ddp_timeout", 3), ("output_dir", "x"), ("cache_dir", "x"), ("tokenized_path", "x"), ("corpus_dir", "x")),
        *(("export_size", 3), ("local_rank", 0), ("eval_dataset", "c"), ("gradient_checkpointing", True)),
        *(("per_device_eval_batch_size", 1), ("log_level", "error"), ("max_invalid_ratio", 0.5)),
        ("auto_find_batch_size", True),
    ],
)
def test_a_harmless_change_is_none(good, name, value):
    before, after = (serialize_settings(get_train_args(settings)) for settings in (good, {**good, name: value}))
    assert before != after
    assert diff_settings(before, after) == []


def test_where_and_whether_to_train_is_harmless():
    names = ("use_cpu", "do_train", "do_eval", "logging_dir", "export_dir", "export_device")
    assert diff_settings(dict.fromkeys(names, 1), {}) == []
