"""The self-check before the first step: which model families train, which are refused, and by which setting they then train."""

import re
import shutil

import numpy
import pytest
import safetensors.torch
import torch
import transformers

from llmtuner.console import UserError
from llmtuner.data.packing import PackedDataCollator
from llmtuner.model import fused
from llmtuner.model.loading import load_model
from llmtuner.tokenizer.encoding import copy_tokenizer, load_tokenizer
from llmtuner.train import self_check
from llmtuner.train.trainer import forward_packed
from llmtuner.train.tuner import run_exp

WHOLE_LINE = re.compile(
    r"^self-check: loss [\d.]+, within (\S+) of .*; documents isolated within (\S+); (\d+) ms$", re.MULTILINE
)

CHUNKED, PACKED = {"chunked_loss": False}, {"packing": False}
SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256)
GATED = dict(**SIZES, intermediate_size=128)
GROUPED = dict(**GATED, num_key_value_heads=2)
FAMILIES = {  # name -> configuration class, its arguments, and the settings without which it is refused
    "Llama": ("LlamaConfig", GROUPED, {}),
    "Qwen3": ("Qwen3Config", dict(**GROUPED, head_dim=16), {}),
    "Gemma2": ("Gemma2Config", dict(**GROUPED, head_dim=16, final_logit_softcapping=5.0), CHUNKED),
    "Gemma3": ("Gemma3TextConfig", dict(**GROUPED, head_dim=16), {}),
    "Granite": ("GraniteConfig", dict(**GROUPED, logits_scaling=8.0), CHUNKED),
    "Cohere": ("CohereConfig", GROUPED, CHUNKED),
    "Phi": ("PhiConfig", GATED, CHUNKED),
    "Falcon": ("FalconConfig", SIZES, PACKED),
    "Bloom": ("BloomConfig", dict(hidden_size=64, n_layer=2, n_head=4), PACKED),
    "Mamba": ("MambaConfig", dict(hidden_size=64, num_hidden_layers=2, state_size=8), PACKED),
    "OPT": ("OPTConfig", dict(**SIZES, ffn_dim=128, word_embed_proj_dim=32), PACKED),
    "RecurrentGemma": (
        "RecurrentGemmaConfig",
        dict(**SIZES, num_key_value_heads=1, intermediate_size=192, lru_width=64, logits_soft_cap=5.0),
        CHUNKED | PACKED,
    ),
    "GPT-NeoX": ("GPTNeoXConfig", GATED, {}),
}
HARD = {"std": 0.3}  # weights as large as trained ones: nothing hides behind logits that are nearly 0


@pytest.fixture
def family_run(tiny_run, tiny_tokenizer_dir, tmp_path):
    """Settings that train a tiny model of a family in full, with the tests' ChatGLM3-like tokenizer."""

    def settings(name):
        config_class, sizes, _ = FAMILIES[name]
        ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
        rows = -(-len(load_tokenizer(tiny_tokenizer_dir)) // 64) * 64
        config = getattr(transformers, config_class)(vocab_size=rows, **ids, **sizes)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, **HARD)
        model.save_pretrained(str(tmp_path / "model"))
        copy_tokenizer(tiny_tokenizer_dir, tmp_path / "model")
        small = dict(model_name_or_path=str(tmp_path / "model"), finetuning_type="full", additional_target=[])
        return {**tiny_run, **small, "plot_loss": False, "learning_rate": 1e-3}

    return settings


def refusal(settings):
    """The message with which the self-check refuses a run before its first step; None where it trains."""
    try:
        run_exp(settings)
    except UserError as error:
        return str(error) if str(error).startswith("self-check") else pytest.fail(str(error))
    return None


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_or_is_refused_with_the_setting_that_helps(family_run, name, capsys, tmp_path):
    settings, needed = family_run(name), FAMILIES[name][2]
    refused = refusal(settings)
    assert (refused is not None) == bool(needed)
    assert list(tmp_path.glob("adapter/*.safetensors")) == [] or not needed
    for setting, other in (("chunked_loss", PACKED), ("packing", CHUNKED)):
        assert (f"Set {setting}: false" in (refused or "")) == (setting in needed)
        if len(needed) > 1:  # one of two settings is not enough
            assert f"Set {setting}: false" in refusal({**settings, **other})
    if needed:
        capsys.readouterr()
        metrics = run_exp({**settings, **needed})
        assert metrics["eval_loss"]["last"] < metrics["eval_loss"]["first"]
    [(loss, moved, milliseconds)] = WHOLE_LINE.findall(capsys.readouterr().out)
    assert float(loss) < 1e-6
    assert float(moved) == 0
    assert int(milliseconds) < 5_000
    remedy = ", ".join(f"`{setting}: false`" for setting in needed)
    print(f"| {name} | {'refused' if needed else 'yes'} | {remedy} | {milliseconds} |")  # a row of docs/self-check.md


@pytest.mark.parametrize("name", [name for name, (*_, needed) in FAMILIES.items() if "packing" in needed])
def test_a_padded_sequence_is_computed_as_if_alone(family_run, name):
    """Without packing there is no attention mask either: a causal model sees nothing of what stands on its right."""
    model = load_model(family_run(name)["model_name_or_path"], torch.float32, "eager")

    def logits(*lengths):
        sequences = [
            {"input_ids": numpy.arange(10, 10 + size), "position_ids": numpy.arange(size), "doc_ids": numpy.arange(0)}
            for size in lengths
        ]
        batch = PackedDataCollator(pad_id=0)([{**sequence, "labels": sequence["input_ids"]} for sequence in sequences])
        with torch.no_grad():
            return forward_packed(model, "eager", batch).logits[-1, : lengths[-1]]

    torch.testing.assert_close(logits(9, 5), logits(5), atol=1e-5, rtol=1e-5)


