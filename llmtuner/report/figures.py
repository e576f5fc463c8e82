"""Figures of a run: plain data in, drawings out, readable on a phone and identical on every machine."""

import functools
import io
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.sax.saxutils import quoteattr

import matplotlib.style
import numpy
from matplotlib import font_manager, ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from llmtuner.aliases import rename_keys
from llmtuner.console import UserError, print0
from llmtuner.eval.ladder import ENTITIES, FORMS
from llmtuner.eval.language import LANGUAGES, Languages, languages_of
from llmtuner.files import translate_disk_errors
from llmtuner.report.checks import percent

Log = list[dict[str, Any]]
Series = tuple[numpy.ndarray, numpy.ndarray]  # steps and values
Summary = Literal["end", "highest", "median"]  # of a curve, in one number

WIDTH, HEIGHT = 4.6, 3.0  # inches; on a phone of 390 pixels shown at least 331 pixels wide: a point is a pixel
FONT_SIZE = 11  # points
# Distinguishable with any colour vision, and dark enough on white (4.5 : 1) for text.
COLORS = ("#B84A00", "#00795A", "#0067A3", "#AA3377", "#6B4FA0", "#7A5C00")  # of languages, the added one first
# Of runs over one another.
PALETTE = ("#0067A3", "#B84A00", "#00795A", "#AA3377", "#6B4FA0", "#7A5C00", "#3B4A5C", "#A3262A")
TRAIN, EVAL, BEFORE, INK, GRID = "#3B4A5C", "#AA3377", "#AEB9C6", "#222222", "#E3E6EA"
UNIT: dict[str, Any] = {"loc": "left", "size": FONT_SIZE, "color": "#55606C"}
LOG_SCALE_FROM = 10  # a value range of more than this factor gets a logarithmic axis
MAX_NAME_WIDTH = 24  # columns; a longer name loses its middle
CJK_FAMILIES = (
    "Noto Sans CJK JP", "Noto Sans JP", "Source Han Sans JP", "IPAexGothic", "IPAGothic", "TakaoGothic", "TakaoPGothic",
    "VL Gothic", "Hiragino Sans", "Hiragino Kaku Gothic ProN", "Yu Gothic", "Meiryo", "MS Gothic", "BIZ UDGothic",
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "Droid Sans Fallback", "PingFang SC", "Microsoft YaHei", "SimHei",
)  # fmt: skip
STEPS = {"step4": "Tokenizer", "step5": "Continued pretraining", "step6": "Instruction tuning", "step7": "Chat model"}
TEXTS = {  # title and caption of each figure
    "tokens_per_character": (
        "tokens per character",
        "Of held-out text before (grey) and after the merge; fewer means faster, and more text per context.",
    ),
    "initial_loss": (
        "loss before the first step",
        "Of each data set before training; one far above the others may be damaged or in another format.",
    ),
    "loss": ("loss", "Faint: logged values. Strong: their running mean. Dots: loss on held-out text."),
    "log_loss": (
        "loss on logarithmic axes",
        "Shows early and late steps alike. The learning rate falls towards the end, so the slope there does not tell what more "
        "steps would bring.",
    ),
    "bits_per_byte": (
        "bits per byte",
        "How well held-out text of each language is predicted during training, independent of the tokenizer; lower is better.",
    ),
    "gradient_norm": (
        "gradient norm",
        "Length of the gradient before clipping; peaks far above the rest are damaged data or a learning rate that is too high.",
    ),
    "learning_rate": ("learning rate", "Step size of the optimizer: warmup, then decay."),
    "speed": (
        "throughput",
        "Tokens processed per second, and the target tokens among them, on which loss is computed.",
    ),
    "mfu": (
        "model FLOPs utilization (MFU)",
        "Share of the speed that a large matrix product reaches on this device in the same data type.",
    ),
    "mix": ("data mix", "Share of each data set in all target tokens, and the target share if there is one."),
    "ladder": (
        "the ladder from Chinese into Japanese",
        "Of each way to ask: right answers (dots, with 95 % intervals) and answers that name their subject (rings). "
        "Named and never named: in Japanese texts, none of which describes them.",
    ),
    "lengths": ("sequence lengths", "Number of texts by length; each range is twice as wide as the one before."),
}


