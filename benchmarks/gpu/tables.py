"""The tables of docs/gpu.md: what was measured, and beside it what products and memory traffic alone would take, computed."""

from functools import cache

import numpy

from benchmarks import common, scaling
from benchmarks.common import CHATGLM3_6B, Values, markdown_table
from benchmarks.gpu.measuring import ACCUMULATION, PRODUCT, STACK, WINDOWS, case_name, document_lengths
from benchmarks.gpu.parts import ATTENTIONS, LORA_LAYERS

NOT_MEASURED = "not measured"
# FLOP/s that large products in bf16 reach, and bytes/s that a copy reads and writes.
GPUS = {"H100": (790e12, 3.0e12), "RTX 4090": (165e12, 0.9e12)}
ADAM_BYTES = 28  # per trained parameter and step: parameter and moments read and written, gradient read
LINES = [(name, *size, recomputed) for recomputed in (False, True) for size in WINDOWS for name in STACK]
# More steps: their line, part and case.
MORE_STEPS = {
    ("all on, LoRA alone", "4 x 1,024", "kept"): ("embeddings", "LoRA"),
    ("all on, 8-bit Adam", "1 x 1,024", "recomputed"): ("embeddings", "one card of 24 GB"),
    ("compiled layers instead of fused ops", "4 x 1,024", "kept"): ("compile", "compiled layers"),
    ("all on, base products in fp8", "4 x 1,024", "kept"): ("compile", "fp8"),
}
PRODUCTS = ("query", "gate and up", "down", "output layer", "LoRA A", "LoRA B")
LOSSES = ("plain autocast", "chunked loss", "varlen attention", "fused ops", "all on")
PATHS = {
    "evaluation alone (`do_train: false`)": ("evaluation alone", "loss {eval_loss:.3f}"),
    "training": ("training, then evaluation", "{left_gb:.1f} GB are left in the GPU's memory afterwards"),
    "evaluation after it": (
        "training, then evaluation",
        "peak {evaluation_peak_gb:.1f} GB, weights {weights_gb:.1f} GB",
    ),
    "generation": ("generation", "{tokens_per_second:,.0f} tokens/s, 16 answers at once"),
    "DDP in one NCCL process": ("DDP, one process", "loss {loss:.3f}"),
    "ZeRO-2 in one NCCL process": ("ZeRO-2, one process", "loss {loss:.3f}"),
    "checkpoint and resume": ("checkpoint and resume", "losses within {largest_difference:.0e}"),
    "fp16": ("fp16", "loss {loss:.3f}"),
}


def tables(measured: Values, name: str) -> str:
    """A table of docs/gpu.md by its name; whatever is missing in `measured` is shown as not measured."""
    functions = dict(
        goals=goals, steps=steps, layer=layer, losses=losses, paths=paths, machine=machine, kernels=kernels
    )
    return functions[name]({part: section.get("results", {}) for part, section in measured.items()})


def show(values: Values | None, form: str) -> str:
    """Values in a format with their names, or why there are none."""
    try:
        return form.format(**(values or {}))
    except KeyError:
        return (values or {}).get("skipped") or ("failed" if values and "error" in values else NOT_MEASURED)


@cache
def attended(seq_len: int) -> float:
    """The mean number of tokens that a token attends to, in documents of lengths as in the benchmark's batches."""
    draw = numpy.random.default_rng(0)
    lengths = numpy.concatenate([document_lengths(seq_len, draw) for _ in range(1_000)])
    return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())


def elementwise_bytes(optimizations: str, recomputed: bool) -> float:
    """Bytes that elementwise operations move, per token of a micro-batch of 4,096 tokens: as `traffic` counts them."""
    traffic = common.read_results(common.RESULTS / "traffic.json")
    moved = traffic["results"][optimizations]
    layer = moved["elementwise_gb"] + (moved["elementwise_forward_gb"] if recomputed else 0)
    all_layers = CHATGLM3_6B["num_hidden_layers"] * layer
    return 1e9 * (all_layers + moved["elementwise_outside_gb"]) / (traffic["batch_size"] * traffic["seq_len"])


def computed_speed(gpu: str, optimizations: str, seq_len: int, recomputed: bool) -> Values:
    """Tokens/s, and utilization of the products' speed, if nothing took time but products and elementwise passes in turn."""
    product_speed, bandwidth = GPUS[gpu]
    trained = common.read_results(common.RESULTS / "scaling.json")["trained"]
    lora, parameters = trained["LoRA"], trained["LoRA + embeddings"]
    is_masked = STACK[optimizations]["flash_attn"] != "varlen"  # then attention computes the whole square
    flop = scaling.flop_per_token(lora, recomputed, seq_len if is_masked else attended(seq_len))
    moved = elementwise_bytes(optimizations, recomputed) + ADAM_BYTES * parameters / (ACCUMULATION * 4_096)
    speed = 1 / (flop / product_speed + moved / bandwidth)
    utilization = speed * scaling.flop_per_token(lora, False, attended(seq_len)) / product_speed
    return {"tokens_per_second": speed, "utilization": utilization}


