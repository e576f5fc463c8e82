"""The same job by this trainer, plain transformers with peft, LLaMA-Factory and TRL: speed, memory, and what was learned.

    python -m benchmarks.compare_trainers --install DIR                       virtual environments of the three peers, once
    python -m benchmarks.compare_trainers --environments DIR --work-dir runs/mini --corpora DIR

`make demo` must have finished step 3 in the work directory. Same model, fp32, trained parameters (LoRA of rank 32 on all
linear layers and both embedding matrices), learning rate and tokens a step for all. Peers get ready rows of ids, so that
tokenizing and packing cost them nothing; each is tried with its defaults and with the settings that make it fastest. Runs
take turns, A B C ... A B C ...; a ratio is the median over the rounds. The first steps of a run are not timed. All trained
models are examined on the same held-out rows by the same code.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch

from benchmarks.common import use_work_dir
from benchmarks.training_costs import Values, medians, show, step6, varied_dialogues
from llmtuner.console import UserError, print0, print_header, run_cli
from llmtuner.data.loader import get_dataset, load_tokenized_datasets
from llmtuner.data.packing import PackedDataset, PackIndex, one_per_sequence, pack_best_fit
from llmtuner.data.template import IGNORE_INDEX
from llmtuner.files import atomic_write_json
from llmtuner.hparams import get_train_args
from llmtuner.model.loading import load_model
from llmtuner.report.environment import environment
from llmtuner.tokenizer.fast import copy_tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compare_trainers.json"
TORCH = "torch==2.13.0"
PACKAGES = {
    "trainer": ["transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0"],
    "trl": ["trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0"],
    "llamafactory": ["llamafactory==0.9.5"],
}
UNTIMED = 3  # first steps of a run
TOKENS = 2_048  # a step, packed
HELD_OUT = 100  # rows on which the trained models are examined
LEARNING_RATE = 5e-4
LORA: Values = dict(lora_rank=32, lora_target="all", additional_target=["embed_tokens", "lm_head"])
Entry = tuple[str, str, Values]  # trainer, kind of rows, its settings
NO_CHECKPOINTING = {"gradient_checkpointing": False}
# `apart`: packed rows whose documents do not see one another; `padded`: one dialogue a row.
ENTRIES: dict[str, dict[str, Entry]] = {
    "pt": {
        "ours": ("ours", "packed", {}),
        "ours, plain": ("ours", "packed", dict(flash_attn="sdpa", fused_ops=False, chunked_loss=False)),
        "Trainer + peft": ("trainer", "packed", {}),
        "LLaMA-Factory": ("llamafactory", "packed", {}),
        "LLaMA-Factory, no checkpointing": ("llamafactory", "packed", {"disable_gradient_checkpointing": True}),
        "TRL": ("trl", "packed", {}),
        "TRL, no checkpointing": ("trl", "packed", NO_CHECKPOINTING),
    },
    "sft": {
        "ours": ("ours", "packed", {}),
        "Trainer + peft, padded": ("trainer", "padded", {}),
        "Trainer + peft, packed apart": ("trainer", "packed", {"isolated": True}),
        "LLaMA-Factory": ("llamafactory", "padded", {}),
        "LLaMA-Factory, no checkpointing": ("llamafactory", "padded", {"disable_gradient_checkpointing": True}),
        "LLaMA-Factory, neat packing, no checkpointing": (
            "llamafactory",
            "packed",
            {"disable_gradient_checkpointing": True, "neat_packing": True},
        ),
        "TRL, no checkpointing, padded": ("trl", "padded", NO_CHECKPOINTING),
        "TRL, no checkpointing, packed": ("trl", "packed", NO_CHECKPOINTING),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description="the same job by several trainers")
    parser.add_argument(
        "--install", type=Path, metavar="DIR", help="make the peers' virtual environments there, and end"
    )
    parser.add_argument("--environments", type=Path, help="where they are")
    parser.add_argument("--work-dir", type=Path, help="where steps 1 to 3 have run (default: as for the steps)")
    parser.add_argument("--corpora", type=Path, help="holds dialogues.jsonl, whose lengths vary")
    parser.add_argument("--jobs", nargs="+", choices=("pt", "pt-1024", "sft"), default=["pt", "pt-1024", "sft"])
    parser.add_argument("--only", nargs="+", help="some entries of the table only")
    parser.add_argument("--steps", type=int, default=23, help=f"of each run; the first {UNTIMED} are not timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.install:
        return install(options.install)
    if not options.environments or not (options.environments / "trl").is_dir():
        raise UserError("give --environments a directory that --install has filled.")
    use_work_dir(options.work_dir)
    for name in options.jobs:
        with tempfile.TemporaryDirectory() as scratch:
            results = compare(name, options, Path(scratch))
        before = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
        atomic_write_json(options.output, {**before, name: {**environment(), "repeats": options.repeats, **results}})
    print0(f"\nfigures in {options.output}")
    return None


def install(directory: Path) -> None:
    for peer, packages in PACKAGES.items():
        print_header(f"environment of {peer}")
        subprocess.run([sys.executable, "-m", "venv", str(directory / peer)], check=True)
        pip = [str(directory / peer / "bin" / "python"), "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", TORCH], check=True)
        subprocess.run([*pip, "install", "--quiet", TORCH, *packages], check=True)
        if peer == "llamafactory":  # on PyPI these two fit only another build of torch; text needs neither
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"], check=True)


def compare(name: str, options: argparse.Namespace, scratch: Path) -> Values:
    """Runs every entry of a job in turn, several times: medians, and ratios to ours within each round."""
    stage = name.split("-")[0]
    job, rows = prepare(name, options, scratch)
    entries = {key: entry for key, entry in ENTRIES[stage].items() if not options.only or key in options.only}
    runs: dict[str, list[Values]] = {key: [] for key in entries}
    for round_number in range(options.repeats):
        for key, (trainer, kind, variant) in entries.items():
            print0(f"{name}, round {round_number + 1}: {key}")
            result = run(trainer, {**job, **rows[kind], "variant": variant}, options.environments, scratch)
            for tokens in ("tokens", "target_tokens"):
                result[f"{tokens}_per_second"] = rows[kind][tokens] / result["seconds"]
            runs[key].append(result)
        rate = "tokens_per_second" if stage == "pt" else "target_tokens_per_second"
        first = runs["ours"][-1]
        for own in runs.values():
            own[-1]["speedup"] = first[rate] / own[-1][rate]
    keys = ("tokens_per_second", "target_tokens_per_second", "speedup", "peak_memory_gb", "held_out_loss")
    keys += ("first_loss", "last_loss", "first_norm", "last_norm")
    table = {key: medians([{one: run[one] for one in keys} for run in own]) for key, own in runs.items()}
    columns = dict(tokens_per_second=",.0f", target_tokens_per_second=",.0f", speedup=".2f", peak_memory_gb=".2f")
    columns |= dict(held_out_loss=".3f", first_loss=".3f", last_loss=".3f", first_norm=".2f", last_norm=".2f")
    show(f"{name}: {rows['what']}; ratio = ours / theirs", table, columns)
    return {"what": rows["what"], "results": table, "peers": {key: own[0]["versions"] for key, own in runs.items()}}


def run(trainer: str, job: Values, environments: Path, scratch: Path) -> Values:
    """One run in a process and an environment of its own."""
    python = sys.executable if trainer == "ours" else str(environments / trainer / "bin" / "python")
    atomic_write_json(scratch / "job.json", job)
    shutil.rmtree(job["output"], ignore_errors=True)
    silent = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    command = [python, str(ROOT / "benchmarks" / "trainer_job.py"), trainer, str(scratch / "job.json")]
    done = subprocess.run(command, env={**os.environ, **silent}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    result = json.loads(Path(job["result"]).read_text(encoding="utf-8"))
    losses, norms = result.pop("losses"), result.pop("gradient_norms")
    ends = dict(first_loss=losses[0], last_loss=numpy.mean(losses[-5:]), first_norm=norms[0], last_norm=norms[-1])
    return {**result, **{key: float(value) for key, value in ends.items()}}


def prepare(name: str, options: argparse.Namespace, scratch: Path) -> tuple[Values, Values]:
    """The settings of a job, and its rows for the peers: packed and, for sft, padded."""
    import constants
    from step5_train_pt_single_gpu import BY_PROFILE, SETTINGS

    model = scratch / "model"  # in fp32: LLaMA-Factory trains in the precision of the files
    load_model(constants.ZERO_DIR, torch.float32).save_pretrained(model)
    copy_tokenizer(constants.ZERO_DIR, model)
    window = 256 if name == "pt" else 1024
    stage = name.split("-")[0]
    if stage == "pt":
        what, settings = "the miniature's texts", {**SETTINGS, **BY_PROFILE["mini"], "val_size": 0.05}
    else:
        what, settings = varied_dialogues(options.corpora, scratch)
        settings = {**step6(), **settings, "val_size": 0.1}
    dropped = ("embedding_learning_rate", "warmup_ratio", "num_train_epochs", "eval_steps", "eval_strategy", "bf16")
    settings = {key: value for key, value in settings.items() if key not in (*dropped, "save_steps", "eval_on_start")}
    settings |= dict(
        model_name_or_path=str(model), cutoff_len=window, plot_loss=False, cache_dir=str(scratch / "cache")
    )
    train_args = get_train_args({**settings, "output_dir": str(scratch / "output")})
    tokenizer = load_tokenizer(model)
    token_dataset, _, held = load_tokenized_datasets(train_args.data, stage, tokenizer)
    segments = one_per_sequence(numpy.concatenate(held), token_dataset.lengths, window)
    save(
        PackedDataset(token_dataset, segments, 2),
        range(0, len(segments.doc_ids), max(1, len(segments.doc_ids) // HELD_OUT)),
        scratch / "held_out",
    )

    batch = TOKENS // window
    rows: Values = {}
    packed = get_dataset(stage, train_args.data, train_args.training.seed, tokenizer).train
    if stage == "sft":
        packed = in_chance_order(packed)
    rows["packed"] = {"batch": batch, **save(packed, range(options.steps * batch), scratch / "packed", batch)}
    if stage == "sft":
        # The very dialogues of these sequences, in chance order, as many a step as a packed step has.
        own = packed.pack_index.doc_ids[packed.pack_index.sequence_ids < options.steps * batch]
        own = numpy.random.default_rng(0).permutation(own)
        single = PackedDataset(token_dataset, pack_best_fit(own, token_dataset, window, packed=False))
        size = len(own) // options.steps
        rows["padded"] = {"batch": size, **save(single, range(size * options.steps), scratch / "padded", size)}
    rows["what"] = (
        f"{what}, {TOKENS:,} tokens a step in windows of {window}, {options.steps - UNTIMED} timed steps of each"
    )
    job = dict(stage=stage, model=str(model), held_out=str(scratch / "held_out"), output=str(scratch / "output"))
    job |= dict(
        result=str(scratch / "result.json"), steps=options.steps, untimed=UNTIMED, threads=torch.get_num_threads()
    )
    job |= dict(learning_rate=LEARNING_RATE, cpu=True, bf16=False, cutoff_len=window, lora=LORA, ours=settings)
    return job, rows


def in_chance_order(sequences: PackedDataset) -> PackedDataset:
    """The same sequences in an order of chance, as training takes them: dialogues are packed from the longest down."""
    own = sequences.pack_index
    number = numpy.random.default_rng(0).permutation(len(sequences))[own.sequence_ids]
    sorting = numpy.argsort(number, kind="stable")
    parts = (values[sorting] for values in (own.doc_ids, own.starts, own.stops, number))
    return PackedDataset(sequences.token_dataset, PackIndex(*parts), sequences.prefix_len, sequences.block_diagonal)


def save(sequences: PackedDataset, numbers: range, directory: Path, batch: int = 0) -> Values:
    """Writes sequences as a data set of ready rows; returns its place, and the tokens of those steps that are timed."""
    from datasets import Dataset

    lines, tokens, trained = [], 0, 0
    for number in numbers:
        one = sequences[number]
        blocks = numpy.cumsum(one["position_ids"] == 0)  # 1, 1, 1, 2, 2, ...: LLaMA-Factory's mask of packed rows
        lines.append({key: one[key].tolist() for key in ("input_ids", "labels", "position_ids")})
        lines[-1]["attention_mask"] = blocks.tolist()
        if number >= UNTIMED * batch:
            tokens, trained = tokens + len(blocks), trained + int((one["labels"] != IGNORE_INDEX).sum())
    Dataset.from_list(lines).save_to_disk(str(directory))
    return {"dataset": str(directory), "tokens": tokens, "target_tokens": trained}


if __name__ == "__main__":
    run_cli(main)