@dataclass(frozen=True)
class ReportFigure:
    """A figure of the report page."""

    name: str
    """Unique in a report, such as step5_loss; prefix of all ids in the drawing."""
    title: str
    """What it shows."""
    finding: str
    """What came out, in a few words."""
    caption: str
    """How to read it."""
    alt: str
    """Text alternative: what it shows."""
    svg: str
    """The drawing, to be embedded in HTML unescaped; it fills the available width."""


def read_log(path: Path) -> Log:
    """The entries of a run's trainer_log.jsonl; an incomplete last line is ignored.

    Raises:
        UserError: if it cannot be read, or another line is damaged.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read the log {path}: {error.strerror}.") from error
    log = []
    for number, line in enumerate(lines, 1):
        try:
            log.append(rename_keys(json.loads(line)))
        except ValueError as error:
            if line.strip() and number < len(lines):
                raise UserError(
                    f"{path}, line {number} is damaged: {error}. Delete the line, or train again."
                ) from error
    return log


def build_figures(metrics: dict[str, dict], logs: dict[str, Log]) -> list[ReportFigure]:
    """All figures for which there is data.

    Args:
        metrics: {"step4", "step5", ...: metrics of the step}.
        logs: {"step5", "step6": entries of its trainer_log.jsonl}.
    """
    tokens, languages = metrics.get("step4", {}).get("tokens_per_character", {}), languages_of(metrics)
    drawn = [("step4", "tokens_per_character", tokens_per_character(tokens, languages))]
    for step, unit in (("step5", "documents"), ("step6", "dialogues")):
        measured, log = metrics.get(step, {}), logs.get(step, [])
        drawn += [
            (step, "initial_loss", initial_losses(measured.get("initial_loss", {}))),
            (step, "loss", loss_curve(log)),
            (step, "log_loss", log_loss(log)),
            (step, "bits_per_byte", bits_per_byte(log, languages)),
            (step, "gradient_norm", gradient_norms(log)),
            (step, "learning_rate", learning_rates(log)),
            (step, "speed", speed(log)),
            (step, "mfu", mfu(log)),
            (step, "mix", mix(measured.get("data", {}))),
            (step, "lengths", lengths(measured.get("lengths", {}), measured.get("padding_ratio"), unit)),
        ]
    drawn.append(("step7", "ladder", ladder(metrics.get("step7", {}).get("ladder", {}).get("chat", {}))))
    return [_report_figure(step, name, figure) for step, name, figure in drawn if figure is not None]


def _report_figure(step: str, name: str, figure: Figure) -> ReportFigure:
    title, caption = TEXTS[name]
    title, finding = f"{STEPS[step]}: {title}", str(figure.get_label())
    alt = f"{title}. {finding}."
    return ReportFigure(f"{step}_{name}", title, finding, caption, alt, draw_svg(figure, f"{step}_{name}", alt))


def plot_losses(log_history: Log, directory: Path) -> None:
    """Draws `training_loss.png` and `eval_loss.png` from a Trainer's log.

    Raises:
        UserError: if they cannot be written.
    """
    for key, name in (("loss", "training_loss.png"), ("eval_loss", "eval_loss.png")):
        figure = loss_curve([{"step": entry["step"], key: entry[key]} for entry in log_history if key in entry])
        if figure is not None:
            with _style(), translate_disk_errors(directory / name):
                # The report has this text beside the drawing.
                figure.suptitle(str(figure.get_label()), x=0.01, ha="left", size=FONT_SIZE)
                figure.savefig(directory / name, dpi=160)


# --------------------------------------------------------------------------------------------------------------- fonts
@functools.cache
def fonts() -> dict[str, FT2Font]:
    """matplotlib's fallback list: DejaVu Sans, which it ships, and installed families with Japanese and Chinese glyphs."""
    manager = font_manager.fontManager
    if not {entry.name for entry in manager.ttflist}.intersection(CJK_FAMILIES):  # its cached list may be outdated
        for path in {*font_manager.findSystemFonts()} - {entry.fname for entry in manager.ttflist}:
            with suppress(OSError, RuntimeError):  # not a font that can be drawn
                manager.addfont(path)
    found = {}
    for family in ("DejaVu Sans", *CJK_FAMILIES):
        for entry in (entry for entry in manager.ttflist if entry.name == family):
            with suppress(OSError, RuntimeError):  # deleted or damaged since it was listed
                found[family] = font_manager.get_font(entry.fname)
    return found


