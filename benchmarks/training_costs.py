"""What training costs on the miniature: packing against padding, embeddings beside LoRA, a second start with kept tokens.

    python -m benchmarks.training_costs --work-dir runs/mini --corpora DIR
    python -m benchmarks.training_costs --work-dir runs/mini --parts packing    some parts only

`make demo` must have finished in the work directory. `--corpora` holds dialogues.jsonl (instruction, input, output) with
lengths that vary, and files that step 5's sets name; without it dialogues are drawn, and only the miniature's texts are
read. What is compared runs in turn, A B A B ...; a ratio is the median over the pairs, in which the seed is the same. The
first steps of a run are not timed, evaluation and saving never. What is read from the disk may lie in the page cache.
"""

import argparse
import contextlib
import io
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy
import peft
import torch
import transformers

from llmtuner.console import UserError, format_table, print0, print_header, run_cli
from llmtuner.data.loader import load_tokenized_datasets
from llmtuner.data.packing import pack_best_fit
from llmtuner.data.readers import read_rows
from llmtuner.data.sources import get_dataset_attr
from llmtuner.files import atomic_write_json
from llmtuner.hparams import get_train_args
from llmtuner.tokenizer.fast import load_tokenizer
from llmtuner.train import workflow
from llmtuner.train.trainer import PackedTrainer
from llmtuner.train.tuner import run_exp

ROOT = Path(__file__).resolve().parent.parent
UNTIMED = 3  # first steps of a run
HELD_OUT = 0.02  # all of it is evaluated after a run
WINDOW, SEQUENCES = 1024, 2  # of dialogues that vary: as many tokens a step as the miniature's 8 sequences of 256
DRAWN, MEDIAN_BYTES, SIGMA = 3_000, 400, 1.0  # answers of lognormal length, the miniature's own glued together
PARTS = ("data", "forward", "backward", "clipping", "optimizer")  # the output layer's gradients are made in the forward
COUNTS = ("seconds", "tokens", "padding", "trained", "loss")  # of a step, by the trainer's meter; tokens with padding
Values = dict[str, Any]  # settings, or figures


