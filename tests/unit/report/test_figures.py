"""Figures show the numbers they are given, fit any page, and never draw a box for a character."""

import dataclasses
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy
import pytest
from matplotlib import font_manager
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from llmtuner.console import UserError
from llmtuner.eval.ladder import ENTITIES, FORMS
from llmtuner.report import figures
from llmtuner.report.figures import COLORS, LANGUAGES, build_figures, plot_losses, read_log
from tests.reports import LADDER, LADDER_CELL
from tests.unit.report.svg import LINK, SVG, glyphs, glyphs_of_first_name, names_of

LOG = [
    {"step": 0, "eval_loss": 4.0, "eval_bits_per_byte_ja": 3.6, "eval_bits_per_byte_zh": 0.62, "epoch": 0},
    *(
        {
            "step": step,
            "loss": 5 * step**-0.3,
            "learning_rate": 1e-3 / step,
            "embedding_learning_rate": 5e-4 / step,
            "tokens_per_second": 1000.0 + step,
            "target_tokens_per_second": 500.0 + step,
            "grad_norm": 20.0 / step,
            "grad_norm_embeddings": 12.0 / step,
            "grad_norm_layers": 16.0 / step,
            "mfu": 0.4 + step / 1000,
        }
        for step in range(1, 101)
    ),
    {"step": 100, "eval_loss": 1.5, "eval_bits_per_byte_ja": 0.33, "eval_bits_per_byte_zh": 0.27},
    {"step": 100, "train_runtime": 85.6},
]
METRICS = {
    "step4": {
        "tokens_per_character": {"base": {"ja": 2.4, "zh": 0.9, "en": 0.3}, "zero": {"ja": 0.6, "zh": 0.9, "en": 0.36}}
    },
    "step5": {
        "data": {"wiki_ja": {"target_ratio": 0.75, "ratio": 0.74}, "wiki_zh": {"target_ratio": 0.25, "ratio": 0.26}},
        "lengths": {"edges": [1, 2, 4, 8, 16, 32], "counts": [0, 3, 0, 1200, 0]},
        "padding_ratio": 0.034,
    },
    "step6": {"initial_loss": {"easy": 0.5, "hard": 2.5, "middling": 1.0}},
}


def charts():
    """Each kind of figure, by name."""
    own = METRICS["step5"]
    return {
        "loss": figures.loss_curve(LOG),
        "log_loss": figures.log_loss(LOG),
        "bits_per_byte": figures.bits_per_byte(LOG),
        "learning_rate": figures.learning_rates(LOG),
        "speed": figures.speed(LOG),
        "gradient_norm": figures.gradient_norms(LOG),
        "mfu": figures.mfu(LOG),
        "mix": figures.mix(own["data"]),
        "lengths": figures.lengths(own["lengths"], own["padding_ratio"], "documents"),
        "initial_loss": figures.initial_losses(METRICS["step6"]["initial_loss"]),
        "ladder": figures.ladder(LADDER),
        "tokens_per_character": figures.tokens_per_character(METRICS["step4"]["tokens_per_character"]),
    }


def drawn(figure):
    """Title, lines as (steps, values), and bars as lengths."""
    axes = figure.axes[0]
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    return figure.get_label(), lines, [round(bar.get_width(), 4) for bar in axes.patches]


def log_of(**values):
    """A log with one quantity or several, from step 1 on."""
    return [
        dict(zip(("step", *values), row, strict=True))
        for row in zip(itertools.count(1), *values.values(), strict=False)
    ]


# --------------------------------------------------------------------------------------------------------------- a run
def test_loss_shows_every_value_its_mean_and_the_held_out_points():
    title, ((steps, raw), (same_steps, smooth), held_out), _ = drawn(figures.loss_curve(LOG))
    assert title == "Training 5.00 → 1.26, held out 4.00 → 1.50"
    assert steps == same_steps == list(range(1, 101))
    assert raw == [entry["loss"] for entry in LOG if "loss" in entry]
    assert smooth[0] == raw[0]
    assert held_out == ([0, 100], [4.0, 1.5])


def test_running_mean_shifts_nothing_and_calms_noise():
    line = numpy.linspace(5, 1, 400)
    assert figures._smooth(line)[:390] == pytest.approx(line[:390])
    noisy = line + numpy.tile([0.5, -0.5], 200)
    assert abs(figures._smooth(noisy) - line)[20:].max() < 0.1
    assert figures._smooth(numpy.array([3.0])) == [3.0]


