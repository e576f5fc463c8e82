"""Step 5 of ChatGLM3-6B on several GPUs, computed: what ZeRO-2 sends, when that costs less than 5 %, hours for 1B tokens.

    python -m benchmarks.scaling              prints the tables of benchmarks/scaling.md
    python -m benchmarks.scaling --measure    also checks the formula of the traffic by counting bytes on the loopback

Per step each of N GPUs sends (A + 1) * (N - 1) / N * P * 2 bytes under ZeRO-2 in bf16: after each of A micro-batches the
gradients of the P trained parameters go to the GPUs that update them, and once the updated parameters come back. Under DDP it
is 2 * (N - 1) / N * P * 4 bytes: one all-reduce, in fp32, of the gradients summed over the micro-batches. `--measure` trains in
two processes on the CPU in fp32, 10 and 30 steps, and takes the difference of the loopback's counters, so nothing else may use
the loopback meanwhile. There gloo reduces: (N + 1) / N times what NCCL's ring sends. Nothing else here is measured.
"""

import json
import re
import statistics
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks import common
from benchmarks.common import CHATGLM3_6B, LORA_RANK, NUM_NEW_TOKENS, ROOT, Values, markdown_table
from llmtuner.console import print0, run_cli

TABLES = ("loopback", "flop", "traffic", "optimizer", "overlap", "hours")
UTILIZATION = 0.4  # of the vendor's peak: assumed
TOKENS = 16_384  # per step and GPU: 4 sequences of 1,024, accumulated 4 times, as step 5 has it
MEAN_ATTENDED = 512  # tokens that a token attends to in a window of 1,024, one document in it
LAYERS, WIDTH, ROWS = CHATGLM3_6B["num_hidden_layers"], CHATGLM3_6B["hidden_size"], CHATGLM3_6B["vocab_size"]
# Parameters of all linear layers but the output layer.
BODY = LAYERS * (2 * WIDTH * WIDTH + 2 * WIDTH * 256 + 3 * WIDTH * CHATGLM3_6B["intermediate_size"])
# Dense bf16 TFLOP/s by the vendor's data sheet; GB/s that a GPU sends while it receives as much, assumed but for NVLink.
GPUS = {
    "RTX 3090, PCIe without peer-to-peer": (71, 8),
    "RTX 4090, PCIe without peer-to-peer": (165, 8),
    "A100 80 GB, PCIe 4.0": (312, 20),
    "A100 80 GB, NVLink": (312, 300),
    "H100 SXM, NVLink": (989, 450),
}
COUNTS = (1, 4, 8, 64)
STEPS = (10, 30)  # of the two runs whose difference is measured


def main() -> None:
    parser = common.make_parser(__doc__, "scaling.json")
    parser.add_argument("--measure", action="store_true", help="count bytes on the loopback, some minutes")
    options = parser.parse_args()
    if options.measure:
        measured = {"trained": trained_parameters(), "measured": [measure(1), measure(4), measure(4, deepspeed=False)]}
        common.save_results(options.output, measured)
    else:
        measured = common.read_results(options.output)
    for table in TABLES:
        print0(f"\n{tables(measured, table)}")


def trained_parameters() -> dict[str, int]:
    """Trained parameters of the three ways to train ChatGLM3-6B."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    with torch.device("meta"):
        config = GlmConfig(**CHATGLM3_6B, attention_bias=True, pad_token_id=0, tie_word_embeddings=False)
        modules = GlmForCausalLM(config).named_modules()
    linear = [module for name, module in modules if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    lora = sum(LORA_RANK * (module.in_features + module.out_features) for module in linear)
    return {
        "LoRA": lora,
        "LoRA + new tokens": lora + 2 * NUM_NEW_TOKENS * WIDTH,
        "LoRA + embeddings": lora + 2 * ROWS * WIDTH,
    }


def flop_per_token(lora: int, checkpointing: bool, attended: float = MEAN_ATTENDED) -> float:
    """FLOP of a token with `lora` parameters of LoRA and the output layer trained."""
    flop = 4 * BODY + 6 * (lora + ROWS * WIDTH) + 12 * LAYERS * WIDTH * attended
    return flop + (2 * (BODY + lora) + 4 * LAYERS * WIDTH * attended if checkpointing else 0)


def sent(parameters: int, gpus: int, accumulation: int) -> float:
    """GB that each GPU sends in a step under ZeRO-2, in bf16."""
    return (accumulation + 1) * (gpus - 1) / gpus * parameters * 2 / 1e9


def seconds_sending(parameters: int, gpus: int, accumulation: int, bandwidth: float) -> float:
    """Seconds of a step in which ZeRO-2 sends at `bandwidth` GB/s, if it never sends while the GPU computes.

    A gradient passes all GPUs of NCCL's ring on its way to one of them, so the last one's idle link costs time as well.
    """
    return (accumulation + (gpus - 1) / gpus) * parameters * 2 / 1e9 / bandwidth if gpus > 1 else 0.0


def sent_by_ddp(parameters: int, gpus: int) -> float:
    """GB that each GPU sends in a step under DDP, in fp32."""
    return 2 * (gpus - 1) / gpus * parameters * 4 / 1e9


def measure(accumulation: int, deepspeed: bool = True) -> Values:
    """Bytes per step on the loopback of a small run, and what the formula says: the median of three differences."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        settings = small_run(directory, ROOT / "mini" / "base")
        counted, trained = [], 0
        for repeat in range(3):
            runs = (run(settings, directory / f"{repeat}-{steps}", steps, accumulation, deepspeed) for steps in STEPS)
            few, many = runs
            counted.append((many[0] - few[0]) / (STEPS[1] - STEPS[0]))
            trained = many[1]
    # Of two processes: gloo reduces 3/2 of half, and gathers half; DDP sends all once.
    formula = (1.5 * accumulation + 1 if deepspeed else 2) * trained * 4
    kind = "ZeRO-2" if deepspeed else "DDP"
    return {"kind": kind, "accumulation": accumulation, "formula": formula, "counted": statistics.median(counted)}