class TimedTrainer(PackedTrainer):
    """Keeps the `COUNTS` of each step and the seconds of its `PARTS`; needs logging_steps 1 and no accumulation."""

    latest: "TimedTrainer"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        TimedTrainer.latest = self
        self.steps: list[Values] = []
        self.parts: Any = Counter()  # seconds since the last step
        methods = ((self, "get_batch_samples"), (self, "compute_loss"), (self.accelerator, "backward"))
        for part, (owner, name) in zip(PARTS, (*methods, (self, "_clip_grad_norm")), strict=False):
            setattr(owner, name, self._timed(part, getattr(owner, name)))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.step = self._timed("optimizer", optimizer.step)  # type: ignore[method-assign]
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.meter.update_elapsed()
            self.steps.append({**{name: getattr(self.meter, name) for name in COUNTS}, **self.parts})
            self.steps[-1]["gradient_norm"] = float(logs["grad_norm"])
            self.parts.clear()
        super().log(logs, start_time)

    def _timed(self, part: str, method: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            result = method(*args, **kwargs)
            self.parts[part] += clock() - start
            return result

        return timed


def clock() -> float:
    """Seconds, once all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parts = {"packing": measure_packing, "embeddings": measure_embeddings, "second-start": measure_second_start}
    parser = argparse.ArgumentParser(description="what training costs on the miniature")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--work-dir", type=Path, help="where `make demo` has run (default: as for the steps)")
    parser.add_argument("--corpora", type=Path, help="dialogues and documents of other lengths than the miniature's")
    parser.add_argument("--steps", type=int, default=60, help=f"of each run; the first {UNTIMED} are not timed")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each kind")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "training_costs.json")
    options = parser.parse_args()
    if options.steps <= UNTIMED or options.repeats < 1:
        raise UserError(f"nothing would be timed. Give more than {UNTIMED} --steps, and at least 1 of --repeats.")
    if options.corpora and not options.corpora.is_dir():
        raise UserError(f"{options.corpora} is not a directory. Leave --corpora out, or name another one.")
    if options.work_dir:
        os.environ["WORK_DIR"] = str(options.work_dir.resolve())
    import constants
    import pipeline

    if constants.PROFILE_NAME != "mini":
        raise UserError("this benchmark trains the miniature. Leave PROFILE unset.")
    pipeline.require_artifacts(constants.PT_MERGED_DIR)
    pipeline.require_corpus()
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    environment = {
        "commit": git.stdout.strip(),
        "python": platform.python_version(),
        **{one.__name__: one.__version__ for one in (torch, transformers, peft)},
        "device": f"CPU, {torch.get_num_threads()} threads",
        "steps": options.steps,
        "repeats": options.repeats,
    }
    for name in options.parts:
        with tempfile.TemporaryDirectory() as scratch:
            results = parts[name](options, Path(scratch))
        before = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
        atomic_write_json(options.output, {**before, name: {**environment, "results": results}})
    print0(f"\n{environment}, figures in {options.output}")


def show(title: str, results: dict[str, Values], columns: dict[str, str]) -> None:
    """Prints results as a table; `columns` are figures and their formats."""
    lines = [[name, *(format(one[key], form) for key, form in columns.items())] for name, one in results.items()]
    print_header(title)
    print0(format_table(["", *(key.replace("_", " ") for key in columns)], lines))


def medians(runs: list[Values]) -> Values:
    """The median of each figure, and for ratios all values too."""
    result: Values = {key: round(median(run[key] for run in runs), 6) for key in runs[0]}
    return result | {
        f"{key}_per_round": [round(run[key], 6) for run in runs]
        for key in runs[0]
        if key.endswith(("speedup", "ratio")) and key != "padding_ratio"
    }


def step6() -> Values:
    from step6_train_sft_single_gpu import BY_PROFILE, SETTINGS

    return {**SETTINGS, **BY_PROFILE["mini"], "val_size": HELD_OUT}


def train_in_turn(
    settings: Values, variants: dict[str, Values], options: argparse.Namespace, rate: str
) -> dict[str, Values]:
    """Trains with each variant in turn, several times: medians, and `ratio`, that of `rate` to the first variant's."""
    runs: dict[str, list[Values]] = {name: [] for name in variants}
    for seed in range(42, 42 + options.repeats):
        for name, variant in variants.items():
            print0(f"seed {seed}: {name}")
            runs[name].append(train({**settings, "seed": seed, "max_steps": options.steps, **variant}))
        together = [own[-1] for own in runs.values()]
        trained = min(run["target_tokens"] for run in together)
        for run in together:
            run["ratio"] = run[rate] / together[0][rate]
            run["train_loss*"] = loss_up_to(run.pop("losses"), run.pop("trained"), trained)
    return {name: medians(own) for name, own in runs.items()}


def train(settings: Values, max_eval_samples: int = 10**9) -> Values:
    """What is measured of one run, and `losses` and `trained` tokens of its steps."""
    own = dict(save_strategy="no", plot_loss=False, logging_steps=1, eval_on_start=False)
    own |= dict(eval_steps=settings["max_steps"], max_eval_samples=max_eval_samples, data_seed=settings["seed"])
    timed, silent = (
        mock.patch.object(workflow, "PackedTrainer", TimedTrainer),
        contextlib.redirect_stdout(io.StringIO()),
    )
    with timed, silent, tempfile.TemporaryDirectory() as directory:
        metrics = run_exp({**settings, **own, "output_dir": directory})
    trainer: Any = TimedTrainer.latest
    every = {name: numpy.array([step[name] for step in trainer.steps]) for name in (*COUNTS, *PARTS)}
    sums = {name: float(values[UNTIMED:].sum()) for name, values in every.items()}
    count, seconds = len(trainer.steps) - UNTIMED, sums["seconds"]
    states = [one for state in trainer.optimizer.state.values() for one in state.values()]
    return {
        "seconds_per_step": seconds / count,
        **{f"{part}_seconds": sums[part] / count for part in PARTS},
        "other_seconds": (seconds - sum(sums[part] for part in PARTS)) / count,
        "tokens_per_second": sums["tokens"] / seconds,
        "target_tokens_per_second": sums["trained"] / seconds,
        "padding_ratio": sums["padding"] / sums["tokens"],
        "batch_size": settings["per_device_train_batch_size"],
        "trainable_parameters": metrics["trainable_parameters"],
        "optimizer_state_bytes": sum(one.nbytes for one in states if torch.is_tensor(one)),
        "target_tokens": int(every["trained"].sum()),
        "eval_loss": metrics["eval_loss"]["last"],
        "losses": every["loss"],
        "trained": every["trained"],
    }


def loss_up_to(losses: numpy.ndarray, trained: numpy.ndarray, tokens: int) -> float:
    """Training loss in nats per trained token, over the second half of the first `tokens` of a run."""
    ends = numpy.cumsum(trained)
    weights = numpy.clip(ends, tokens / 2, tokens) - numpy.clip(ends - trained, tokens / 2, tokens)
    return float(numpy.average(losses, weights=weights))


def measure_packing(options: argparse.Namespace, scratch: Path) -> Values:
    """Packed against padded, one dialogue a row, as many dialogues a step on average; on two kinds of dialogues."""
    what, varied = varied_dialogues(options.corpora, scratch)
    results: Values = {}
    for name, settings in (("the miniature's sets", step6()), (what, {**step6(), **varied})):
        data_args = get_train_args({**settings, "output_dir": str(scratch)}).data
        token_dataset, trained, _ = load_tokenized_datasets(
            data_args, "sft", load_tokenizer(settings["model_name_or_path"])
        )
        segments = pack_best_fit(numpy.concatenate(trained), token_dataset, data_args.cutoff_len)
        per_sequence = len(segments.doc_ids) / (int(segments.sequence_ids[-1]) + 1)
        dialogues = round(settings["per_device_train_batch_size"] * per_sequence)
        padded = dict(packing=False, per_device_train_batch_size=dialogues)
        own = train_in_turn(settings, {"padded": padded, "packed": {}}, options, "target_tokens_per_second")
        lengths = {f"p{share}": int(numpy.percentile(token_dataset.lengths, share)) for share in (10, 50, 90, 99, 100)}
        results[name] = {"cutoff_len": data_args.cutoff_len, "dialogue_tokens": lengths, **own}
        columns = dict(batch_size=".0f", padding_ratio=".1%", tokens_per_second=",.0f")
        columns |= {"target_tokens_per_second": ",.0f", "ratio": ".2f", "train_loss*": ".3f", "eval_loss": ".3f"}
        show(f"{name}: {dialogues} dialogues a step, {data_args.cutoff_len} tokens, lengths {lengths}", own, columns)
    print0("* of the second half of as many trained tokens in both")
    return results


def varied_dialogues(corpora: Path | None, scratch: Path) -> tuple[str, Values]:
    """Dialogues whose lengths vary widely: what they are, and the settings of a run on them."""
    import constants

    atomic_write_json(scratch / "dataset_info.json", {"dialogues": {"file_name": "dialogues.jsonl"}})
    settings: Values = dict(dataset=["dialogues"], dataset_dir=str(scratch), cache_dir=str(scratch / "cache"))
    settings |= dict(corpus_dir=str(scratch), cutoff_len=WINDOW, per_device_train_batch_size=SEQUENCES)
    if corpora and (corpora / "dialogues.jsonl").is_file():
        return "dialogues.jsonl", {**settings, "corpus_dir": str(corpora)}
    print0("no dialogues.jsonl is given: answers of the miniature are glued together.")
    source = get_dataset_attr("dolly_ja", constants.DATASET_INFO, constants.CORPUS_DIR)
    rows, draw = [row.values for row in read_rows(source)], random.Random(0)
    with (scratch / "dialogues.jsonl").open("w", encoding="utf-8") as lines:
        for _ in range(DRAWN):
            answer, size = "", draw.lognormvariate(math.log(MEDIAN_BYTES), SIGMA)
            while len(answer.encode()) < size:
                answer += draw.choice(rows)["output"]
            lines.write(json.dumps({"instruction": draw.choice(rows)["instruction"], "output": answer}) + "\n")
    return f"answers of lognormal length, median {MEDIAN_BYTES} bytes, sigma {SIGMA}", settings


def measure_embeddings(options: argparse.Namespace, _: Path) -> Values:
    """LoRA with both embedding matrices, or their new rows, against LoRA alone, on the same batches."""
    alone: Values = dict(additional_target=[], embedding_learning_rate=None)
    variants = {"LoRA": alone, "LoRA + new rows": dict(train_new_tokens_only=True), "LoRA + embeddings": {}}
    results = train_in_turn(step6(), variants, options, "seconds_per_step")
    columns = {"seconds_per_step": ".4f", "ratio": ".3f", **{f"{part}_seconds": ".4f" for part in (*PARTS, "other")}}
    columns |= dict(trainable_parameters=",.0f", optimizer_state_bytes=",.0f", eval_loss=".3f")
    show("embeddings beside LoRA", results, columns)
    return results


def measure_second_start(options: argparse.Namespace, scratch: Path) -> Values:
    """Seconds until step 5's data is ready to be packed, and from its start to its first step: first and again."""
    import constants
    from step5_train_pt_single_gpu import BY_PROFILE, SETTINGS

    base = {**SETTINGS, **BY_PROFILE["mini"], "model_name_or_path": str(constants.PT_MERGED_DIR), "max_steps": 1}
    base |= {"eval_strategy": "no", "eval_on_start": False, "save_strategy": "no", "plot_loss": False}
    tokenizer, corpora = load_tokenizer(constants.PT_MERGED_DIR), {"the miniature's texts": constants.CORPUS_DIR}
    if options.corpora:
        corpora["texts of --corpora"] = options.corpora.resolve()
    results: Values = {}
    for name, corpus in corpora.items():
        runs: list[Values] = []
        for repeat in range(options.repeats):
            place, run = scratch / f"{name} {repeat}", {}
            for when in ("first", "again"):
                settings = {**base, "corpus_dir": str(corpus), "output_dir": str(place / when)}
                data_args = get_train_args({**settings, "cache_dir": str(place / "data")}).data
                start = time.perf_counter()
                token_dataset, *_ = load_tokenized_datasets(data_args, "pt", tokenizer)
                run[f"data_{when}"] = time.perf_counter() - start
                atomic_write_json(place / "settings.json", {**settings, "cache_dir": str(place / "process")})
                command, start = [sys.executable, "-m", "llmtuner", "train", str(place / "settings.json")], time.time()
                if code := subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
                    raise UserError(f"{' '.join(command)} ended with code {code}; its message stands above.")
                # trainer_log.jsonl is last written when the only step has been made.
                run[f"step_1_{when}"] = (place / when / "trainer_log.jsonl").stat().st_mtime - start
            run |= {f"{what}_ratio": run[f"{what}_again"] / run[f"{what}_first"] for what in ("data", "step_1")}
            runs.append({"tokens": int(token_dataset.lengths.sum()), **run})
            shutil.rmtree(place)  # kept tokens of all repeats would fill a small disk
        results[name] = medians(runs)
    columns = {"tokens": ",.0f", "data_first": ".3f", "data_again": ".3f", "data_ratio": ".4f"}
    columns |= {"step_1_first": ".2f", "step_1_again": ".2f", "step_1_ratio": ".2f"}
    show("a second start with kept tokens (seconds)", results, columns)
    return results


if __name__ == "__main__":
    run_cli(main)