def test_values_that_are_no_numbers_are_passed_over():
    log = log_of(loss=[float("nan"), 2.0, None, float("inf"), 1.0])
    assert drawn(figures.loss_curve(log))[1][0] == ([2, 5], [2.0, 1.0])


def test_logarithmic_loss_tells_what_the_second_half_brought():
    log = log_of(loss=[4.0 - step / 50 for step in range(1, 101)])
    figure = figures.log_loss(log)
    assert figure.get_label() == "From step 50 to 100 the training loss fell by 32.7%"  # of the running mean
    assert (figure.axes[0].get_xscale(), figure.axes[0].get_yscale()) == ("log", "log")
    held_out = [{"step": step, "eval_loss": loss} for step, loss in ((10, 3.0), (50, 2.0), (100, 2.5))]
    assert figures.log_loss(log + held_out).get_label() == "From step 50 to 100 the held-out loss rose by 25.0%"


def test_gradient_norms_of_each_group_and_the_highest():
    title, lines, _ = drawn(figures.gradient_norms(LOG))
    assert title == "Median 0.396, highest 20.0 at step 1"
    assert [values[0] for _, values in lines] == [20.0, 12.0, 16.0]
    assert len(figures.gradient_norms(log_of(grad_norm=[2.0, 1.0])).axes[0].lines) == 1


def test_ladder_shows_both_shares_and_the_interval():
    figure = figures.ladder(LADDER)
    title, lines, _ = drawn(figure)
    assert title == "Right about the untold: 5% in Japanese"
    (right, named), (told_heights, _) = ([list(line[0]) for line in lines[:2]], [list(line[1]) for line in lines[:2]])
    assert (right, named, told_heights) == ([25.0], [80.0], [-0.1])
    assert [list(line[0]) for line in lines[2:]] == [[5.0, 25.0], [80.0, 80.0]]
    (interval,) = figure.axes[0].collections[0].get_segments()
    assert interval[:, 0] == pytest.approx([18.1, 33.44])
    assert figures.ladder({}) is None


def test_mfu_in_percent():
    title, lines, _ = drawn(figures.mfu(LOG))
    assert title == "45.1% (median)"
    assert lines[0][1][-1] == 50.0


def test_only_what_is_above_zero_stands_on_logarithmic_axes():
    log = [
        {"step": 0, "loss": 3.0},
        {"step": 0, "eval_loss": 3.0},
        *log_of(loss=[2.0, 0.0, 1.0], eval_loss=[0.0, 2.0, 1.5]),
    ]
    _, lines, _ = drawn(figures.log_loss(log))
    assert lines[0] == ([1, 3], [2.0, 1.0])
    assert lines[2] == ([2, 3], [2.0, 1.5])


@pytest.mark.parametrize("falls_by", [1.1, 4, 100, 1e5])
def test_logarithmic_axes_have_few_plain_numbers(falls_by):
    figure = figures.log_loss(log_of(loss=list(numpy.geomspace(2, 2 / falls_by, 300))))
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    numbers = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert 2 <= len(numbers) <= 8
    assert not len(axes.yaxis.get_minorticklocs())
    assert not any("$" in label.get_text() for label in axes.get_yticklabels())


def test_long_runs_make_no_heavy_figures():
    noise = numpy.random.default_rng(0).normal(2, 0.1, 20_000)
    assert len(figures.draw_svg(figures.loss_curve(log_of(loss=list(noise))), "f", "")) < 100_000


def test_logarithmic_loss_needs_points():
    assert figures.log_loss(log_of(loss=[3.0])) is None
    assert figures.log_loss([{"step": 0, "loss": 3.0}, {"step": 1, "loss": 0.0}]) is None  # no place on these axes


def test_learning_rates_are_one_line_where_they_are_equal():
    title, lines, _ = drawn(figures.learning_rates(LOG))
    assert title == "Up to 0.001 (adapters), 0.0005 (embeddings)"
    assert [values[0] for _, values in lines] == [1e-3, 5e-4]
    equal = log_of(learning_rate=[0.0, 1e-3, 0.0], embedding_learning_rate=[0.0, 1e-3, 0.0])
    for log in (equal, log_of(learning_rate=[0.0, 1e-3, 0.0])):
        title, lines, _ = drawn(figures.learning_rates(log))
        assert title == "Up to 0.001"
        assert lines == [([1, 2, 3], [0.0, 1e-3, 0.0])]