def drawable(name: str) -> str:
    """A name as it can be drawn: U+XXXX for characters without a glyph; a long name loses its middle."""
    characters = [
        char if any(font.get_char_index(ord(char)) for font in fonts().values()) else f"U+{ord(char):04X} "
        for char in name
    ]
    if any(len(char) > 1 for char in characters):
        _warn_of_missing_glyphs()
    text, kept = "".join(characters), len(characters)
    while sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text) > MAX_NAME_WIDTH:
        kept -= 1
        text = "".join([*characters[: kept - kept // 2], "…", *characters[len(characters) - kept // 2 :]])
    return text.strip()


@functools.cache
def _warn_of_missing_glyphs() -> None:
    print0(
        "Some characters of names are written as U+XXXX in the figures: no installed font has them. For Japanese and "
        "Chinese install one, such as Debian's package fonts-noto-cjk."
    )


# ------------------------------------------------------------------------------------------------------------- the look
@contextmanager
def _style() -> Iterator[None]:
    """This report's style on top of matplotlib's defaults, regardless of the user's settings."""
    settings = {
        "font.family": list(fonts()),
        "font.size": FONT_SIZE,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), "#8A949F"),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        "text.parse_math": False,  # a data set may be called a$b$
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "legend.frameon": False,
        "legend.borderpad": 0,
        "legend.borderaxespad": 0.3,
        "legend.handlelength": 1.2,
        "legend.columnspacing": 1.2,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "path.simplify_threshold": 0.5,  # points: drops detail of long runs that is too fine to see
        "svg.fonttype": "path",
        "svg.hashsalt": "llmtuner",
    }
    with matplotlib.style.context(settings, after_reset=True):
        yield


def _canvas(finding: str, unit: str = "", height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure labelled with what it shows; the name of the y axis is above that axis."""
    figure = Figure((WIDTH, height), layout="constrained", label=finding)
    axes = figure.add_subplot()
    axes.set_title(unit, **UNIT)
    return figure, axes


def _legend(axes: Axes) -> None:
    """Adds a legend above the plot, where it covers nothing."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3)


def _number(value: float, _: object = None) -> str:
    """An axis label: 0.0005, 12, 1,500, 3M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}".replace("-", "−")


def _digits(value: float) -> str:
    """A number with three digits: 8.92, 0.500, −0.0120."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".").replace("-", "−")


def _from_to(series: Series) -> str:
    return f"{_digits(series[1][0])} → {_digits(series[1][-1])}"


def _linear(axis: Axis, integer: bool = False) -> None:
    axis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10], integer=integer))
    axis.set_major_formatter(_number)


def _logarithmic(axes: Axes, which: str, values: numpy.ndarray) -> None:
    """Makes the x or y axis logarithmic, with few ticks: 1, 2, 5, 10, ...; powers of ten over a wide range."""
    axes.set(**{f"{which}scale": "log"})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    span = values.max() / values.min()
    subs = (1, 2, 5) if span < 1000 and values.max() < 10_000 else (1,)  # longer labels would meet
    _linear(axis)
    if span > 5:
        axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_minor_locator(ticker.NullLocator())


