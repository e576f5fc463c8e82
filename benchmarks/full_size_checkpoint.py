"""Time and memory of converting, growing and merging a checkpoint as large as ChatGLM3-6B, beside a copy of its files.

    python benchmarks/full_size_checkpoint.py --directory /somewhere/with/40/GB --output full_size.json

Random weights take the place of the published ones: same names, shapes, dtype and number of files. Each job runs in a
process of its own and starts with its input out of the page cache; the clock stops when its output is on the disk.
`--layers 2` is a trial of a few minutes.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llmtuner.console import atomic_write_json, exit_with_error, format_table, print0, run_cli  # noqa: E402

# The parent process imports no torch: a child's peak memory counts what its parent held when it was started.

CONFIG = {  # of THUDM/chatglm3-6b
    "_name_or_path": "THUDM/chatglm3-6b",
    "model_type": "chatglm",
    "add_qkv_bias": True,
    "ffn_hidden_size": 13_696,
    "hidden_size": 4_096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "padded_vocab_size": 65_024,
    "seq_length": 8_192,
    "torch_dtype": "float16",
}
FIRST_NEW_ID, NEW_PIECES, MULTIPLE = 64_798, 13_756, 64  # as in the original project: 78,592 rows
RANK = 64  # of step 5's adapter


# --------------------------------------------------------------------------------------------------------------- the jobs
def make(directory: Path, layers: int) -> None:
    """Writes a random checkpoint, named and cut into files like the published one."""
    import torch

    from llmtuner.weights.convert_chatglm import ROPE_BUFFER, chatglm_shapes, glm_config_args
    from llmtuner.weights.lazy_checkpoint import LazyTensor, write_checkpoint

    config = {**CONFIG, "num_layers": layers}
    shapes = {**chatglm_shapes(glm_config_args(config, directory)), ROPE_BUFFER: (32,)}
    torch.manual_seed(0)

    def random_rows(shape: tuple[int, ...]) -> Callable[[int, int], torch.Tensor]:
        return lambda start, stop: torch.randn(stop - start, *shape[1:]).mul_(0.02).half()

    tensors = [LazyTensor(name, shape, torch.float16, random_rows(shape), name) for name, shape in shapes.items()]
    directory.mkdir(parents=True)
    write_checkpoint(tensors, directory)
    atomic_write_json(directory / "config.json", config)


def convert(source: Path, destination: Path) -> None:
    """ChatGLM's names to Glm's."""
    from llmtuner.weights import convert_chatglm

    convert_chatglm.convert_chatglm(source, destination)


def grow(source: Path, destination: Path) -> None:
    """Embeddings with rows for the new pieces, each the mean of three old rows."""
    import random

    from llmtuner.weights.resize_embeddings import resize_token_embeddings

    destination.mkdir()
    grown = resize_token_embeddings(source, destination, new_pieces(random.Random(0)), MULTIPLE)
    print0(f"{grown.old_vocab_size:,} -> {grown.vocab_size:,} rows")


def new_pieces(generator):  # type: ignore[no-untyped-def]
    from llmtuner.weights.embedding_init import NewTokens

    base_ids = [generator.sample(range(3, FIRST_NEW_ID - 9), 3) for _ in range(NEW_PIECES)]
    return NewTokens(FIRST_NEW_ID, base_ids, 0)


def compare(source: Path, grown: Path) -> None:
    """The check of step 3: old rows on the disk are the same, bit by bit."""
    from llmtuner.weights.resize_embeddings import rows_equal

    if not rows_equal(source, grown, FIRST_NEW_ID):
        exit_with_error(f"the old rows of {grown} are not those of {source}.")


def make_adapter(grown: Path, destination: Path) -> None:
    """Writes a random adapter as step 5 leaves it: LoRA on all linear layers, both embedding matrices in fp32."""
    import torch

    from llmtuner.weights.lazy_checkpoint import LazyTensor, open_checkpoint, write_checkpoint
    from llmtuner.weights.merge_lora import LORA_A, LORA_B, PEFT_PREFIX

    def random(name: str, shape: tuple[int, int]) -> LazyTensor:
        return LazyTensor(
            name, shape, torch.float32, lambda start, stop: torch.randn(stop - start, shape[1]) * 0.02, name
        )

    tensors = []
    for name, tensor in open_checkpoint(grown).items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors.append(random(PEFT_PREFIX + name, tensor.shape))
        elif name.endswith("_proj.weight"):
            layer = PEFT_PREFIX + name.removesuffix(".weight")
            tensors += [
                random(layer + LORA_A, (RANK, tensor.shape[1])),
                random(layer + LORA_B, (tensor.shape[0], RANK)),
            ]
    destination.mkdir()
    write_checkpoint(tensors, destination, max_shard_bytes=10**12)
    (destination / "model.safetensors").rename(destination / "adapter_model.safetensors")
    modules = ["embed_tokens", "lm_head"]
    config = dict(peft_type="LORA", r=RANK, lora_alpha=2 * RANK, modules_to_save=modules, target_modules=[])
    atomic_write_json(destination / "adapter_config.json", config)


def merge(grown: Path, destination: Path) -> None:
    """Adapter and base to a plain model; the miniature's tokenizer stands in for ChatGLM3's."""
    from llmtuner.tokenizer.fast import copy_tokenizer
    from llmtuner.weights.merge_lora import merge_adapter

    copy_tokenizer(ROOT / "mini" / "base", grown)
    merge_adapter(grown, grown.with_name("adapter"), destination)


JOBS = {"convert": convert, "grow": grow, "compare": compare, "make_adapter": make_adapter, "merge": merge}


# ---------------------------------------------------------------------------------------------------------- measuring them
def job(name: str, *arguments: object) -> list[str]:
    """The command line of a job in a process of its own."""
    return [sys.executable, str(Path(__file__).resolve()), "--job", name, *map(str, arguments)]


def measure(name: str, line: list[str], source: Path, gigabytes_of: Path) -> dict:
    """Runs a command with `source` out of the page cache; size is that of the weights in `gigabytes_of` afterwards."""
    os.sync()
    for file in source.glob("*"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    process = subprocess.Popen(line)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    os.sync()
    seconds = time.perf_counter() - start
    if process.returncode:
        exit_with_error(f"{name} failed.")
    gigabytes = weight_bytes(gigabytes_of) / 1e9
    return {
        "job": name,
        "gigabytes": round(gigabytes, 3),
        "seconds": round(seconds, 2),
        "seconds_per_gigabyte": round(seconds / gigabytes, 3),
        "peak_megabytes": round(usage.ru_maxrss * 1024 / 1e6, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 2),
    }


def weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def measure_all(directory: Path, layers: int) -> list[dict]:
    """Makes the checkpoint and times every job; at most three checkpoints lie on the disk at once."""
    published, copy, glm, zero = (directory / name for name in ("published", "copy", "glm", "zero"))
    results = [measure("make it", job("make", published, layers), published, published)]
    results.append(measure("cp", ["cp", "-r", str(published), str(copy)], published, copy))
    shutil.rmtree(copy)
    results.append(measure("convert", job("convert", published, glm), published, glm))
    results.append(measure("grow, converted", job("grow", glm, zero), glm, zero))
    results.append(measure("compare old rows", job("compare", glm, zero), zero, zero))
    shutil.rmtree(zero)
    results.append(measure("grow, as published", job("grow", published, zero), published, zero))
    shutil.rmtree(glm)
    adapter, merged = directory / "adapter", directory / "merged"
    results.append(measure("make an adapter", job("make_adapter", zero, adapter), zero, adapter))
    results.append(measure("merge", job("merge", zero, merged), zero, merged))
    return results


def environment() -> dict:
    """Versions and the machine that figures belong to."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(": ")[1] for line in cpuinfo if line.startswith("model name")), platform.machine())
    return {
        "device": f"CPU: {model}, {os.cpu_count()} cores",
        "memory_gigabytes": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")},
    }


def main() -> None:
    if sys.argv[1:2] == ["--job"]:
        name, first, second = sys.argv[2:]
        if name == "make":
            make(Path(first), int(second))
        else:
            JOBS[name](Path(first), Path(second))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=CONFIG["num_layers"])
    parser.add_argument("--directory", type=Path, help="where to work; default: the system's temporary directory")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there")
    options = parser.parse_args()

    directory = Path(tempfile.mkdtemp(prefix="full-size-", dir=options.directory))
    try:
        results = measure_all(directory, options.layers)
    finally:
        if options.keep:
            print0(f"the checkpoints are in {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    header = ["job", "GB", "seconds", "seconds/GB", "processor s", "peak MB"]
    names = ("gigabytes", "seconds", "seconds_per_gigabyte", "processor_seconds", "peak_megabytes")
    print0(format_table(header, [[one["job"], *(f"{one[name]:,}" for name in names)] for one in results]))
    report = {"layers": options.layers, **environment(), "results": results}
    print0(json.dumps(report["device"]))
    if options.output:
        atomic_write_json(options.output, report)


if __name__ == "__main__":
    run_cli(main)