def small_run(directory: Path, model: Path) -> Values:
    """Writes 2,000 short texts into a directory; returns settings of a run of step 5 on them."""
    texts = [{"text": f"从前有一座山，山上住着第{number}位木匠。" * 8} for number in range(2_000)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts)
    (directory / "texts.jsonl").write_text(lines, encoding="utf-8")
    info = {"texts": {"file_name": "texts.jsonl", "columns": {"prompt": "text"}}}
    (directory / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    settings: Values = dict(stage="pt", model_name_or_path=str(model), dataset="texts", cutoff_len=64)
    settings |= dict(dataset_dir=str(directory), cache_dir=str(directory / "cache"))
    settings["additional_target"] = "embed_tokens,lm_head"
    return settings | dict(per_device_train_batch_size=1, learning_rate=1e-4, save_strategy="no")


def launch(settings: Values, processes: int, **variables: object) -> common.FinishedProcess:
    """Trains in processes of their own, under torchrun."""
    file = Path(settings["output_dir"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    launcher = f"-m torch.distributed.run --nproc_per_node {processes} --master_port {common.free_port()} -m llmtuner"
    return common.run_process([sys.executable, *launcher.split(), "train", file], **variables)


def run(settings: Values, output_dir: Path, steps: int, accumulation: int, deepspeed: bool) -> tuple[int, int]:
    """Bytes that a run of some steps put on the loopback, and its trained parameters."""
    settings = settings | dict(max_steps=steps, output_dir=str(output_dir), gradient_accumulation_steps=accumulation)
    if deepspeed:
        settings["deepspeed"] = str(ROOT / "ds_config_zero2.json")
    before = loopback_bytes()
    done = launch(settings, 2, DS_ACCELERATOR="cpu", OMP_NUM_THREADS=1, GLOO_SOCKET_IFNAME="lo")
    counted = loopback_bytes() - before
    [parameters] = re.findall(r"(?m)^training ([\d,]+) .*parameters", done.stdout)
    return counted, int(parameters.replace(",", ""))


def loopback_bytes() -> int:
    """Bytes sent over the loopback since the machine started."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[9])


def tables(measured: Values, name: str) -> str:
    """A table of benchmarks/scaling.md, by its name in `TABLES`: from trained parameters and what `--measure` counted."""
    trained = measured["trained"]
    flop = [flop_per_token(trained["LoRA"], checkpointing) for checkpointing in (False, True)]
    speeds = {gpu: UTILIZATION * tflops * 1e12 / flop[True] for gpu, (tflops, _) in GPUS.items()}
    gpus = [f"{count} GPU{'s' * (count > 1)}" for count in COUNTS]
    if name == "loopback":
        header = ["", "micro-batches per step", "MB by the formula", "MB counted"]
        lines = [
            [case["kind"], str(case["accumulation"]), *(f"{case[key] / 1e6:.2f}" for key in ("formula", "counted"))]
            for case in measured["measured"]
        ]
    elif name == "flop":
        header = ["GFLOP per token", "without gradient checkpointing", "with it"]
        lines = [["LoRA + embeddings", *(f"{value / 1e9:.1f}" for value in flop)]]
    elif name == "traffic":
        cases = [(accumulation, count) for accumulation in (1, 4, 16) for count in (4, 8)]
        header = ["trained", "P", *(f"A = {a}, N = {n}" for a, n in cases), *(f"DDP, N = {n}" for n in (4, 8))]
        lines = []
        for recipe, parameters in trained.items():
            gigabytes = [*(sent(parameters, n, a) for a, n in cases), *(sent_by_ddp(parameters, n) for n in (4, 8))]
            lines.append([recipe, f"{parameters / 1e6:,.0f} M", *(f"{value:.2f}" for value in gigabytes)])
    elif name == "optimizer":
        header = ["trained", *gpus[:3]]
        lines = [[recipe, *(f"{12 * size / n / 1e9:.2f}" for n in COUNTS[:3])] for recipe, size in trained.items()]
    elif name == "overlap":  # computation takes 19 times as long as communication
        header, lines = ["", *trained], []
        for gpu, (_, bandwidth) in GPUS.items():
            seconds = [19 * seconds_sending(size, 8, 1, bandwidth) for size in trained.values()]
            lines.append([gpu, *(f"{time * speeds[gpu]:,.0f}" for time in seconds)])
    else:
        header, lines = ["", "tokens/s and GPU, computation alone", *gpus], []
        for gpu, (_, bandwidth) in GPUS.items():
            sending = [seconds_sending(trained["LoRA + embeddings"], n, 4, bandwidth) for n in COUNTS]
            seconds = [TOKENS / speeds[gpu] + time for time in sending]
            hours = [f"{1e9 / n * step / TOKENS / 3600:,.1f}" for n, step in zip(COUNTS, seconds, strict=True)]
            lines.append([gpu, f"{speeds[gpu]:,.0f}", *hours])
        original = [f"{1e9 / n / 1_160 / 3600:,.1f}" if n <= 4 else "" for n in COUNTS]
        lines.append(["RTX 4090, as the original project measured on 4", "1,160", *original])
    return markdown_table(header, lines)


if __name__ == "__main__":
    run_cli(main)