# --------------------------------------------------------------------------------------------------------------- a run
@_style()
def loss_curve(log: Log) -> Figure | None:
    """Training loss, raw and smoothed, and eval loss over steps."""
    train, held_out = _series(log, "loss"), _series(log, "eval_loss")
    if train is None and held_out is None:
        return None
    named = (("training", train), ("held out", held_out))
    found = ", ".join(f"{name} {_from_to(series)}" for name, series in named if series is not None)
    figure, axes = _canvas(found[0].upper() + found[1:], "loss, nats per token")
    _draw_losses(axes, train, held_out)
    _legend(axes)
    _linear_axes(axes)
    return figure


@_style()
def log_loss(log: Log) -> Figure | None:
    """The same on logarithmic axes from step 1 on, and what the second half of the steps brought."""
    train, held_out = (_positive(_series(log, name)) for name in ("loss", "eval_loss"))
    if train is None or len(train[0]) < 2:
        return None
    name, series = ("held-out", held_out) if held_out is not None and len(held_out[0]) > 2 else ("training", train)
    values = _smooth(series[1]) if series is train else series[1]
    middle = int(numpy.abs(series[0] - series[0][-1] / 2).argmin())
    change = values[-1] / values[middle] - 1
    figure, axes = _canvas(
        f"From step {series[0][middle]:,} to {series[0][-1]:,} the {name} loss {'fell' if change < 0 else 'rose'} by "
        f"{abs(change):.1%}",
        "loss, nats per token",
    )
    _draw_losses(axes, train, held_out)
    _legend(axes)
    _logarithmic(axes, "y", train[1])
    _step_axis(axes)
    _logarithmic(axes, "x", train[0])
    return figure


@_style()
def gradient_norms(log: Log) -> Figure | None:
    """Gradient norm over steps, and those of embeddings and layers where they were logged."""
    total = _positive(_series(log, "grad_norm"))
    if total is None:
        return None
    highest = int(total[1].argmax())
    figure, axes = _canvas(
        f"Median {_digits(float(numpy.median(total[1])))}, highest {_digits(total[1][highest])} at step {total[0][highest]:,}",
        "gradient norm",
    )
    axes.plot(*total, color=TRAIN, label="all")
    drawn = [total[1]]
    for key, color, style in (("grad_norm_embeddings", EVAL, "--"), ("grad_norm_layers", COLORS[1], ":")):
        if (series := _positive(_series(log, key))) is not None:
            axes.plot(*series, style, color=color, label=key.removeprefix("grad_norm_"))
            drawn.append(series[1])
    if len(drawn) > 1:
        _legend(axes)
    values = numpy.concatenate(drawn)
    if values.max() > LOG_SCALE_FROM * values.min():
        _logarithmic(axes, "y", values)
    else:
        _linear(axes.yaxis)
    _step_axis(axes)
    return figure


@_style()
def mfu(log: Log) -> Figure | None:
    """Model FLOPs utilization over steps."""
    series = _series(log, "mfu")
    if series is None:
        return None
    figure, axes = _canvas(f"{numpy.median(series[1]):.1%} (median)", "MFU, percent")
    axes.plot(series[0], 100 * series[1], color=TRAIN)
    axes.set_ylim(bottom=0)
    _linear_axes(axes)
    return figure