def test_speed_shows_all_tokens_and_trained_ones():
    title, lines, _ = drawn(figures.speed(LOG))
    assert title == "1,050 tokens per second (median)"
    assert [values[-1] for _, values in lines] == [1100.0, 600.0]


def test_bits_per_byte_are_named_at_their_ends_in_fixed_colours():
    figure = figures.bits_per_byte(LOG)
    title, lines, _ = drawn(figure)
    axes = figure.axes[0]
    assert title == "Japanese 3.60 → 0.330, Chinese 0.620 → 0.270"
    assert lines == [([0, 100], [3.6, 0.33]), ([0, 100], [0.62, 0.27])]
    assert axes.get_yscale() == "log"  # 3.6 is more than ten times 0.27
    for line, text, language in zip(
        axes.lines, sorted(axes.texts, key=lambda text: -text.get_position()[1]), ("ja", "zh"), strict=True
    ):
        assert line.get_color() == text.get_color() == dict(zip(LANGUAGES, COLORS, strict=False))[language]
        assert text.get_text().startswith(LANGUAGES[language])


def test_names_at_line_ends_stand_at_their_lines_and_never_on_one_another():
    apart = figures.bits_per_byte(
        [{"step": 0, **{f"eval_bits_per_byte_{one}": bits for one, bits in (("ja", 3.0), ("zh", 2.0), ("en", 1.0))}}]
    )
    axes = apart.axes[0]
    assert axes.get_yscale() == "linear"
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [to_axes.transform((0, bits))[1] for bits in (1.0, 2.0, 3.0)]
    assert [text.get_position()[1] for text in axes.texts] == pytest.approx(ends)
    for bits in (0.0, 0.9, 1.0):  # together at the bottom, the middle, the top
        log = [{"step": 0, "eval_bits_per_byte_ja": 0.5}, {"step": 0, "eval_bits_per_byte_ja": 1.0}]
        log.append({"step": 1, **{f"eval_bits_per_byte_{one}": max(bits, 0.5) for one in LANGUAGES}})
        heights = [text.get_position()[1] for text in figures.bits_per_byte(log).axes[0].texts]
        assert min(numpy.diff(heights)) >= 0.089
        assert heights[-1] <= 1


# ---------------------------------------------------------------------------------------------------------------- bars
def test_initial_losses_are_sorted():
    figure = figures.initial_losses({"easy": 0.5, "hard": 2.5, "broken": float("nan"), "middling": 1.0})
    title, _, bars = drawn(figure)
    assert title == "From 0.50 to 2.50 nats per token"
    assert bars == [2.5, 1.0, 0.5]
    assert names_of(figure) == ["hard", "middling", "easy"]
    assert figure.axes[0].yaxis_inverted()  # the first one on top


def test_mix_shows_plan_and_outcome():
    figure = figures.mix(METRICS["step5"]["data"])
    title, _, bars = drawn(figure)
    assert title == "At most 1 percentage points off target"
    assert bars == [0.75, 0.25, 0.74, 0.26]
    assert [text.get_text() for text in figure.axes[0].texts] == ["75.0%", "25.0%", "74.0%", "26.0%"]
    uneven = {"a": (0.5, 0.5), "b": (0.3, 0.25), "c": (0.2, 0.25)}
    figure = figures.mix({name: {"target_ratio": plan, "ratio": share} for name, (plan, share) in uneven.items()})
    assert figure.get_label() == "At most 5 percentage points off target"
    figure = figures.mix({"a": {"target_ratio": None, "ratio": 0.9}, "b": {"ratio": 0.1}, "c": {"kept": 3}})
    title, _, bars = drawn(figure)
    assert title == "Shares of the target tokens"
    assert bars == [0.9, 0.1]


def test_lengths_leave_out_empty_ends():
    figure = figures.lengths({"edges": [1, 2, 4, 8, 16, 32], "counts": [0, 3, 0, 1200, 0]}, 0.034, "documents")
    axes = figure.axes[0]
    assert figure.get_label() == "1,203 documents, 3.4% padding"
    assert [bar.get_height() for bar in axes.patches] == [3, 0, 1200]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "4", "8", "16"]
    assert [bar.get_x() for bar in axes.patches] == list(axes.get_xticks()[:-1])
    one = figures.lengths({"edges": [1, 2], "counts": [1]}, None, "dialogues")
    assert one.get_label() == "1 dialogues"
    assert {tick % 1 for tick in one.axes[0].get_yticks()} == {0}


