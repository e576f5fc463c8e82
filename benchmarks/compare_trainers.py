"""The same job with this trainer, plain transformers with peft, LLaMA-Factory and TRL: speed, memory, and what was learned.

    python -m benchmarks.compare_trainers --install DIR        virtual environments of the three others, once
    python -m benchmarks.compare_trainers --environments DIR --work-dir runs/mini --corpora DIR

`make demo` must have finished step 3 in the work directory. Same model, trained parameters (LoRA of rank 32 on all linear
layers and both embedding matrices), learning rate and tokens a step for all. The others get rows of token ids, so that
tokenizing and packing cost them nothing; each runs with its defaults and with the settings that make it fastest, in bf16
and in fp32 where the CPU has bf16 instructions; ours runs as the steps run by default there. Runs take turns, A B C ...
A B C ...; a ratio is the median over the rounds. The first steps of a run are not timed. All trained models are evaluated
on the same held-out rows by the same code.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch

from benchmarks import common
from benchmarks.common import ROOT, WARMUP_STEPS, Values, run_process, save_results
from benchmarks.training import ALL_OFF, varied_dialogues
from llmtuner.console import UserError, print_header, run_cli
from llmtuner.data.loader import get_dataset, load_tokenized_datasets
from llmtuner.data.packing import PackedDataset, PackIndex, one_per_sequence, pack_best_fit
from llmtuner.data.template import IGNORE_INDEX
from llmtuner.files import atomic_write_json
from llmtuner.hparams import get_train_args
from llmtuner.hparams.transformers_args import cpu_supports_bf16
from llmtuner.model.loading import load_model
from llmtuner.tokenizer.encoding import copy_tokenizer, load_tokenizer

TORCH = "torch==2.13.0"
PACKAGES = {
    "trainer": ["transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0"],
    "trl": ["trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0"],
    "llamafactory": ["llamafactory==0.9.5"],
}
TOKENS = 2_048  # a step, packed
EVAL_ROWS = 100  # held-out rows on which the trained models are evaluated
LEARNING_RATE = 5e-4
LORA: Values = dict(lora_rank=32, lora_target="all", additional_target=["embed_tokens", "lm_head"])
WITHOUT_CHECKPOINTING = {"gradient_checkpointing": False}
FACTORY_WITHOUT_CHECKPOINTING = {"disable_gradient_checkpointing": True}
NEAT_PACKING = FACTORY_WITHOUT_CHECKPOINTING | {"neat_packing": True}
# Trainer, kind of rows, its settings. "packed": rows filled with documents or dialogues; "padded": one dialogue per row;
# `isolated`: the documents of a packed row do not attend to one another.
ENTRIES: dict[str, dict[str, tuple[str, str, Values]]] = {
    "pt": {
        "ours": ("ours", "packed", {}),
        "ours, plain": ("ours", "packed", ALL_OFF),
        "Trainer + peft": ("trainer", "packed", {}),
        "LLaMA-Factory": ("llamafactory", "packed", {}),
        "LLaMA-Factory, no checkpointing": ("llamafactory", "packed", FACTORY_WITHOUT_CHECKPOINTING),
        "TRL": ("trl", "packed", {}),
        "TRL, no checkpointing": ("trl", "packed", WITHOUT_CHECKPOINTING),
    },
    "sft": {
        "ours": ("ours", "packed", {}),
        "Trainer + peft, padded": ("trainer", "padded", {}),
        "Trainer + peft, packed apart": ("trainer", "packed", {"isolated": True}),
        "LLaMA-Factory": ("llamafactory", "padded", {}),
        "LLaMA-Factory, no checkpointing": ("llamafactory", "padded", FACTORY_WITHOUT_CHECKPOINTING),
        "LLaMA-Factory, neat packing, no checkpointing": ("llamafactory", "packed", NEAT_PACKING),
        "TRL, no checkpointing, padded": ("trl", "padded", WITHOUT_CHECKPOINTING),
        "TRL, no checkpointing, packed": ("trl", "packed", WITHOUT_CHECKPOINTING),
    },
}
FASTEST = {  # the entries of --fastest: ours, and each of the others with the settings that make it fastest
    "pt": ("Trainer + peft", "LLaMA-Factory, no checkpointing", "TRL, no checkpointing"),
    "sft": (
        "Trainer + peft, packed apart",
        "LLaMA-Factory, neat packing, no checkpointing",
        "TRL, no checkpointing, packed",
    ),
}
# Settings of the steps that the others lack or that are set for all alike.
DROPPED = ("embedding_learning_rate", "warmup_ratio", "num_train_epochs", "eval_steps", "eval_strategy", "bf16")
DROPPED += ("save_steps", "eval_on_start")


def main() -> None:
    parser = common.make_parser(__doc__, "compare_trainers.json", work_dir=None, corpora=None, steps=23, repeats=5)
    parser.add_argument("--install", type=Path, metavar="DIR", help="create the virtual environments there, and exit")
    parser.add_argument("--environments", type=Path, metavar="DIR", help="where --install has created them")
    parser.add_argument("--jobs", nargs="+", choices=("pt", "pt-1024", "sft"), default=["pt", "pt-1024", "sft"])
    parser.add_argument("--only", nargs="+", metavar="ENTRY", help="ours and some entries of the table only")
    parser.add_argument("--fastest", action="store_true", help="each trainer with its fastest settings only")
    parser.add_argument(
        "--baseline", metavar="COMMIT", help="an earlier commit of this repository, which takes its turn too"
    )
    precisions = ["bf16", "fp32"] if cpu_supports_bf16() else ["fp32"]
    text = "of the other trainers; ours computes in bf16 if it is among them (default: bf16 where the CPU has it, and fp32)"
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "fp32"), default=precisions, help=text)
    options = parser.parse_args()
    if options.install:
        return install(options.install)
    if not options.environments or not (options.environments / "trl").is_dir():
        raise UserError("give --environments a directory that --install has filled.")
    common.use_work_dir(options.work_dir, "ZERO_DIR")
    for name in options.jobs:
        with tempfile.TemporaryDirectory() as scratch:
            results = compare(name, options, Path(scratch))
        save_results(options.output, {"repeats": options.repeats, **results}, name)
    return None


def install(directory: Path) -> None:
    for trainer, packages in PACKAGES.items():
        print_header(f"environment of {trainer}")
        subprocess.run([sys.executable, "-m", "venv", str(directory / trainer)], check=True)
        pip = [str(directory / trainer / "bin" / "python"), "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", TORCH], check=True)
        subprocess.run([*pip, "install", "--quiet", TORCH, *packages], check=True)
        if trainer == "llamafactory":  # on PyPI these two fit only another build of torch; text needs neither
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"], check=True)


def compare(job_name: str, options: argparse.Namespace, scratch: Path) -> Values:
    """Runs every entry of a job in turn, several times: medians, and our speed relative to theirs within each round.

    `speedup` is relative to a run, `best_speedup` to the faster one of an entry's precisions; the faster one shows it.
    """
    stage = job_name.split("-")[0]
    job, rows = prepare(job_name, options, scratch)
    entries = choose_entries(stage, options)
    runs = plan_runs(entries, options.precisions)
    versions: Values = {}
    rate = "tokens_per_second" if stage == "pt" else "target_tokens_per_second"
    if options.baseline:
        check_out(options.baseline, scratch / "baseline")

    def run(label: str, _: int) -> Values:
        name, precision = runs[label]
        trainer, kind, variant = entries[name]
        run_job = {**job, **rows[kind], "variant": variant, "bf16": precision == "bf16"}
        result = run_trainer(trainer, run_job, options.environments.resolve(), scratch)
        versions[label] = result.pop("versions")
        seconds = result.pop("seconds")
        return result | {f"{what}_per_second": rows[kind][what] / seconds for what in ("tokens", "target_tokens")}

    def relate(together: list[Values]) -> None:
        for values in together:
            values["speedup"] = together[0][rate] / values[rate]
        for labels in by_entry(runs):
            of_entry = [values for label, values in zip(runs, together, strict=True) if label in labels]
            best = min(values["speedup"] for values in of_entry)
            for values in of_entry:
                values["best_speedup"] = best

    results = common.run_in_turn(runs, options.repeats, run, relate)
    for labels in by_entry(runs):
        for label in sorted(labels, key=lambda label: results[label][rate])[:-1]:
            del results[label]["best_speedup"], results[label]["best_speedup_per_round"]
    title = f"{job_name}: {rows['what']}; speedup = ours / theirs, best_speedup = ours / their faster precision"
    common.print_results(title, results)
    return {"what": rows["what"], "precision": runs["ours"][1], "results": results, "peers": versions}


def choose_entries(stage: str, options: argparse.Namespace) -> dict[str, tuple[str, str, Values]]:
    """Ours first, then the earlier commit, then what the options choose of a stage's table.

    Raises:
        UserError: for a name that is in no stage's table.
    """
    known, names = ENTRIES[stage], {name for entries in ENTRIES.values() for name in entries}
    chosen = options.only or (FASTEST[stage] if options.fastest else known)
    if unknown := [name for name in chosen if name not in names]:
        raise UserError(f"--only {unknown[0]!r} names no entry. Known: {', '.join(map(repr, sorted(names)))}.")
    entries = {"ours": known["ours"]}
    if options.baseline:
        entries[f"ours at {options.baseline}"] = ("baseline", "packed", {})
    return entries | {name: entry for name, entry in known.items() if name in chosen}


def plan_runs(entries: dict[str, tuple[str, str, Values]], precisions: list[str]) -> dict[str, tuple[str, str]]:
    """Label of a run -> its entry and precision: ours once, as the steps run, the others once per precision."""
    default = "bf16" if "bf16" in precisions else "fp32"
    runs = {}
    for name, (trainer, *_) in entries.items():
        if trainer in ("ours", "baseline"):
            runs[name] = (name, default)
        else:
            runs |= {f"{name}, {precision}": (name, precision) for precision in precisions}
    return runs


def by_entry(runs: dict[str, tuple[str, str]]) -> list[list[str]]:
    """The labels of each entry's runs."""
    names = dict.fromkeys(name for name, _ in runs.values())
    return [[label for label, run in runs.items() if run[0] == name] for name in names]