@_style()
def learning_rates(log: Log) -> Figure | None:
    """Learning rates of adapters and embeddings over steps; one line if they are equal."""
    rate, embedding = _series(log, "learning_rate"), _series(log, "embedding_learning_rate")
    if rate is None:
        return None
    rates = {"adapters": rate}
    if embedding is not None and not (len(rate[1]) == len(embedding[1]) and numpy.allclose(rate[1], embedding[1])):
        rates["embeddings"] = embedding
    highest = ", ".join(f"{float(f'{values.max():.3g}'):g} ({name})" for name, (_, values) in rates.items())
    figure, axes = _canvas(f"Up to {highest if len(rates) > 1 else highest.split()[0]}", "learning rate")
    for (name, series), color, style in zip(rates.items(), (TRAIN, EVAL), ("-", "--"), strict=False):
        axes.plot(*series, style, color=color, label=name)
    if len(rates) > 1:
        _legend(axes)
    axes.set_ylim(bottom=0)
    _linear_axes(axes)
    return figure


@_style()
def speed(log: Log) -> Figure | None:
    """Tokens and target tokens per second over steps."""
    every, trained = _series(log, "tokens_per_second"), _series(log, "target_tokens_per_second")
    if every is None:
        return None
    figure, axes = _canvas(f"{numpy.median(every[1]):,.0f} tokens per second (median)", "tokens per second")
    axes.plot(*every, color=TRAIN, label="all")
    if trained is not None:
        axes.plot(*trained, "--", color=EVAL, label="target")
        _legend(axes)
    axes.set_ylim(bottom=0)
    _linear_axes(axes)
    return figure


@_style()
def bits_per_byte(log: Log, languages: Languages = LANGUAGES) -> Figure | None:
    """Bits per byte of each language over steps, with labels at the ends of the lines."""
    found = {
        language: _positive(_series(log, f"eval_bits_per_byte_{language}"), first_step=0) for language in languages
    }
    lines = {language: line for language, line in found.items() if line is not None}
    if not lines:
        return None
    figure, axes = _canvas(
        ", ".join(f"{languages[language]} {_from_to(line)}" for language, line in lines.items()), "bits per byte"
    )
    colors = _language_colors(languages)
    for language, line in lines.items():
        axes.plot(*line, "o-", markersize=3.5, color=colors[language])
    values = numpy.concatenate([line[1] for line in lines.values()])
    if values.max() > LOG_SCALE_FROM * values.min():
        _logarithmic(axes, "y", values)
    else:
        _linear(axes.yaxis)
    _step_axis(axes)
    _label_line_ends(axes, lines, languages)
    return figure


class Curve(NamedTuple):
    """The same quantity of several runs of one recipe."""

    name: str
    color: str
    style: str
    series: list[Series]


def series_of(log: Log, name: str, smooth: bool = False) -> Series | None:
    """Steps and values of one quantity, if asked for as a running mean; None if there are none."""
    series = _series(log, name)
    return series if series is None or not smooth else (series[0], _smooth(series[1]))


@_style()
def overlay(curves: list[Curve], unit: str, summary: Summary = "end") -> Figure:
    """Curves over one another; of several runs, their mean as a line and their range as a band around it."""
    lines = [(curve, *_mean_and_range(curve.series)) for curve in curves]
    found = sorted((_summarize(line[1], summary), curve.name) for curve, line, _ in lines)
    lowest, highest = _digits(found[0][0]), _digits(found[-1][0])
    finding = f"{lowest} ({found[0][1]}) to {highest}" if lowest != highest else lowest
    figure, axes = _canvas(f"{finding} at the end" if summary == "end" else f"{finding} ({summary})", unit)
    values = []
    for curve, line, bounds in lines:
        marker = "o" if len(line[0]) < 12 else None
        axes.plot(*line, curve.style, color=curve.color, label=drawable(curve.name), marker=marker, markersize=3.5)
        if bounds is not None:
            axes.fill_between(line[0], *bounds, color=curve.color, alpha=0.2, linewidth=0)
        values.append(line[1])
    every = numpy.concatenate(values)
    if every.min() > 0 and every.max() > LOG_SCALE_FROM * every.min():
        _logarithmic(axes, "y", every)
    else:
        _linear(axes.yaxis)
    _step_axis(axes)
    widest = max(len(drawable(curve.name)) for curve in curves)
    columns = max(1, int(72 * WIDTH / (32 + 0.62 * FONT_SIZE * widest)))  # as many as fit, at the width of a digit
    figure.legend(loc="outside upper left", ncols=min(columns, 3), handlelength=2.2)
    return figure