def test_tokens_per_character_names_the_factor():
    figure = figures.tokens_per_character(METRICS["step4"]["tokens_per_character"])
    title, _, bars = drawn(figure)
    assert title == "Japanese takes 4.0 × fewer tokens"
    assert bars == [2.4, 0.9, 0.3, 0.6, 0.9, 0.36]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[3:] == ["0.60 (4.0 × fewer)", "0.90 (as many)", "0.36 (1.2 × more)"]
    colors = [bar.get_facecolor()[:3] for bar in figure.axes[0].patches]
    assert colors[3:] == [to_rgb(color) for color in COLORS[:3]]
    some = figures.tokens_per_character({"base": {"ja": 2.0, "zh": 1.0}, "zero": {"ja": 1.0}})
    assert names_of(some) == ["Japanese"]


@pytest.mark.parametrize(
    "figure",
    [
        *(draw(log) for log in ([], [{"step": 3, "train_runtime": 1.0}], log_of(loss=[float("nan")], learning_rate=[None]))
          for draw in (figures.loss_curve, figures.log_loss, figures.learning_rates, figures.speed, figures.bits_per_byte,
                       figures.gradient_norms, figures.mfu)),
        figures.initial_losses({}),
        figures.initial_losses({"a": float("nan")}),
        figures.mix({}),
        figures.mix({"a": {"kept": 3}}),
        figures.lengths({}, 0.1, "documents"),
        figures.lengths({"edges": [1, 2, 4], "counts": [0, 0]}, 0.1, "documents"),
        figures.tokens_per_character({}),
        figures.tokens_per_character({"base": {"ja": 1.0}}),
    ],
)  # fmt: skip
def test_no_figure_without_data(figure):
    assert figure is None


# ----------------------------------------------------------------------------------------------------------------- all
def test_report_has_a_figure_for_what_there_is():
    assert [figure.name for figure in build_figures(METRICS, {"step5": LOG})] == [
        "step4_tokens_per_character",
        "step5_loss",
        "step5_log_loss",
        "step5_bits_per_byte",
        "step5_gradient_norm",
        "step5_learning_rate",
        "step5_speed",
        "step5_mfu",
        "step5_mix",
        "step5_lengths",
        "step6_initial_loss",
    ]
    assert build_figures({}, {}) == []
    loss = build_figures({}, {"step6": LOG})[0]
    assert loss.title == "Instruction tuning: loss"
    assert loss.finding == "Training 5.00 → 1.26, held out 4.00 → 1.50"
    assert loss.alt == f"Instruction tuning: loss. {loss.finding}."
    assert loss.caption.endswith(".")


def test_drawings_can_stand_in_one_page():
    made = build_figures(METRICS, {"step5": LOG, "step6": LOG})
    ids = []
    for figure in made:
        root = ElementTree.fromstring(figure.svg)
        assert root.tag == f"{SVG}svg"
        assert root.get("role") == "img"
        assert root.get("aria-label") == figure.alt
        assert root.get("viewBox").startswith("0 0 331.2 ")  # a pixel to a point, or more, on a phone of 390
        assert root.get("width") is root.get("height") is None
        assert figure.svg.startswith("<svg")
        assert set(re.findall(r'[\w:]*="http[^"]*"|http\S*', figure.svg)) == {
            'xmlns="http://www.w3.org/2000/svg"',
            'xmlns:xlink="http://www.w3.org/1999/xlink"',
        }
        assert not re.search(r"<(style|metadata|text|script|image)|<!|<\?", figure.svg)
        own = [element.get("id") for element in root.iter() if element.get("id")]
        links = [element.get(LINK)[1:] for element in root.iter() if element.get(LINK)]
        links += re.findall(r"url\(#(.*?)\)", figure.svg)
        assert links
        assert {*links} <= {*own}
        ids += own
    assert len(ids) == len({*ids}) > 100


def test_same_numbers_give_the_same_bytes_whatever_a_user_has_set(tmp_path):
    before = build_figures(METRICS, {"step5": LOG})
    plot_losses(LOG, tmp_path)
    image = (tmp_path / "training_loss.png").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "text.usetex": True, "axes.grid": False, "savefig.facecolor": "red"}):
        settings = dict(matplotlib.rcParams)
        assert build_figures(METRICS, {"step5": LOG}) == before
        plot_losses(LOG, tmp_path)
        assert (tmp_path / "training_loss.png").read_bytes() == image
        assert dict(matplotlib.rcParams) == settings


