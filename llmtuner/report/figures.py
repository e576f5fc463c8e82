"""Figures of what was measured: plain data in, drawings out, readable on a telephone and the same on every machine."""

import functools
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import quoteattr

import matplotlib.style
import numpy
from matplotlib import font_manager, ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from llmtuner.console import UserError, print0
from llmtuner.eval.language import LANGUAGES
from llmtuner.files import translate_disk_errors

Log = list[dict[str, Any]]
Series = tuple[numpy.ndarray, numpy.ndarray]  # steps and values

WIDTH, HEIGHT = 5.0, 3.1  # inches; shown 360 pixels wide, text of 10 points is 10 pixels high
# Distinguishable with any colour vision, and dark enough on white (4.5 : 1) for text.
COLORS = {"ja": "#B84A00", "zh": "#00795A", "en": "#0067A3"}
TRAIN, EVAL, BEFORE, INK, GRID = "#3B4A5C", "#AA3377", "#AEB9C6", "#222222", "#E3E6EA"
UNIT: dict[str, Any] = {"loc": "left", "size": 9.5, "color": "#55606C"}
LOG_SCALE_FROM = 10  # a range of values by more than this factor is drawn on a logarithmic axis
PLATEAU_EXPONENT = (
    0.0145  # twice the steps lower the loss by 1 % (2 ** -0.0145 = 0.99); runs that learn have 0.05 and more
)
MAX_NAME_WIDTH = 24  # columns; a longer name loses its middle
CJK_FAMILIES = (
    *(
        "Noto Sans CJK JP",
        "Noto Sans JP",
        "Source Han Sans JP",
        "IPAexGothic",
        "IPAGothic",
        "TakaoGothic",
        "TakaoPGothic",
    ),
    *("VL Gothic", "Hiragino Sans", "Hiragino Kaku Gothic ProN", "Yu Gothic", "Meiryo", "MS Gothic", "BIZ UDGothic"),
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
    *("Droid Sans Fallback", "PingFang SC", "Microsoft YaHei", "SimHei"),
)
STEPS = {"step4": "Tokenizer", "step5": "Continued pretraining", "step6": "Instruction tuning"}
TEXTS = {  # title and caption of each figure
    "tokens_per_character": (
        "tokens per character",
        "How many tokens a character of held-out text takes before and after the new pieces; fewer is faster and leaves "
        "more room in the context.",
    ),
    "initial_loss": (
        "loss before the first step",
        "What the model finds hard before it is trained on it; a data set far above the others may be damaged or in "
        "another format.",
    ),
    "loss": (
        "loss",
        "The faint line is what was logged, the strong one its running mean, and the dots are the loss on held-out text.",
    ),
    "power_law": (
        "loss on logarithmic axes",
        "A power law is a straight line here; the dashed one is fitted to the second half, and its exponent b says how "
        "fast the loss still falls.",
    ),
    "bits_per_byte": (
        "bits per byte",
        "How well held-out text of each language is predicted as training goes on, whatever the tokenizer; lower is "
        "better.",
    ),
    "learning_rate": ("learning rate", "How large a step the optimizer takes: it warms up, then decays."),
    "speed": (
        "speed",
        "Tokens that go through the model each second, and those among them that it learns to predict.",
    ),
    "mix": (
        "mix of data sets",
        "The share of all trained tokens that each data set gave, beside the share that was planned where there was a plan.",
    ),
    "lengths": ("lengths", "Each bar counts the texts in a range of lengths; the ranges double from bar to bar."),
}


@dataclass(frozen=True)
class ReportFigure:
    """A figure as a page takes it."""

    name: str
    """Unique in a report, such as step5_loss; every id in the drawing begins with it."""
    title: str
    caption: str
    """One sentence that says how to read it."""
    alt: str
    """What a person who cannot see the figure should know."""
    svg: str
    """The drawing, to be put into HTML as it is; it takes the width that it is given."""


class PowerLaw(NamedTuple):
    """loss = scale * step ** -exponent, from step `begin` on."""

    scale: float
    exponent: float
    begin: float


