"""Settings files of LLaMA-Factory: which are accepted, and why the others are refused."""

import dataclasses
import json
import re
import shutil

import pytest
from transformers import TrainingArguments

from llmtuner.console import UserError
from llmtuner.data.sources import DatasetAttr
from llmtuner.hparams import DataArguments, FinetuningArguments, ModelArguments, get_train_args, llamafactory, parser
from llmtuner.hparams.setting import settings_of
from llmtuner.model.loading import load_model
from llmtuner.train.tuner import run_exp
from tests.helpers import ROOT

KNOWN = parser.OWN | settings_of(TrainingArguments)
FACTORY = json.loads((ROOT / "tests" / "fixtures" / "llamafactory.json").read_text(encoding="utf-8"))
EXAMPLES = FACTORY["examples"]
PATHS = {
    "model_name_or_path": "model",
    "adapter_name_or_path": "adapter",
    "output_dir": "output",
    "export_dir": "merged",
    "dataset": "a",
    "eval_dataset": "b",
    "dataset_dir": "data",
    "tokenized_path": "tokenized",
    "deepspeed": "ds_config_zero2.json",
}
# Of these, settings say why they are refused. All others are accepted.
REFUSED = {
    "ascend/qwen3vlmoe_full_sft_fsdp2": "image_max_pixels: 262144, video_max_pixels: 16384",
    "ascend/qwen3vlmoe_lora_sft_fsdp": "image_max_pixels: 262144, video_max_pixels: 16384",
    "extras/adam_mini/qwen2_full_sft": "use_adam_mini: true",
    "extras/apollo/llama3_full_sft": "use_apollo: true",
    "extras/asft/llama2_full_asft": "use_asft_loss: true",
    "extras/asft/qwen2_full_asft": "use_asft_loss: true",
    "extras/badam/llama3_full_sft": "use_badam: true",
    "extras/dft/qwen2_full_sft": "use_dft_loss: true",
    "extras/eaft/qwen25_05b_eaft_full": "use_eaft_loss: true",
    "extras/fp8/llama3_fp8_deepspeed_sft": "fp8: true",
    "extras/fp8/llama3_fp8_fsdp_sft": "fp8: true",
    "extras/fsdp_qlora/llama3_lora_sft": "quantization_bit: 4",
    "extras/galore/llama3_full_sft": "use_galore: true",
    "extras/llama_pro/llama3_freeze_sft": "use_llama_pro: true",
    "extras/mod/llama3_full_sft": 'mixture_of_depths: "convert"',
    "extras/nlg_eval/llama3_lora_predict": "predict_with_generate: true",
    "extras/oft/llama3_oft_sft": "finetuning_type is 'oft'",
    "extras/oft/qwen2_5vl_oft_sft": "finetuning_type is 'oft'",
    "extras/pissa/llama3_lora_sft": "pissa_init: true",
    "extras/qoft/llama3_oft_sft_awq": "finetuning_type is 'oft'",
    "extras/qoft/llama3_oft_sft_bnb_npu": "finetuning_type is 'oft'",
    "extras/qoft/llama3_oft_sft_gptq": "finetuning_type is 'oft'",
    "ktransformers/train_lora/deepseek_v2_lora_sft_kt": "use_kt: true",
    "ktransformers/train_lora/deepseek_v3_int8_lora_sft_kt": "use_kt: true",
    "ktransformers/train_lora/deepseek_v3_lora_sft_kt": "use_kt: true",
    "ktransformers/train_lora/qwen3_5moe_lora_sft_kt": "use_kt: true",
    "ktransformers/train_lora/qwen3moe_lora_sft_kt": "use_kt: true",
    "ktransformers/train_lora/qwen3vlmoe_lora_sft_kt": "use_kt: true",
    "megatron/qwen2_vl_full": "tensor_model_parallel_size: 4, sequence_parallel: true, ",
    "megatron/qwen3_moe_full": "pipeline_model_parallel_size: 4, expert_model_parallel_size: 2",
    "merge_lora/qwen3_gptq": "export_quantization_bit: 4",
    "train_full/mossvl_full_sft": "image_max_pixels: 262144, video_max_pixels: 16384",
    "train_full/qwen3vl_full_sft": "image_max_pixels: 262144, video_max_pixels: 16384",
    "train_lora/mossvl_lora_sft": "image_max_pixels: 262144, video_max_pixels: 16384",
    "train_lora/qwen3vl_lora_sft": "image_max_pixels: 262144, video_max_pixels: 16384",
    "train_qlora/qwen3_lora_sft_bnb_npu": "quantization_bit: 4",
    "train_qlora/qwen3_lora_sft_otfq": "quantization_bit: 4",
}