def _summarize(values: numpy.ndarray, summary: Summary) -> float:
    return float({"end": values[-1], "highest": values.max(), "median": numpy.median(values)}[summary])


def _mean_and_range(runs: list[Series]) -> tuple[Series, tuple[numpy.ndarray, numpy.ndarray] | None]:
    """The mean of several runs at the steps that all of them logged, and the lowest and highest; the first if they share none."""
    steps = functools.reduce(numpy.intersect1d, [series[0] for series in runs])
    if len(runs) == 1 or not len(steps):
        return runs[0], None
    values = numpy.array([[dict(zip(*series, strict=True))[step] for step in steps] for series in runs])
    return (steps, values.mean(axis=0)), (values.min(axis=0), values.max(axis=0))


def _label_line_ends(axes: Axes, lines: dict[str, Series], languages: Languages) -> None:
    """Writes each language and its last value to the right of its line's end, moved up or down if labels would overlap."""
    colors = _language_colors(languages)
    spacing = 0.09  # of one label, relative to the height of the axes
    axes.get_ylim()  # updates the limits, on which the transform depends
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted((to_axes.transform((line[0][-1], line[1][-1]))[1], language) for language, line in lines.items())
    lowest = 0.0
    for place, (height, language) in enumerate(ends):
        highest = 1 - spacing * (len(ends) - 1 - place)
        lowest = min(max(height, lowest), highest)
        text = f"{languages[language]} {_digits(lines[language][1][-1])}"
        axes.text(1.02, lowest, text, transform=axes.transAxes, color=colors[language], va="center")
        lowest += spacing


def _language_colors(languages: Languages) -> dict[str, str]:
    return dict(zip(languages, itertools.cycle(COLORS), strict=False))


def _series(log: Log, name: str) -> Series | None:
    """Steps and finite values of one quantity; None if there are none."""
    points = [(entry["step"], entry[name]) for entry in log if isinstance(entry.get(name), int | float)]
    points = [point for point in points if math.isfinite(point[1])]
    return (numpy.array([step for step, _ in points]), numpy.array([value for _, value in points])) if points else None


def _positive(series: Series | None, first_step: int = 1) -> Series | None:
    """The part that logarithmic axes can show."""
    if series is None:
        return None
    fits = (series[0] >= first_step) & (series[1] > 0)
    return (series[0][fits], series[1][fits]) if fits.any() else None