def read_log(path: Path) -> Log:
    """The lines of a run's trainer_log.jsonl; a last line that is only half there is passed over.

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
            log.append(json.loads(line))
        except ValueError as error:
            if line.strip() and number < len(lines):
                raise UserError(
                    f"{path}, line {number} is damaged: {error}. Delete the line, or train again."
                ) from error
    return log


def build_figures(metrics: dict[str, dict], logs: dict[str, Log]) -> list[ReportFigure]:
    """All figures for which there is data.

    Args:
        metrics: what the steps measured, under "step4", "step5" and so on.
        logs: the lines of trainer_log.jsonl of the runs, under "step5" and "step6".
    """
    tokens = metrics.get("step4", {}).get("tokens_per_character", {})
    drawn = [("step4", "tokens_per_character", tokens_per_character(tokens))]
    for step, unit in (("step5", "documents"), ("step6", "dialogues")):
        own, log = metrics.get(step, {}), logs.get(step, [])
        drawn += [
            (step, "initial_loss", initial_losses(own.get("initial_loss", {}))),
            (step, "loss", loss_curve(log)),
            (step, "power_law", loss_power_law(log)),
            (step, "bits_per_byte", bits_per_byte(log)),
            (step, "learning_rate", learning_rates(log)),
            (step, "speed", speed(log)),
            (step, "mix", mix(own.get("data", {}))),
            (step, "lengths", lengths(own.get("lengths", {}), own.get("padding_ratio"), unit)),
        ]
    return [_report_figure(step, name, figure) for step, name, figure in drawn if figure is not None]


def _report_figure(step: str, name: str, figure: Figure) -> ReportFigure:
    title, caption = TEXTS[name]
    title = f"{STEPS[step]}: {title}"
    alt = f"{title}. {figure.get_suptitle()}."
    return ReportFigure(f"{step}_{name}", title, caption, alt, _svg(figure, f"{step}_{name}", alt))


def plot_losses(log_history: Log, directory: Path) -> None:
    """Draws `training_loss.png` and `eval_loss.png` from a Trainer's log.

    Raises:
        UserError: if they cannot be written.
    """
    for key, name in (("loss", "training_loss.png"), ("eval_loss", "eval_loss.png")):
        figure = loss_curve([{"step": entry["step"], key: entry[key]} for entry in log_history if key in entry])
        if figure is not None:
            with _style(), translate_disk_errors(directory / name):
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
    """matplotlib's own defaults, whatever a user has set, with this report's text and lines."""
    settings = {
        "font.family": list(fonts()),
        "font.size": 10,
        "text.color": INK,
        "text.parse_math": False,  # a data set may be called a$b$
        "axes.edgecolor": "#8A949F",
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "xtick.color": "#8A949F",
        "xtick.labelcolor": INK,
        "ytick.color": "#8A949F",
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "legend.borderpad": 0,
        "legend.borderaxespad": 0.3,
        "legend.handlelength": 1.2,
        "legend.columnspacing": 1.2,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "path.simplify_threshold": 0.5,  # of a 72nd of an inch: a run of 100,000 steps is no heavier than the eye can see
        "svg.fonttype": "path",
        "svg.hashsalt": "llmtuner",
    }
    with matplotlib.style.context(settings, after_reset=True):
        yield


def _canvas(title: str, unit: str = "", height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure whose title says what was found; the unit of the upright axis stands above that axis."""
    figure = Figure((WIDTH, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", size=11)
    axes = figure.add_subplot()
    axes.set_title(unit, **UNIT)
    return figure, axes


def _legend(axes: Axes) -> None:
    """Above the drawing, where it covers nothing."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=9.5)


def _number(value: float, _: object = None) -> str:
    """A number on an axis: 0.0005, 12, 1,500, 3M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}".replace("-", "−")


def _digits(value: float) -> str:
    """A number in a text, with three digits: 8.92, 0.500, −0.0120."""
    return f"{value:#.3g}".rstrip(".").replace("-", "−")


def _from_to(series: Series) -> str:
    return f"{_digits(series[1][0])} → {_digits(series[1][-1])}"


def _linear(axis: Axis, integer: bool = False) -> None:
    axis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10], integer=integer))
    axis.set_major_formatter(_number)


