"""What ZeRO-2 sends per step: by formula for ChatGLM3-6B, and the formula against bytes counted on the loopback.

    python -m benchmarks.zero2_traffic

Per step each of N GPUs sends (2 A + 1) * (N - 1) / N * P * b bytes: after each of A micro-batches DeepSpeed averages the
gradients of the P trained parameters by all-reduce (twice their size), and once it gathers the updated parameters; b bytes
each. The measurement runs the
trainer in two processes on the CPU (gloo), 10 and 30 steps, and takes the difference of the loopback's counters; so nothing
else may use the loopback meanwhile.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "zero2_traffic.json"
ROWS, NEW_ROWS, WIDTH, RANK = 78_592, 13_756, 4_096, 64
STEPS = (10, 30)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from llmtuner.console import format_table

    trained = parameters_of_chatglm3()
    rows = []
    for name, count in trained.items():
        sent = {gpus: 3 * (gpus - 1) / gpus * count * 2 / 1e9 for gpus in (2, 4, 8)}
        state = {gpus: 12 * count / gpus / 1e9 for gpus in (1, 4, 8)}
        rows.append([name, f"{count / 1e6:,.1f} M", *(f"{value:.2f}" for value in (*sent.values(), *state.values()))])
    print(
        "ChatGLM3-6B grown, LoRA of rank 64 on all linear layers; bf16; no accumulation (with it: (2 A + 1) / 3 times)"
    )
    header = ["trained", "parameters", "GB sent, 2 GPUs", "4", "8", "GB of optimizer, 1 GPU", "4", "8"]
    print(format_table(header, rows))
    measured = [measure(accumulation) for accumulation in (1, 4)]
    print("\nthe formula against the loopback: two processes, fp32, bytes of both per step")
    cells = [
        [str(one["accumulation"]), *(f"{one[key] / 1e6:.2f} MB" for key in ("formula", "counted"))] for one in measured
    ]
    print(format_table(["accumulation", "formula", "counted"], cells))
    RESULTS.write_text(json.dumps({"trained": trained, "measured": measured}, indent=2) + "\n", encoding="utf-8")


def parameters_of_chatglm3() -> dict[str, int]:
    """Trained parameters of the three ways to train it."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    config = GlmConfig(
        vocab_size=ROWS,
        hidden_size=WIDTH,
        intermediate_size=13_696,
        num_hidden_layers=28,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        attention_bias=True,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    linear = [one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and name != "lm_head"]
    lora = sum(RANK * (one.in_features + one.out_features) for one in linear)
    return {
        "LoRA": lora,
        "LoRA + new rows": lora + 2 * NEW_ROWS * WIDTH,
        "LoRA + embeddings": lora + 2 * ROWS * WIDTH,
    }


def measure(accumulation: int) -> dict[str, float]:
    """Bytes per step on the loopback of a small run, and what the formula says."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        texts = [{"text": f"从前有一座山，山上住着第{number}位木匠。" * 8} for number in range(2_000)]
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in texts)
        (directory / "texts.jsonl").write_text(lines, encoding="utf-8")
        info = {"texts": {"file_name": "texts.jsonl", "columns": {"prompt": "text"}}}
        (directory / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        counted, trained = [], 0
        for repeat in range(3):
            few, many = (run(directory, steps, accumulation, f"{repeat}-{steps}") for steps in STEPS)
            counted.append((many[0] - few[0]) / (STEPS[1] - STEPS[0]))
            trained = many[1]
    # Two processes, each sending (2 A + 1) / 2 * P * 4 bytes.
    return {
        "accumulation": accumulation,
        "formula": (2 * accumulation + 1) * trained * 4,
        "counted": statistics.median(counted),
    }


def run(directory: Path, steps: int, accumulation: int, name: str) -> tuple[int, int]:
    """Bytes that a run of some steps put on the loopback, and its trained parameters."""
    settings = dict(
        stage="pt",
        model_name_or_path=str(ROOT / "mini" / "base"),
        dataset="texts",
        dataset_dir=str(directory),
        cache_dir=str(directory / "cache"),
        output_dir=str(directory / name),
        additional_target="embed_tokens,lm_head",
        cutoff_len=64,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=1e-4,
        save_strategy="no",
        deepspeed=str(ROOT / "ds_config_zero2.json"),
    )
    (directory / "settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    before = loopback_bytes()
    result = subprocess.run(
        [*command, "-m", "llmtuner", "train", str(directory / "settings.yaml")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    counted = loopback_bytes() - before
    line = next(line for line in result.stdout.splitlines() if line.startswith("training ") and "parameters" in line)
    return counted, int(line.split()[1].replace(",", ""))


def loopback_bytes() -> int:
    """Bytes sent over the loopback since the machine started."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[9])


if __name__ == "__main__":
    main()