def all_texts(figure):
    """Every piece of text that is drawn, with its box in pixels."""
    axes = figure.axes[0]
    figure.draw_without_rendering()
    texts = [*figure.texts, axes.xaxis.label, *(child for child in axes.get_children() if isinstance(child, Text))]
    texts += axes.get_legend().get_texts() if axes.get_legend() else []
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        texts += [
            tick.label1 for tick in axis.get_major_ticks() if axis.get_visible() and low <= tick.get_loc() <= high
        ]
    return [(text, text.get_window_extent()) for text in texts if text.get_text() and text.get_visible()]


HARD_LOG = [
    {**entry, "step": 1_000_000 if entry["step"] == 100 else 7_777 * entry["step"], "tokens_per_second": 2e6, "eval_bits_per_byte_en": 0.6}
    for entry in LOG
]  # fmt: skip
HARD = {
    "long names": lambda: figures.initial_losses({"x" * 80: 11.11, "y" * 20: 2.0}),
    "wide names": lambda: figures.mix({"日本語の百科事典と、青空文庫の全部": {"ratio": 1.0, "target_ratio": 0.5}}),
    "many lengths": lambda: figures.lengths({"edges": [2**n for n in range(18)], "counts": [9**n for n in range(17)]}, 0.5, "dialogues"),
    "one length": lambda: figures.lengths({"edges": [64, 128], "counts": [1]}, 0.0, "dialogues"),
    "every kind of entities": lambda: figures.ladder({kind: {form: LADDER_CELL for form in FORMS} for kind in ENTITIES}),
    "many steps": lambda: figures.loss_curve(HARD_LOG),
    "many steps, logarithmic": lambda: figures.log_loss(HARD_LOG),
    "many steps, speed": lambda: figures.speed(HARD_LOG),
    "many steps, bits": lambda: figures.bits_per_byte(HARD_LOG),
    "a narrow range": lambda: figures.log_loss(log_of(loss=[2.2 * step**-0.02 for step in range(1, 3000)])),
}  # fmt: skip


@pytest.mark.parametrize("name", [*charts(), *HARD])
def test_text_is_readable_on_a_telephone(name):
    figure = HARD[name]() if name in HARD else charts()[name]
    boxes = all_texts(figure)
    for text, box in boxes:
        assert text.get_fontsize() * 340 / (72 * figure.get_figwidth()) >= 11, text  # pixels on a phone of 390
        assert box.x0 > -1, text
        assert box.y0 > -1, text
        assert box.x1 < figure.bbox.width + 1, text
        assert box.y1 < figure.bbox.height + 1, text
    for (text, box), (other, other_box) in itertools.combinations(boxes, 2):
        assert not box.padded(-0.5).overlaps(other_box.padded(-0.5)), (text, other)


@pytest.mark.parametrize("color", [figures.TRAIN, figures.EVAL, *COLORS])
def test_colours_are_dark_enough_for_text(color):
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(color)]
    assert 1.05 / (numpy.dot(linear, [0.2126, 0.7152, 0.0722]) + 0.05) >= 4.5  # WCAG AA on white


def test_names_are_text_and_not_formulas():
    figure = figures.initial_losses({"a$x^{2}$b": 2.0, "$": 1.0, "<&>'\"-->": 0.5, "": 0.1})
    assert names_of(figure) == ["a$x^{2}$b", "$", "<&>'\"-->", ""]
    assert len(glyphs("a$x^{2}$b")) == 9
    ElementTree.fromstring(figures.draw_svg(figure, "f", "<&>'\""))


def test_long_names_lose_their_middle():
    assert figures.drawable("a" * 24) == "a" * 24
    assert figures.drawable("begin" + "-" * 90 + "end") == "begin-------…--------end"
    if len(figures.fonts()) > 1:
        assert figures.drawable("日本語" * 10) == "日本語日本語…本語日本語"


# ---------------------------------------------------------------------------------------------------------------- files
def test_log_is_read_up_to_a_line_that_was_cut(tmp_path):
    path = tmp_path / "trainer_log.jsonl"
    whole = '{"step": 1, "loss": 2.5}\n{"step": 2, "initial_loss/日本": NaN}\n'.encode()
    path.write_bytes(whole)
    assert [entry["step"] for entry in read_log(path)] == [1, 2]
    line = json.dumps({"step": 3, "日本": 1.0}, ensure_ascii=False).encode()
    for cut in range(len(line)):
        path.write_bytes(whole + line[:cut])
        assert [entry["step"] for entry in read_log(path)] == [1, 2]
    path.write_bytes(whole + line)
    assert len(read_log(path)) == 3
    path.write_bytes(b"")
    assert read_log(path) == []