def _logarithmic(axes: Axes, which: str, values: numpy.ndarray) -> None:
    """Makes axis x or y logarithmic, with few ticks and plain numbers: 1, 2, 5, 10; powers of ten over a wide range."""
    axes.set(**{f"{which}scale": "log"})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    span = values.max() / values.min()
    subs = (1, 2, 5) if span < 1000 else (1,)
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
    figure, axes = _canvas(f"Loss: {found}", "nats per token")
    _draw_losses(axes, train, held_out)
    _legend(axes)
    _linear(axes.yaxis)
    _step_axis(axes)
    return figure


@_style()
def loss_power_law(log: Log) -> Figure | None:
    """The same on logarithmic axes, from step 1 on, with a straight line through the second half."""
    train, held_out = (_positive(_series(log, name)) for name in ("loss", "eval_loss"))
    if train is None or len(train[0]) < 2:
        return None
    law = fit_power_law(*train)
    figure, axes = _canvas(_describe_power_law(law), "nats per token")
    _draw_losses(axes, train, held_out)
    if law:
        ends = numpy.array([law.begin, train[0][-1]])
        axes.plot(ends, law.scale * ends**-law.exponent, "--", color=INK, label=f"fit, b = {_digits(law.exponent)}")
    _legend(axes)
    _logarithmic(axes, "y", train[1])
    _step_axis(axes)
    _logarithmic(axes, "x", train[0])
    return figure


def fit_power_law(steps: numpy.ndarray, values: numpy.ndarray) -> PowerLaw | None:
    """A straight line through the second half, in log step, of the logarithms of a loss; None from less than 4 points.

    Logged points crowd together towards the end in log step, so each is weighted by the room it has there.
    """
    middle = math.sqrt(steps[0] * steps[-1])
    half = steps >= middle
    if half.sum() < 4:
        return None
    x, y = numpy.log(steps[half]), numpy.log(values[half])
    slope, height = numpy.polyfit(x, y, 1, w=numpy.sqrt(numpy.gradient(x)))  # polyfit squares its weights
    return PowerLaw(math.exp(height), -float(slope), float(steps[half][0]))


def _describe_power_law(law: PowerLaw | None) -> str:
    if law is None:
        return "Too few points to fit a power law"
    change = f"{abs(1 - 2**-law.exponent):.1%}"
    if law.exponent <= -PLATEAU_EXPONENT:
        return f"The loss rises: twice the steps, {change} more"
    if law.exponent < PLATEAU_EXPONENT:
        return f"Stall: twice the steps change the loss by {change}"
    return f"b = {_digits(law.exponent)}: twice the steps, {change} less loss"


@_style()
def learning_rates(log: Log) -> Figure | None:
    """Learning rate of the adapters and of the embeddings over steps; one line where they are the same."""
    rate, embedding = _series(log, "learning_rate"), _series(log, "embedding_learning_rate")
    if rate is None:
        return None
    rates = {"adapters": rate}
    if embedding is not None and not (len(rate[1]) == len(embedding[1]) and numpy.allclose(rate[1], embedding[1])):
        rates["embeddings"] = embedding
    highest = ", ".join(f"{float(f'{own[1].max():.3g}'):g} ({name})" for name, own in rates.items())
    figure, axes = _canvas(f"Up to {highest if len(rates) > 1 else highest.split()[0]}", "learning rate")
    for (name, own), color, line in zip(rates.items(), (TRAIN, EVAL), ("-", "--"), strict=False):
        axes.plot(*own, line, color=color, label=name)
    if len(rates) > 1:
        _legend(axes)
    axes.set_ylim(bottom=0)
    _linear(axes.yaxis)
    _step_axis(axes)
    return figure