def _smooth(values: numpy.ndarray) -> numpy.ndarray:
    """Centred running mean over a twentieth of the run; narrower at the beginning, where the loss falls steeply."""
    sums = numpy.concatenate([[0.0], numpy.cumsum(values)])
    places = numpy.arange(len(values))
    reach = numpy.minimum(places, max(1, len(values) // 40))
    starts, stops = places - reach, numpy.minimum(places + reach + 1, len(values))
    return (sums[stops] - sums[starts]) / (stops - starts)


def _draw_losses(axes: Axes, train: Series | None, held_out: Series | None) -> None:
    if train is not None:
        axes.plot(*train, color=TRAIN, alpha=0.35, linewidth=1, marker="o" if len(train[0]) == 1 else None)
        axes.plot(train[0], _smooth(train[1]), color=TRAIN, label="training")
    if held_out is not None:
        axes.plot(*held_out, "o", markersize=5, color=EVAL, markeredgecolor="white", label="held out", zorder=3)


def _linear_axes(axes: Axes) -> None:
    _linear(axes.yaxis)
    _step_axis(axes)


def _step_axis(axes: Axes) -> None:
    _linear(axes.xaxis)
    axes.set_xlabel("training step", loc="right")


# ---------------------------------------------------------------------------------------------------------------- bars
class Bars(NamedTuple):
    """One bar per name, with a text at its end."""

    lengths: list[float]
    texts: list[str]
    color: str | list[str] = TRAIN
    name: str | None = None


def _bar_figure(title: str, names: list[str], *groups: Bars) -> tuple[Figure, Axes]:
    """Horizontal bars with their names on the left, those of all groups side by side."""
    bars = len(names) * len(groups)
    figure, axes = _canvas(title, height=0.5 + 0.25 * bars + 0.1 * len(names))
    thickness = 0.8 / len(groups)
    for place, group in enumerate(groups):
        heights = numpy.arange(len(names)) + (place - (len(groups) - 1) / 2) * thickness
        drawn = axes.barh(heights, group.lengths, 0.92 * thickness, color=group.color, label=group.name)
        axes.bar_label(drawn, group.texts, padding=3)
    axes.set_yticks(range(len(names)), [drawable(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)  # first name on top
    axes.tick_params(left=False)
    axes.grid(False)
    axes.xaxis.set_visible(False)  # the texts give the values
    axes.spines["bottom"].set_visible(False)
    return figure, axes


@_style()
def tokens_per_character(tokens: dict[str, dict[str, float]], languages: Languages = LANGUAGES) -> Figure | None:
    """Tokens per character of each language under the base and the merged tokenizer, and the factor between them."""
    before, after = tokens.get("base", {}), tokens.get("zero", {})
    found = [language for language in languages if before.get(language) and after.get(language)]
    if not found:
        return None
    factors = {language: before[language] / after[language] for language in found}
    most = max(found, key=lambda language: abs(math.log(factors[language])))
    figure, axes = _bar_figure(
        f"{languages[most]} takes {_format_factor(factors[most])} tokens",
        [languages[language] for language in found],
        Bars([before[language] for language in found], [f"{before[language]:.2f}" for language in found], BEFORE),
        Bars(
            [after[language] for language in found],
            [f"{after[language]:.2f} ({_format_factor(factors[language])})" for language in found],
            [_language_colors(languages)[language] for language in found],
        ),
    )
    axes.set_title("tokens per character", **UNIT)
    return figure


def _format_factor(factor: float) -> str:
    if abs(factor - 1) < 0.005:
        return "as many"
    return f"{factor:.1f} × fewer" if factor > 1 else f"{1 / factor:.1f} × more"


@_style()
def initial_losses(initial: dict[str, float]) -> Figure | None:
    """Loss of each data set before the first step, highest first."""
    ordered = sorted(((loss, name) for name, loss in initial.items() if math.isfinite(loss)), reverse=True)
    if not ordered:
        return None
    values, names = [loss for loss, _ in ordered], [name for _, name in ordered]
    bars = Bars(values, [f"{loss:.2f}" for loss in values])
    figure, axes = _bar_figure(f"From {values[-1]:.2f} to {values[0]:.2f} nats per token", names, bars)
    axes.set_title("loss, nats per token", **UNIT)
    return figure


@_style()
def mix(data: dict[str, dict[str, Any]]) -> Figure | None:
    """Share of each data set in the target tokens, and its target share if all have one."""
    names = [name for name, counts in data.items() if counts.get("ratio") is not None]
    if not names:
        return None
    actual = [data[name]["ratio"] for name in names]
    targets = [ratio for name in names if (ratio := data[name].get("target_ratio")) is not None]
    bars = Bars(actual, [f"{ratio:.1%}" for ratio in actual], TRAIN, "actual share")
    if len(targets) < len(names):
        figure, axes = _bar_figure("Shares of the target tokens", names, bars)
        axes.set_title("share of tokens", **UNIT)
    else:
        deviation = max(abs(ratio - target) for ratio, target in zip(actual, targets, strict=True))
        target_bars = Bars(targets, [f"{target:.1%}" for target in targets], BEFORE, "target share")
        title = f"At most {100 * deviation:.2g} percentage points off target"
        figure, axes = _bar_figure(title, names, target_bars, bars)
        _legend(axes)
    return figure


@_style()
def lengths(histogram: dict[str, list[int]], padding_ratio: float | None, unit: str) -> Figure | None:
    """Histogram of document or dialogue lengths, in ranges that double."""
    edges, counts = histogram.get("edges", []), histogram.get("counts", [])
    filled = [place for place, count in enumerate(counts) if count]
    if not filled:
        return None
    first, end = filled[0], filled[-1] + 1
    padding = "" if padding_ratio is None else f", {padding_ratio:.1%} padding"
    figure, axes = _canvas(f"{sum(counts):,} {unit}{padding}", unit)
    axes.bar(range(first, end), counts[first:end], 0.94, align="edge", color=TRAIN)
    ticks = range(first, end + 1, 1 + (end - first) // 7)  # room for labels of five digits
    axes.set_xticks(ticks, [_number(edges[place]) for place in ticks])
    axes.set_xlabel("length in tokens", loc="right")
    axes.grid(visible=False, axis="x")
    _linear(axes.yaxis, integer=True)
    return figure


@_style()
def ladder(cells: dict[str, dict[str, dict[str, Any]]]) -> Figure | None:
    """Of one model's `count_cells`, right answers with their intervals and answers that name their subject."""
    if not cells:
        return None
    forms = [form for form in FORMS if any(form in by_form for by_form in cells.values())]
    untold = [by_form for entities, by_form in cells.items() if entities.startswith("untold")]
    shares = {}
    for form in ("ja_ja", "zh_zh"):
        same = [by_form[form] for by_form in untold if form in by_form]
        if same:
            shares[form] = sum(cell["n"] * cell["accuracy"] for cell in same) / sum(cell["n"] for cell in same)
    found = [
        f"{percent(share)} in {form[:2].replace('ja', 'Japanese').replace('zh', 'Chinese')}"
        for form, share in shares.items()
    ]
    figure, axes = _canvas("Right about the untold: " + ", ".join(found), height=1 + 0.75 * len(forms))
    for place, (entities, by_form) in enumerate(cells.items()):
        heights = [
            number + (place - (len(cells) - 1) / 2) * 0.2 for number, form in enumerate(forms) if form in by_form
        ]
        shown, color = [by_form[form] for form in forms if form in by_form], COLORS[place]
        right = [100 * cell["accuracy"] for cell in shown]
        bounds = numpy.array([[100 * end for end in cell["accuracy_interval"]] for cell in shown]).T
        axes.hlines(heights, *bounds, color=color, linewidth=1.2)
        axes.plot(right, heights, "o", color=color, markersize=4.5, label=ENTITIES[entities].removeprefix("untold, "))
        named = [100 * cell["names_subject"] for cell in shown]
        axes.plot(named, heights, "o", color=color, markersize=7, markerfacecolor="none", markeredgewidth=1)
    axes.set_yticks(range(len(forms)), [FORMS[form].replace(", ", ",\n").replace(": ", ":\n") for form in forms])
    axes.set_ylim(len(forms) - 0.5, -0.5)  # first form on top
    axes.set_xlim(-3, 103)
    axes.set_xlabel("percent of answers", loc="right")
    axes.grid(visible=False, axis="y")
    _linear(axes.xaxis)
    figure.legend(loc="outside upper right", ncols=2, handlelength=0.6)
    return figure


# ----------------------------------------------------------------------------------------------------------------- svg
@_style()
def draw_svg(figure: Figure, name: str, alt: str) -> str:
    """A drawing to be embedded in an HTML page: one element that affects nothing around it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    # A style sheet in a drawing would apply to the whole page; its content moves to the element's style attribute.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    style = "stroke-linejoin: round; stroke-linecap: butt"
    return svg.replace("<svg", f'<svg role="img" aria-label={quoteattr(alt)} style="{style}"', 1)
