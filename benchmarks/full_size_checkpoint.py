"""Time and memory of converting, resizing and merging a checkpoint as large as ChatGLM3-6B, beside a copy of its files.

    python -m benchmarks.full_size_checkpoint --directory /somewhere/with/40/GB
    python -m benchmarks.full_size_checkpoint --directory DIR --layers 2 --output trial.json        some minutes

Random weights take the place of the published ones: same names, shapes, dtype and number of files. Each job runs in a
process of its own and starts with its input out of the page cache; the clock stops when its output is on the disk.
"""

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import LORA_RANK, NUM_NEW_TOKENS, ROOT, Values
from llmtuner.console import UserError, print0, run_cli
from llmtuner.files import atomic_write_json

# The parent process imports no torch: a child's peak memory includes what its parent held when it forked.

CONFIG: Values = dict(_name_or_path="THUDM/chatglm3-6b", model_type="chatglm", torch_dtype="float16")  # its config.json
CONFIG |= dict(num_layers=28, hidden_size=4_096, ffn_hidden_size=13_696, num_attention_heads=32, kv_channels=128)
CONFIG |= dict(multi_query_attention=True, multi_query_group_num=2, add_qkv_bias=True, layernorm_epsilon=1e-5)
CONFIG |= dict(padded_vocab_size=65_024, seq_length=8_192)
FIRST_NEW_ID, MULTIPLE = 64_798, 64  # as in the original project: 78,592 rows


def create(directory: Path, layers: str) -> None:
    """Writes a random checkpoint with the names and the file sizes of the published one."""
    import torch

    from llmtuner.weights.convert_chatglm import ROPE_BUFFER, chatglm_shapes, glm_config_args
    from llmtuner.weights.lazy_checkpoint import LazyTensor, write_checkpoint

    config = {**CONFIG, "num_layers": int(layers)}
    shapes = {**chatglm_shapes(glm_config_args(config, directory)), ROPE_BUFFER: (32,)}
    torch.manual_seed(0)

    def random_rows(shape: tuple[int, ...]) -> Callable[[int, int], torch.Tensor]:
        return lambda start, stop: torch.randn(stop - start, *shape[1:]).mul_(0.02).half()

    tensors = [LazyTensor(name, shape, torch.float16, random_rows(shape), name) for name, shape in shapes.items()]
    directory.mkdir(parents=True)
    write_checkpoint(tensors, directory)
    atomic_write_json(directory / "config.json", config)


def convert(source: Path, destination: str) -> None:
    """ChatGLM's names to Glm's."""
    from llmtuner.weights import convert_chatglm

    convert_chatglm.convert_chatglm(source, Path(destination))


def resize(source: Path, destination: str) -> None:
    """Embeddings with rows for the new tokens, each the mean of three base rows."""
    from llmtuner.weights.embedding_init import NewTokens
    from llmtuner.weights.resize_embeddings import resize_token_embeddings

    generator = random.Random(0)
    base_range = range(3, FIRST_NEW_ID - 9)
    base_ids = [generator.sample(base_range, 3) for _ in range(NUM_NEW_TOKENS)]
    Path(destination).mkdir()
    resize_token_embeddings(source, Path(destination), NewTokens(FIRST_NEW_ID, base_ids, 0, base_range), MULTIPLE)


def compare(source: Path, resized: str) -> None:
    """The check of step 3: the base rows on the disk are the same, bit by bit."""
    from llmtuner.weights.resize_embeddings import rows_equal

    if not rows_equal(source, Path(resized), FIRST_NEW_ID):
        raise UserError(f"the base rows of {resized} are not those of {source}.")