@_style()
def speed(log: Log) -> Figure | None:
    """Tokens, and trained tokens, per second over steps."""
    every, trained = _series(log, "tokens_per_second"), _series(log, "target_tokens_per_second")
    if every is None:
        return None
    figure, axes = _canvas(f"{numpy.median(every[1]):,.0f} tokens per second (median)", "tokens / s")
    axes.plot(*every, color=TRAIN, label="all")
    if trained is not None:
        axes.plot(*trained, "--", color=EVAL, label="trained")
        _legend(axes)
    axes.set_ylim(bottom=0)
    _linear(axes.yaxis)
    _step_axis(axes)
    return figure


@_style()
def bits_per_byte(log: Log) -> Figure | None:
    """Bits per byte of held-out text of each language over steps, named at the ends of the lines."""
    found = {
        language: _positive(_series(log, f"eval_bits_per_byte_{language}"), first_step=0) for language in LANGUAGES
    }
    lines = {language: line for language, line in found.items() if line is not None}
    if not lines:
        return None
    figure, axes = _canvas(
        ", ".join(f"{language} {_from_to(line)}" for language, line in lines.items()), "bits per byte"
    )
    for language, line in lines.items():
        axes.plot(*line, "o-", markersize=3.5, color=COLORS[language])
    values = numpy.concatenate([line[1] for line in lines.values()])
    if values.max() > LOG_SCALE_FROM * values.min():
        _logarithmic(axes, "y", values)
    else:
        _linear(axes.yaxis)
    _step_axis(axes)
    _label_line_ends(axes, lines)
    return figure


def _label_line_ends(axes: Axes, lines: dict[str, Series]) -> None:
    """Writes each language and its last value at the right, at the height of its line's end or as near as there is room."""
    room = 0.09  # of the height of the axes, for one line of text
    axes.get_ylim()  # brings the limits up to date, by which the transform goes
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted((to_axes.transform((line[0][-1], line[1][-1]))[1], language) for language, line in lines.items())
    lowest = 0.0
    for place, (height, language) in enumerate(ends):
        highest = 1 - room * (len(ends) - 1 - place)
        lowest = min(max(height, lowest), highest)
        text = f"{LANGUAGES[language]} {_digits(lines[language][1][-1])}"
        axes.text(1.02, lowest, text, transform=axes.transAxes, color=COLORS[language], va="center")
        lowest += room


def _series(log: Log, name: str) -> Series | None:
    """Steps and values of one quantity, as far as they are finite; None if there are none."""
    points = [(entry["step"], entry[name]) for entry in log if isinstance(entry.get(name), int | float)]
    points = [point for point in points if math.isfinite(point[1])]
    return (numpy.array([step for step, _ in points]), numpy.array([value for _, value in points])) if points else None


def _positive(series: Series | None, first_step: int = 1) -> Series | None:
    """What of it can stand on logarithmic axes."""
    if series is None:
        return None
    fits = (series[0] >= first_step) & (series[1] > 0)
    return (series[0][fits], series[1][fits]) if fits.any() else None


def _smooth(values: numpy.ndarray) -> numpy.ndarray:
    """Running mean over a twentieth of the run, centred; narrower at the beginning, where a loss falls steeply."""
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


def _step_axis(axes: Axes) -> None:
    _linear(axes.xaxis)
    axes.set_xlabel("step", loc="right")


# ---------------------------------------------------------------------------------------------------------------- bars
class Bars(NamedTuple):
    """One bar for each name, with the text at its end."""

    lengths: list[float]
    texts: list[str]
    color: str | list[str] = TRAIN
    name: str | None = None