def test_logits_that_are_not_finite_are_no_matter_of_the_loss(family_run, tmp_path):
    settings = family_run("Llama")
    weights = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    safetensors.torch.save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert "they are not finite. Check the model's weights" in refusal(settings)


def test_attention_that_does_not_fit_the_model_says_which_does(family_run):
    settings = {**family_run("Gemma2"), "flash_attn": "varlen"}
    message = refusal(settings)
    assert message.endswith("Set flash_attn: auto.")  # and no other advice beside it
    assert "UserError" not in message
    assert "Set chunked_loss: false" in refusal({**settings, "flash_attn": "auto"})


def test_documents_that_may_see_each_other_are_not_compared(family_run):
    assert refusal({**family_run("Falcon"), "neat_packing": False, "max_steps": 1}) is None


@pytest.mark.parametrize("stage", ["pt", "sft"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("plain", [{}, {"fused_ops": False, "chunked_loss": False, "flash_attn": "sdpa"}])
def test_glm_with_lora_and_embeddings_passes(tiny_run, monkeypatch, capsys, stage, bf16, plain):
    monkeypatch.setattr("llmtuner.hparams.transformers_args.cpu_supports_bf16", lambda: True)
    other = torch.float32 if bf16 else torch.bfloat16
    monkeypatch.setitem(self_check.TOLERANCES, other, (-1, -1))
    dataset = {"pt": "documents", "sft": "dialogues"}[stage]
    short = dict(max_steps=1, eval_strategy="no", eval_on_start=False, plot_loss=False)
    run_exp({**tiny_run, **short, **plain, "stage": stage, "dataset": dataset, "bf16": bf16, "lora_dropout": 0.1})
    [(loss, moved, milliseconds)] = WHOLE_LINE.findall(capsys.readouterr().out)
    assert float(loss) < (5e-4 if bf16 else 1e-6)
    assert float(moved) == 0
    how = f"Glm, LoRA and embeddings, {stage}, {'bf16' if bf16 else 'fp32'}, {'plain' if plain else 'fused'}"
    print(f"| {how} | {loss} | {moved} | {milliseconds} |")


def test_rounding_of_bf16_stops_no_model_that_is_sure_of_itself(tiny_run, monkeypatch, capsys):
    """Random ids are what a trained model expects least, and the rounding of so large a loss may exceed the tolerance."""
    monkeypatch.setattr("llmtuner.hparams.transformers_args.cpu_supports_bf16", lambda: True)
    original, any_seed, rechecked = self_check.self_check, numpy.random.default_rng, []
    recheck = self_check._recheck
    monkeypatch.setattr(self_check, "_recheck", lambda *args: rechecked.append(recheck(*args)) or rechecked[-1])

    def repeated(trainer, *args):
        for name, parameter in trainer.model.named_parameters():
            parameter.data *= 10 if "lm_head" in name else 1
        for number in range(40):
            monkeypatch.setattr(numpy.random, "default_rng", lambda seed, number=number: any_seed([number, seed]))
            original(trainer, *args)
        monkeypatch.setattr(numpy.random, "default_rng", any_seed)

    monkeypatch.setattr(self_check, "self_check", repeated)
    short = dict(max_steps=1, eval_strategy="no", eval_on_start=False, plot_loss=False)
    run_exp({**tiny_run, **short, "bf16": True})
    tolerance = self_check.TOLERANCES[torch.bfloat16][0]
    assert len(WHOLE_LINE.findall(capsys.readouterr().out)) == 40  # none is refused
    assert 0 < len(rechecked) < 10
    assert max(rechecked) < tolerance


def test_the_check_leaves_no_trace_in_the_run(tiny_run, tmp_path, monkeypatch):
    """Weights after dropout and shuffling are bit for bit those of a run without it; no gradient is left behind."""
    settings = {**tiny_run, "lora_dropout": 0.2, "plot_loss": False}
    original, states = self_check.self_check, []

    def watched(trainer, *args):
        trainer.model.train()
        original(trainer, *args)
        states.append([trainer.model.training, *(parameter.grad for parameter in trainer.model.parameters())])

    monkeypatch.setattr(self_check, "self_check", watched)
    run_exp({**settings, "output_dir": str(tmp_path / "with")})
    assert set(states[0]) == {True, None}
    monkeypatch.setattr(self_check, "self_check", lambda *_: None)
    run_exp({**settings, "output_dir": str(tmp_path / "without")})
    one, other = (
        safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("with", "without")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_runs_on_every_start(tiny_run, tmp_path, capsys):
    settings = {**tiny_run, "save_strategy": "steps", "save_steps": 3, "plot_loss": False}
    run_exp(settings)
    shutil.rmtree(tmp_path / "adapter" / "checkpoint-6")
    run_exp(settings)  # resumes after step 3
    assert len(WHOLE_LINE.findall(capsys.readouterr().out)) == 2
    run_exp(
        {**settings, "output_dir": str(tmp_path / "eval"), "do_eval": True, "do_train": False, "eval_on_start": False}
    )
    assert len(WHOLE_LINE.findall(capsys.readouterr().out)) == 1


def test_fused_layers_that_compute_another_thing_are_named(tiny_run, monkeypatch):
    monkeypatch.setattr(fused, "linear", lambda x, weight, bias: torch.nn.functional.linear(x, weight))  # no bias
    assert "Set fused_ops: false" in refusal(tiny_run)
    run_exp({**tiny_run, "fused_ops": False, "max_steps": 1, "eval_strategy": "no"})