def make_adapter(resized: Path, destination: str) -> None:
    """Writes a random adapter as step 5 leaves it: LoRA on all linear layers, both embedding matrices in fp32."""
    import torch

    from llmtuner.weights.lazy_checkpoint import LazyTensor, open_checkpoint, write_checkpoint
    from llmtuner.weights.merge_lora import LORA_A, LORA_B, PEFT_PREFIX

    def random_tensor(name: str, rows: int, columns: int) -> LazyTensor:
        def read(start: int, stop: int) -> torch.Tensor:
            return torch.randn(stop - start, columns) * 0.02

        return LazyTensor(name, (rows, columns), torch.float32, read, name)

    tensors = []
    for name, tensor in open_checkpoint(resized).items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors.append(random_tensor(PEFT_PREFIX + name, *tensor.shape))
        elif name.endswith("_proj.weight"):
            layer = PEFT_PREFIX + name.removesuffix(".weight")
            tensors.append(random_tensor(layer + LORA_A, LORA_RANK, tensor.shape[1]))
            tensors.append(random_tensor(layer + LORA_B, tensor.shape[0], LORA_RANK))
    adapter = Path(destination)
    adapter.mkdir()
    write_checkpoint(tensors, adapter, max_shard_bytes=10**12)
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    modules = ["embed_tokens", "lm_head"]
    config = dict(peft_type="LORA", r=LORA_RANK, lora_alpha=2 * LORA_RANK, modules_to_save=modules, target_modules=[])
    atomic_write_json(adapter / "adapter_config.json", config)


def merge(resized: Path, destination: str) -> None:
    """Adapter and base to a plain model; the miniature's tokenizer stands in for ChatGLM3's."""
    from llmtuner.tokenizer.encoding import copy_tokenizer
    from llmtuner.weights.merge_lora import merge_adapter

    copy_tokenizer(ROOT / "mini" / "base", resized)
    merge_adapter(resized, resized.with_name("adapter"), Path(destination))


JOBS = {job.__name__: job for job in (create, convert, resize, compare, make_adapter, merge)}


def measure(command: list[Any], source: Path, output: Path) -> Values:
    """Runs a command with `source` out of the page cache; the size is that of the weights in `output` afterwards."""
    os.sync()
    for file in source.glob("*"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    done = common.run_process(command, sync=True)
    gigabytes = sum(file.stat().st_size for file in output.glob("*.safetensors")) / 1e9
    values = {"gigabytes": round(gigabytes, 3), "seconds": round(done.seconds, 2)}
    values |= {"seconds_per_gigabyte": round(done.seconds / gigabytes, 3), "peak_megabytes": round(done.peak_mb, 1)}
    return values | {"processor_seconds": round(done.cpu_seconds, 2)}


def measure_all(directory: Path, layers: int) -> dict[str, Values]:
    """Creates the checkpoint and times every job; at most three checkpoints lie on the disk at once."""
    names = ("published", "copy", "glm", "zero", "adapter", "merged")
    published, copy, glm, zero, adapter, merged = (directory / name for name in names)

    def job(name: str, *arguments: object) -> list[Any]:
        return [sys.executable, "-m", "benchmarks.full_size_checkpoint", "--job", name, *arguments]

    results = {"create": measure(job("create", published, layers), published, published)}
    results["cp"] = measure(["cp", "-r", published, copy], published, copy)
    shutil.rmtree(copy)
    results["convert"] = measure(job("convert", published, glm), published, glm)
    results["resize, converted"] = measure(job("resize", glm, zero), glm, zero)
    results["compare base rows"] = measure(job("compare", glm, zero), zero, zero)
    shutil.rmtree(zero)
    results["resize, as published"] = measure(job("resize", published, zero), published, zero)
    shutil.rmtree(glm)
    results["make an adapter"] = measure(job("make_adapter", zero, adapter), zero, adapter)
    results["merge"] = measure(job("merge", zero, merged), zero, merged)
    return results


def main() -> None:
    if sys.argv[1:2] == ["--job"]:
        name, source, argument = sys.argv[2:]
        return JOBS[name](Path(source), argument)
    parser = common.make_parser(__doc__, "full_size_checkpoint.json")
    parser.add_argument("--layers", type=int, default=CONFIG["num_layers"])
    parser.add_argument("--directory", type=Path, help="where to work; default: the system's temporary directory")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="full-size-", dir=options.directory)).resolve()
    try:
        results = measure_all(directory, options.layers)
    finally:
        if options.keep:
            print0(f"the checkpoints are in {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    common.print_results(f"{options.layers} layers", results)
    jobs = [{"job": job, **values} for job, values in results.items()]
    return common.save_results(options.output, {"layers": options.layers, "results": jobs})


if __name__ == "__main__":
    run_cli(main)