def _bar_figure(title: str, names: list[str], *groups: Bars) -> tuple[Figure, Axes]:
    """Horizontal bars with their names at the left, those of all groups side by side; as high as it needs to be."""
    bars = len(names) * len(groups)
    figure, axes = _canvas(title, height=0.8 + 0.24 * bars + 0.1 * len(names))
    thickness = 0.8 / len(groups)
    for place, group in enumerate(groups):
        heights = numpy.arange(len(names)) + (place - (len(groups) - 1) / 2) * thickness
        drawn = axes.barh(heights, group.lengths, 0.92 * thickness, color=group.color, label=group.name)
        axes.bar_label(drawn, group.texts, padding=3, fontsize=9.5)
    axes.set_yticks(range(len(names)), [drawable(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)  # first name on top
    axes.tick_params(left=False)
    axes.grid(False)
    axes.xaxis.set_visible(False)  # the texts say it
    axes.spines["bottom"].set_visible(False)
    return figure, axes


@_style()
def tokens_per_character(tokens: dict[str, dict[str, float]]) -> Figure | None:
    """Tokens per character of each language with the base tokenizer and with the new one, and the factor between them."""
    before, after = tokens.get("base", {}), tokens.get("zero", {})
    found = [language for language in LANGUAGES if before.get(language) and after.get(language)]
    if not found:
        return None
    factors = {language: before[language] / after[language] for language in found}
    most = max(found, key=lambda language: abs(math.log(factors[language])))
    figure, axes = _bar_figure(
        f"{LANGUAGES[most]} takes {_format_factor(factors[most])} tokens",
        [LANGUAGES[language] for language in found],
        Bars([before[one] for one in found], [f"{before[one]:.2f}" for one in found], BEFORE),
        Bars(
            [after[one] for one in found],
            [f"{after[one]:.2f} ({_format_factor(factors[one])})" for one in found],
            [COLORS[language] for language in found],
        ),
    )
    axes.set_title("tokens per character: before (grey), after", **UNIT)
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
    figure, _ = _bar_figure(f"From {values[-1]:.2f} to {values[0]:.2f} nats per token", names, bars)
    return figure


@_style()
def mix(data: dict[str, dict[str, Any]]) -> Figure | None:
    """Share of each data set in the run, and the share that was planned where there was a plan."""
    names = [name for name, own in data.items() if own.get("ratio") is not None]
    if not names:
        return None
    met = [data[name]["ratio"] for name in names]
    planned = [share for name in names if (share := data[name].get("target_ratio")) is not None]
    bars = Bars(met, [f"{share:.1%}" for share in met], TRAIN, "met")
    if len(planned) < len(names):
        figure, _ = _bar_figure("Shares of the trained tokens", names, bars)
    else:
        off = max(abs(one - other) for one, other in zip(met, planned, strict=True))
        title = f"At most {100 * off:.2g} percentage points off the plan"
        figure, axes = _bar_figure(
            title, names, Bars(planned, [f"{share:.1%}" for share in planned], BEFORE, "planned"), bars
        )
        _legend(axes)
    return figure


@_style()
def lengths(histogram: dict[str, list[int]], padding_ratio: float | None, unit: str) -> Figure | None:
    """How many documents or dialogues there are of each length, in ranges that double."""
    edges, counts = histogram.get("edges", []), histogram.get("counts", [])
    filled = [place for place, count in enumerate(counts) if count]
    if not filled:
        return None
    first, end = filled[0], filled[-1] + 1
    padding = "" if padding_ratio is None else f", {padding_ratio:.1%} padding"
    figure, axes = _canvas(f"{sum(counts):,} {unit}{padding}", unit)
    axes.bar(range(first, end), counts[first:end], 0.94, align="edge", color=TRAIN)
    ticks = range(first, end + 1, 1 + (end - first) // 7)  # labels of five digits have room
    axes.set_xticks(ticks, [_number(edges[place]) for place in ticks])
    axes.set_xlabel("tokens", loc="right")
    axes.grid(visible=False, axis="x")
    _linear(axes.yaxis, integer=True)
    return figure


# ----------------------------------------------------------------------------------------------------------------- svg
@_style()
def _svg(figure: Figure, name: str, alt: str) -> str:
    """A drawing for the middle of an HTML page: one element that meddles with nothing around it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    # A style sheet in a drawing counts for the whole page; what it says goes into the drawing's own style.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    style = "stroke-linejoin: round; stroke-linecap: butt"
    return svg.replace("<svg", f'<svg role="img" aria-label={quoteattr(alt)} style="{style}"', 1)