def check_out(commit: str, directory: Path) -> None:
    """Writes the files of an earlier commit into a new directory.

    Raises:
        UserError: if git knows no such commit.
    """
    archive = directory.with_suffix(".tar")
    run_process(["git", "archive", "--format=tar", f"--output={archive}", commit])
    shutil.unpack_archive(archive, directory)


def run_trainer(trainer: str, job: Values, environments: Path, scratch: Path) -> Values:
    """One run in a process and an environment of its own."""
    python = sys.executable if trainer in ("ours", "baseline") else environments / trainer / "bin" / "python"
    root = scratch / "baseline" if trainer == "baseline" else ROOT
    atomic_write_json(scratch / "job.json", job)
    shutil.rmtree(job["output"], ignore_errors=True)
    function = "ours" if trainer == "baseline" else trainer
    command = [python, root / "benchmarks" / "trainer_job.py", function, scratch / "job.json"]
    run_process(command, HF_HUB_OFFLINE=1, TOKENIZERS_PARALLELISM="false", PYTHONWARNINGS="ignore")
    result = common.read_results(Path(job["result"]))
    losses, norms = result.pop("losses"), result.pop("gradient_norms")
    result |= {"first_loss": losses[0], "last_loss": float(numpy.mean(losses[-5:]))}
    return {**result, "first_norm": norms[0], "last_norm": norms[-1]}