def test_log_that_is_damaged_or_missing_is_named(tmp_path):
    path = tmp_path / "trainer_log.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"log\.jsonl, line 2 is damaged"):
        read_log(path)
    with pytest.raises(UserError, match="cannot read the log"):
        read_log(tmp_path / "none.jsonl")


def test_losses_are_drawn_into_files(tmp_path):
    plot_losses(LOG, tmp_path)
    for name in ("training_loss.png", "eval_loss.png"):
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 5_000
    assert (tmp_path / "training_loss.png").read_bytes() != (tmp_path / "eval_loss.png").read_bytes()


def test_losses_that_were_not_logged_are_not_drawn(tmp_path):
    plot_losses([{"step": 1, "loss": 2.0}], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["training_loss.png"]


def test_losses_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        plot_losses(LOG, tmp_path / "file")


# --------------------------------------------------------------------------------------------------------------- fonts
@pytest.fixture
def fonts_anew():
    """The search for fonts begins anew, and again after the test."""
    caches = (figures.fonts, figures._warn_of_missing_glyphs)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def hidden_fonts(fonts_anew, monkeypatch):
    """matplotlib's list has its own fonts alone."""
    own = [entry for entry in font_manager.fontManager.ttflist if "mpl-data" in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])


SYSTEM_FONTS = font_manager.findSystemFonts
CJK_FILE = next((path for path in sorted(SYSTEM_FONTS()) if "NotoSansCJK-Regular" in path or "ipaexg" in path), "")
needs_cjk = pytest.mark.skipif(not CJK_FILE, reason="no font with Japanese characters (fonts-noto-cjk)")


@needs_cjk
def test_japanese_names_are_no_boxes():
    families = [*figures.fonts()]
    missing = "\U000e0fff"  # no font has it: what is drawn is the box
    boxes = set()
    for family in families:
        for last_resort in (True, False):
            with matplotlib.rc_context({"font.family": [family], "font.enable_last_resort": last_resort}):
                figure = Figure()
                figure.add_subplot().set_yticks([0], [missing])
            with matplotlib.rc_context({"font.enable_last_resort": last_resort}):
                boxes.update(glyphs_of_first_name(figures.draw_svg.__wrapped__(figure, "f", "")))
    shapes = glyphs("日本かなカナ体")
    assert boxes
    assert len(shapes) == len({*shapes}) == 7
    assert not boxes.intersection(shapes)


def test_without_a_font_characters_are_written_by_number(hidden_fonts, capsys):
    figure = figures.initial_losses({"日本_ja": 2.0, "中文": 1.0})
    assert names_of(figure) == ["U+65E5 U+672C _ja", "U+4E2D U+6587"]
    said = capsys.readouterr().out
    assert said.count("fonts-noto-cjk") == 1
    assert "U+XXXX" in said
    face = figures.fonts()["DejaVu Sans"]
    assert all(face.get_char_index(ord(char)) for name in names_of(figure) for char in name)


def test_nothing_is_said_about_fonts_that_nothing_needs(hidden_fonts, capsys):
    assert names_of(figures.initial_losses({"wiki": 2.0})) == ["wiki"]
    assert not capsys.readouterr().out


@needs_cjk
def test_font_that_was_installed_after_matplotlib_listed_them_is_found(hidden_fonts, monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", SYSTEM_FONTS)
    assert len(figures.fonts()) > 1
    assert names_of(figures.initial_losses({"日本": 2.0})) == ["日本"]


def test_font_that_is_gone_is_passed_over(hidden_fonts, tmp_path):
    damaged = tmp_path / "damaged.ttf"
    damaged.write_bytes(b"no font")
    entry = font_manager.fontManager.ttflist[0]
    font_manager.fontManager.ttflist[:0] = [
        dataclasses.replace(entry, fname=str(path), name="Noto Sans CJK JP")
        for path in (damaged, tmp_path / "gone.ttf")
    ]
    assert [*figures.fonts()] == ["DejaVu Sans"]


@needs_cjk
def test_fallback_list_is_in_order_of_preference(hidden_fonts):
    entry = font_manager.fontManager.ttflist[0]
    font_manager.fontManager.ttflist += [
        dataclasses.replace(entry, fname=CJK_FILE, name=name) for name in ("AAA", "MS Gothic", "IPAexGothic")
    ]
    assert [*figures.fonts()] == ["DejaVu Sans", "IPAexGothic", "MS Gothic"]