@pytest.fixture(autouse=True)
def no_packages_needed(monkeypatch, tmp_path):
    """Settings are checked as always, but no optional package is needed."""
    monkeypatch.setattr(parser, "missing_packages", lambda name, value: [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_config_zero2.json").write_text("{}", encoding="utf-8")


def refusals(settings):
    """The problems that settings have; none if they are accepted."""
    try:
        get_train_args(settings, for_export="stage" not in settings)
    except UserError as error:
        return str(error).removeprefix("settings:\n  - ").split("\n  - ")
    return []


def with_own_paths(example):
    """An example's settings with other paths and data sets, and this trainer's chat format."""
    settings = {name: PATHS.get(name, value) for name, value in example.items()}
    return settings | {"template": "chatglm3"} if "template" in settings else settings


def example_table():
    """Example -> accepted, or why not, as Markdown."""
    rows = ((name, refusals(with_own_paths(example))) for name, example in EXAMPLES.items())
    lines = [f"| {name} | {'; '.join(problems) or 'accepted'} |" for name, problems in rows]
    return "\n".join(["| example | outcome |", "|---|---|", *lines])


def refused_table():
    """The groups that are refused, as the page shows them."""
    lines = [
        f"| {', '.join(f'`{name}`' for name in group.switches)} | {group.reason} |"
        for group in llamafactory.UNSUPPORTED
    ]
    return "\n".join(["| setting | why, and what to use instead |", "|---|---|", *lines])


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_accepted_or_refused_for_their_reason(name):
    problems = refusals(with_own_paths(EXAMPLES[name]))
    if name not in REFUSED:
        assert problems == []
    else:
        assert any(problem.startswith(REFUSED[name]) for problem in problems), problems
        assert not any("unknown setting" in problem or "template" in problem for problem in problems)


def test_all_examples_of_text_for_lora_full_and_merging_are_accepted():
    assert len(EXAMPLES) == 57
    assert set(REFUSED) <= EXAMPLES.keys()
    folders = ("train_lora", "train_full", "merge_lora")
    refused = {name for name in REFUSED if name.split("/")[0] in folders}
    assert {name for name in refused if "vl" not in name} == {"merge_lora/qwen3_gptq"}  # it quantizes


def test_the_table_has_a_line_for_each_example():
    lines = example_table().splitlines()[2:]
    assert [line.split()[1] for line in lines] == list(EXAMPLES)
    assert sum(line.endswith("| accepted |") for line in lines) == 57 - len(REFUSED)


# Their meaning here is another one, or they are needed, or they are this trainer's own with another default.
OWN_DEFAULTS = {"stage", "finetuning_type", "model_name_or_path", "dataset", "export_dir", "neat_packing"}


@pytest.mark.parametrize("name", sorted(FACTORY["arguments"].keys() - OWN_DEFAULTS))
def test_every_argument_of_llama_factory_is_accepted_with_its_default(name):
    own = {"model_name_or_path": "model", "output_dir": "output", "dataset": "a"}
    assert refusals({"stage": "sft", **own, name: FACTORY["arguments"][name]}) == []


SWITCHES = {name: group for group in llamafactory.UNSUPPORTED for name in group.switches}


@pytest.mark.parametrize("name", SWITCHES)
def test_what_is_not_supported_says_why(name):
    own = {"stage": "sft", "model_name_or_path": "model", "output_dir": "output", "dataset": "a"}
    other = {False: True, True: False}.get(SWITCHES[name].switches[name], "something")
    problems = refusals({**own, name: other})
    assert len(problems) == 1
    assert problems[0].startswith(f"{name}: {json.dumps(other)} is not supported: {SWITCHES[name].reason}")
    assert "did you mean" not in problems[0]


def test_one_reason_names_all_settings_that_ask_for_it():
    own = {"stage": "sft", "model_name_or_path": "model", "output_dir": "output", "dataset": "a"}
    both = {
        "use_llama_pro": True,
        "galore_rank": 128,
        "mixture_of_depths": "load",
    }  # galore_rank has no meaning without use_galore
    asked = [problem.split(" is not ")[0] for problem in refusals(own | both)]
    assert asked == ['use_llama_pro: true, mixture_of_depths: "load"']


def test_tables_hold_no_setting_of_this_trainer():
    """But for those of transformers that are set aside on purpose."""
    own = {name for name in KNOWN if llamafactory.find_group(name)}
    own |= {name for entry in llamafactory.IGNORED for name in entry.names if name in KNOWN}
    assert own == {"fsdp", "fsdp_config", "use_liger_kernel"}


def test_a_typo_still_names_the_nearest_setting():
    own = {"stage": "sft", "model_name_or_path": "model", "output_dir": "output", "dataset": "a"}
    problems = refusals({**own, "early_stoping_steps": 3, "trust_remote_cod": True})
    assert problems[0] == "unknown setting 'early_stoping_steps'; did you mean 'early_stopping_steps'?"
    assert problems[1].startswith("unknown setting 'trust_remote_cod'")


# --------------------------------------------------------------------------------------------------------- remote code
def test_one_line_says_that_no_code_is_run():
    settings = with_own_paths(EXAMPLES["train_lora/qwen3_lora_sft"])
    assert get_train_args(settings).notes.count("trust_remote_code: no code of a model directory is run") == 1
    assert "trust_remote_code" not in str(get_train_args(settings | {"trust_remote_code": False}).notes)


@pytest.mark.parametrize(
    ("kind", "way_out"),
    [("chatglm", "python -m llmtuner convert {} OUT_DIR"), ("novel", "Choose a model that transformers knows")],
)
def test_a_model_that_needs_its_own_code_names_the_way_out(tmp_path, tiny_tokenizer_dir, kind, way_out):
    config = {"model_type": kind, "auto_map": {"AutoConfig": "configuration.Config", "AutoModel": "modeling.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in tiny_tokenizer_dir.iterdir():
        shutil.copy(file, tmp_path)
    own = {"output_dir": str(tmp_path / "output"), "dataset": "a", "trust_remote_code": True}
    with pytest.raises(UserError, match="such code is never run") as error:
        run_exp({"stage": "sft", "model_name_or_path": str(tmp_path), **own})
    assert way_out.format(tmp_path) in str(error.value)


def test_code_beside_a_model_that_transformers_knows_is_not_needed(tiny_model_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (model / "modeling.py").write_text("raise RuntimeError('run')", encoding="utf-8")
    assert load_model(model).config.model_type == "glm"


# ---------------------------------------------------------------------------------------------------------------- page
PAGE = (ROOT / "docs" / "from-llamafactory.md").read_text(encoding="utf-8")


def test_the_page_counts_the_examples_and_shows_the_groups():
    assert f"{57 - len(REFUSED)} are accepted with only their paths" in PAGE
    assert refused_table() in PAGE


def test_names_with_another_meaning_exist():
    section = PAGE.split("## Same name, other meaning")[1].split("## ")[0]
    named = re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)
    assert {"cache_dir", "val_size", "cutoff_len", "mask_history", "num_samples", ".txt"} <= set(named)
    assert {"long dialogues", "turn ends"} <= set(re.findall(r"^\| ([a-z ]+) \|", section, flags=re.MULTILINE))
    of_data_sets = {field.name for field in dataclasses.fields(DatasetAttr)} | {".txt"}
    ignored = {name for entry in llamafactory.IGNORED for name in entry.names}
    assert set(named) <= KNOWN.keys() | of_data_sets | ignored


def test_defaults_that_the_page_names():
    data, finetuning, model = DataArguments(), FinetuningArguments(), ModelArguments("")
    assert (finetuning.stage, data.cutoff_len, data.packing, data.neat_packing, model.export_size) == (
        "pt",
        1024,
        True,
        True,
        2,
    )
    for name, theirs in {
        "stage": "sft",
        "cutoff_len": 2048,
        "packing": None,
        "neat_packing": False,
        "export_size": 5,
    }.items():
        assert FACTORY["arguments"][name] == theirs


def test_what_the_page_says_changes_nothing_is_ignored():
    accepted = PAGE.split("## What is accepted")[1].split("## ")[0].split("- ")[2]
    named = set(re.findall(r"`(\w+)`", accepted))
    assert len(named) > 5
    assert named <= {name for entry in llamafactory.IGNORED for name in entry.names}
