"""Step 5 of ChatGLM3-6B on several GPUs, computed: what ZeRO-2 sends, when that costs less than 5 %, hours for 1B tokens.

    python -m benchmarks.scaling        writes benchmarks/scaling.md

Nothing here is measured but the formula of the traffic (`python -m benchmarks.zero2_traffic` counts bytes on the loopback).
"""

from pathlib import Path

from benchmarks.zero2_traffic import parameters_of_chatglm3

PAGE = Path(__file__).resolve().parent / "scaling.md"
UTILISATION = 0.4  # of the vendor's peak: assumed
TOKENS = 16_384  # a step and GPU: 4 sequences of 1,024, accumulated 4 times, as step 5 has it
MEAN_SEEN = 512  # tokens that a token of a window of 1,024 sees, one document in it
LAYERS, WIDTH, ROWS = 28, 4_096, 78_592
BODY = LAYERS * (
    2 * WIDTH * WIDTH + 2 * WIDTH * 256 + 3 * WIDTH * 13_696
)  # numbers of all linear layers but the output
# Dense bf16 TFLOP/s by the vendor's data sheet; GB/s that a GPU sends while it receives as much, assumed but for NVLink.
GPUS = {
    "RTX 3090, PCIe without peer-to-peer": (71, 8),
    "RTX 4090, PCIe without peer-to-peer": (165, 8),
    "A100 80 GB, PCIe 4.0": (312, 20),
    "A100 80 GB, NVLink": (312, 300),
    "H100 SXM, NVLink": (989, 450),
}
COUNTS = (1, 4, 8, 64)


def flop_per_token(trained: dict[str, int], recipe: str, checkpointing: bool) -> float:
    lora = trained["LoRA"]
    output = ROWS * WIDTH
    whole = 4 * BODY + 6 * lora + (4 if recipe == "LoRA" else 6) * output + 12 * LAYERS * WIDTH * MEAN_SEEN
    return whole + (2 * (BODY + lora) + 4 * LAYERS * WIDTH * MEAN_SEEN if checkpointing else 0)


def sent(parameters: int, gpus: int, accumulation: int) -> float:
    """GB that each GPU sends in a step."""
    return (2 * accumulation + 1) * (gpus - 1) / gpus * parameters * 2 / 1e9


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    trained = parameters_of_chatglm3()
    speeds = {
        name: UTILISATION * tflops * 1e12 / flop_per_token(trained, "LoRA + embeddings", True)
        for name, (tflops, _) in GPUS.items()
    }
    traffic = [
        [name, f"{count / 1e6:,.0f} M"]
        + [f"{sent(count, gpus, accumulation):.2f}" for accumulation in (1, 4) for gpus in (2, 4, 8, 64)]
        for name, count in trained.items()
    ]
    enough = []
    for name, (_, bandwidth) in GPUS.items():
        cells = []
        for count in trained.values():
            seconds = sent(count, 8, 1) / bandwidth
            cells.append(f"{19 * seconds * speeds[name]:,.0f}")  # computing takes 19 times as long as sending
        enough.append([name, *cells])
    hours = []
    for name, (_, bandwidth) in GPUS.items():
        cells = [f"{speeds[name]:,.0f}"]
        for gpus in COUNTS:
            seconds = TOKENS / speeds[name] + sent(trained["LoRA + embeddings"], gpus, 4) / bandwidth
            cells.append(f"{1e9 / gpus * seconds / TOKENS / 3600:,.1f}")
        hours.append([name, *cells])
    original = [f"{1e9 / gpus / 1_160 / 3600:,.1f}" if gpus <= 4 else "" for gpus in COUNTS]
    hours.append(["RTX 4090, as the original project measured on 4", "1,160", *original])
    peaks = ", ".join(dict.fromkeys(f"{name.split(',')[0]} {tflops}" for name, (tflops, _) in GPUS.items()))
    flop = {kind: flop_per_token(trained, "LoRA + embeddings", kind) for kind in (False, True)}
    PAGE.write_text(
        f"""# Several GPUs, computed

`python -m benchmarks.scaling` writes this page. **No figure here was measured on a GPU**; the traffic's formula was checked by
counting bytes on the loopback (`python -m benchmarks.zero2_traffic`: 16.67 MB a step against 16.62 by the formula).

ChatGLM3-6B grown to 78,592 rows, LoRA of rank 64 on all linear layers, bf16. A token costs {flop[False] / 1e9:.1f} GFLOP: 4 for each of
{BODY / 1e9:.2f} billion frozen numbers (forward, and backward to the input), 6 for each of LoRA and of the trained output layer,
and attention within windows of 1,024; with gradient checkpointing {flop[True] / 1e9:.1f} are computed. Assumed: {UTILISATION:.0%} of the
vendor's dense bf16 peak, and GB/s that a GPU sends and receives at once (PCIe through the host 8, PCIe 4.0 20; NVLink by data
sheet). The peaks: {peaks} TFLOP/s.

## GB that each GPU sends in a step under ZeRO-2

(2 A + 1) (N - 1) / N * P * 2 bytes for P trained parameters, N GPUs, A micro-batches.

{markdown_table(["trained", "P", *(f"A = {a}, N = {n}" for a in (1, 4) for n in (2, 4, 8, 64))], traffic)}

## Tokens a micro-batch and GPU from which 8 GPUs keep 95 % of their speed

If nothing is sent while something is computed, which is the worst case; DeepSpeed overlaps a part (`overlap_comm`). With A
micro-batches a step it is (2 A + 1) / (3 A) of that.

{markdown_table(["", *trained], enough)}

## Hours for 1B tokens, LoRA and both embedding matrices, {TOKENS:,} tokens a step and GPU

With gradient checkpointing, and sending as above after each of four micro-batches, not overlapped. Between machines a network
slower than that takes longer.

{markdown_table(["", "tokens/s and GPU, computing alone", *(f"{count} GPU{'s' * (count > 1)}" for count in COUNTS)], hours)}
""",
        encoding="utf-8",
    )
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