def prepare(name: str, options: argparse.Namespace, scratch: Path) -> tuple[Values, Values]:
    """The settings of a job, and its rows for the others: packed and, for sft, padded."""
    import constants

    model = scratch / "model"  # in fp32: without bf16 LLaMA-Factory trains in the precision of the files
    load_model(constants.ZERO_DIR, torch.float32).save_pretrained(model)
    copy_tokenizer(constants.ZERO_DIR, model)
    window = 256 if name == "pt" else 1024
    stage = name.split("-")[0]
    if stage == "pt":
        what, settings = "the miniature's texts", common.step_settings("pt") | {"val_size": 0.05}
    else:
        what, settings = varied_dialogues(options.corpora, scratch)
        settings = {**common.step_settings("sft"), **settings, "val_size": 0.1}
    settings = {key: value for key, value in settings.items() if key not in DROPPED}
    settings |= dict(
        model_name_or_path=str(model), cutoff_len=window, plot_loss=False, cache_dir=str(scratch / "cache")
    )
    train_args = get_train_args({**settings, "output_dir": str(scratch / "output")})
    tokenizer = load_tokenizer(model)
    pool, _, held_out = load_tokenized_datasets(train_args.data, stage, tokenizer)
    segments = one_per_sequence(numpy.concatenate(held_out), pool.lengths, window)
    some = range(0, len(segments.doc_ids), max(1, len(segments.doc_ids) // EVAL_ROWS))
    save_rows(PackedDataset(pool, segments, 2), some, scratch / "held_out")

    batch = TOKENS // window
    packed = get_dataset(stage, train_args.data, train_args.training.seed, tokenizer).train
    if stage == "sft":
        packed = shuffled(packed)
    rows: Values = {
        "packed": {"batch": batch, **save_rows(packed, range(options.steps * batch), scratch / "packed", batch)},
        "what": f"{what}, {TOKENS:,} tokens a step in windows of {window}, {options.steps - WARMUP_STEPS} timed steps of each",
    }
    if stage == "sft":
        # The very dialogues of these sequences, shuffled, as many a step as a packed step has.
        dialogues = packed.pack_index.doc_ids[packed.pack_index.sequence_ids < options.steps * batch]
        dialogues = numpy.random.default_rng(0).permutation(dialogues)
        single = PackedDataset(pool, pack_best_fit(dialogues, pool, window, packed=False))
        size = len(dialogues) // options.steps
        numbers = range(size * options.steps)
        rows["padded"] = {"batch": size, **save_rows(single, numbers, scratch / "padded", size)}
    job = dict(stage=stage, model=str(model), held_out=str(scratch / "held_out"), output=str(scratch / "output"))
    job |= dict(
        result=str(scratch / "result.json"), steps=options.steps, untimed=WARMUP_STEPS, lora=LORA, ours=settings
    )
    job |= dict(learning_rate=LEARNING_RATE, cpu=True, cutoff_len=window, threads=torch.get_num_threads())
    return job, rows


def shuffled(sequences: PackedDataset) -> PackedDataset:
    """The same sequences in random order, as training takes them: dialogues are packed from the longest down."""
    segments = sequences.pack_index
    number = numpy.random.default_rng(0).permutation(len(sequences))[segments.sequence_ids]
    order = numpy.argsort(number, kind="stable")
    parts = (values[order] for values in (segments.doc_ids, segments.starts, segments.stops, number))
    return PackedDataset(sequences.token_dataset, PackIndex(*parts), sequences.prefix_len, sequences.block_diagonal)


def save_rows(sequences: PackedDataset, numbers: range, directory: Path, batch: int = 0) -> Values:
    """Writes sequences as a dataset of token ids; returns its path, and the token counts of the timed steps."""
    from datasets import Dataset

    rows, tokens, target_tokens = [], 0, 0
    for number in numbers:
        sequence = sequences[number]
        row = {key: sequence[key].tolist() for key in ("input_ids", "labels", "position_ids")}
        blocks = numpy.cumsum(sequence["position_ids"] == 0)  # 1, 1, 1, 2, 2, ...: LLaMA-Factory's mask of packed rows
        rows.append({**row, "attention_mask": blocks.tolist()})
        if number >= WARMUP_STEPS * batch:
            tokens, target_tokens = (
                tokens + len(blocks),
                target_tokens + int((sequence["labels"] != IGNORE_INDEX).sum()),
            )
    Dataset.from_list(rows).save_to_disk(str(directory))
    return {"dataset": str(directory), "tokens": tokens, "target_tokens": target_tokens}


if __name__ == "__main__":
    run_cli(main)