def steps(results: Values) -> str:
    header = ["optimizations", "micro-batch", "activations", "tokens/s", "utilization", "peak GB (estimate)"]
    header += [f"computed, {gpu}: tokens/s" for gpu in GPUS] + ["computed utilization"]
    forms = ("{tokens_per_second:,.0f}", "{utilization:.0%}", "{peak_gb:.1f} ({estimated_gb:.1f})")
    lines = []
    for name, batch_size, seq_len, recomputed in LINES:
        values = results.get("steps", {}).get(case_name(name, batch_size, seq_len, recomputed))
        computed = [computed_speed(gpu, name, seq_len, recomputed) for gpu in GPUS]
        lines.append([name, f"{batch_size} x {seq_len:,}", "recomputed" if recomputed else "kept"])
        lines[-1] += [show(values, form) for form in forms]
        lines[-1] += [show(speed, "{tokens_per_second:,.0f}") for speed in computed]
        lines[-1] += [" / ".join(show(speed, "{utilization:.0%}") for speed in computed)]
    for (name, size, kind), (part, case) in MORE_STEPS.items():
        values = results.get(part, {}).get(case)
        lines.append([name, size, kind, *(show(values, form) for form in forms), *[""] * (len(GPUS) + 1)])
    return markdown_table(header, lines)


def goals(results: Values) -> str:
    stack, lines = list(STACK)[-1], []
    for batch_size, seq_len in WINDOWS:
        values = results.get("steps", {}).get(case_name(stack, batch_size, seq_len, False))
        computed = show(computed_speed("H100", stack, seq_len, False), "{utilization:.0%}")
        goal = f"step 5, {batch_size} x {seq_len:,}: utilization of the measured product"
        lines.append([goal, "at least 55 %", show(values, "{utilization:.0%}"), computed])
    embeddings = results.get("embeddings", {})
    pair = [embeddings.get(name, {}) for name in ("LoRA", "LoRA + embeddings")]
    ratio = {}
    if all("milliseconds" in values for values in pair):
        ratio["ratio"] = pair[1]["milliseconds"] / pair[0]["milliseconds"]
    goal = "LoRA and both matrices: time against LoRA alone"
    lines.append([goal, "at most 1.10", show(ratio, "{ratio:.2f}"), ""])
    budget = common.read_results(common.RESULTS / "memory_budget.json")["recipes"]
    one_card = next(case for case in budget if "8-bit" in case["trained"] and case["recomputed"])
    measured = show(embeddings.get("one card of 24 GB"), "{peak_gb:.1f}")
    computed = f"{one_card['total'] / 1e9:.1f}"
    lines.append(["peak memory of the recipe for one card, GB", "below 23", measured, computed])
    cases = [values for part in ("steps", "embeddings") for values in results.get(part, {}).values()]
    errors = [values["estimated_gb"] / values["peak_gb"] - 1 for values in cases if "estimated_gb" in values]
    span = f"{min(errors):+.0%} to {max(errors):+.0%}" if errors else NOT_MEASURED
    lines.append(["estimate of the peak memory", "within 8 %", span, ""])
    return markdown_table(["", "goal", "measured", "computed, H100"], lines)


def layer(results: Values) -> str:
    columns = [f"{lora}, {size} x {length:,}" for size, length in WINDOWS for lora in LORA_LAYERS]
    values = results.get("layer", {})
    form = "{forward_milliseconds:.1f} + {backward_milliseconds:.1f} ms, {kept_gb:.2f} GB"
    lines = [[name, *(show(values.get(f"{name}, {column}"), form) for column in columns)] for name in ATTENTIONS]
    return markdown_table(["attention", *(f"LoRA: {column}" for column in columns)], lines)


def losses(results: Values) -> str:
    values = results.get("numerics", {})
    lines = [[name, show(values.get(name), "{largest_difference:.1e}")] for name in LOSSES]
    return markdown_table(["bf16", "largest difference from fp32"], lines)


def paths(results: Values) -> str:
    lines = [[name, show(results.get("paths", {}).get(case), form)] for name, (case, form) in PATHS.items()]
    return markdown_table(["", "result"], lines)


def machine(results: Values) -> str:
    values = results.get("machine", {})
    gpu = show(values.get("environment"), "{gpu}")
    square = next((case for name, case in values.items() if PRODUCT in name), None)
    lines = [
        ["large product, TFLOP/s", tera(square), *(f"{speed / 1e12:.0f}" for speed, _ in GPUS.values())],
        ["copy, TB/s read and written", tera(values.get("bandwidth"), "bytes_per_second", ".2f")],
    ]
    lines[1] += [f"{bandwidth / 1e12:.1f}" for _, bandwidth in GPUS.values()]
    lines += [[f"{name}, TFLOP/s", tera(values.get(name)), *[""] * len(GPUS)] for name in PRODUCTS]
    return markdown_table(["", gpu, *(f"assumed: {name}" for name in GPUS)], lines)


def tera(values: Values | None, key: str = "flop_per_second", form: str = ".0f") -> str:
    return format(values[key] / 1e12, form) if values and key in values else show(values, "{unknown}")


def kernels(results: Values) -> str:
    """The first ten kernels before and after."""
    parts = {"all off": results.get("baseline", {}), "all on": results.get("steps", {})}
    lines = [
        [name, f"`{kernel['kernel'][:60]}`", str(kernel["calls"]), f"{kernel['milliseconds']:.1f}"]
        for name, values in parts.items()
        for kernel in values.get("kernels", {}).get("kernels", [])[:10]
    ]
    return markdown_table(["", "kernel", "calls", "ms"], lines) if lines else NOT_MEASURED


TABLES = dict(goals=goals, steps=steps, layer=layer, losses=losses, paths=paths, machine=machine, kernels=kernels)
