"""The comparison: which runs are one recipe, which settings differ, differences with their intervals, and what is refused."""

import json
import re

import numpy
import pytest

from llmtuner.console import UserError
from llmtuner.eval.intervals import paired_difference, seed_difference, unpaired_difference
from llmtuner.report import compare, figures
from llmtuner.report.compare import group_by_recipe, read_run, write_comparison
from tests.reports import NUM_QUESTIONS, SETTINGS, save_run, save_work_dir
from tests.unit.report.outline import check_outline, words


def compared(tmp_path, *directories):
    return write_comparison(directories, tmp_path / "compare.html").read_text(encoding="utf-8")


def line(text, name):
    """The cells of a row of a table."""
    row = next(row for row in re.findall("<tr>.*?</tr>", text, re.DOTALL) if f">{name}</th>" in row)
    return [words("<body>" + cell).strip() for cell in re.findall("<td.*?</td>", row, re.DOTALL)]


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes time."""
    monkeypatch.setattr(compare, "_figures", lambda *_: [])


def test_single_runs(tmp_path):
    first, second = save_run(tmp_path / "a"), save_run(tmp_path / "b", (2.0, 1.5, 0.9), num_train_epochs=2)
    text = compared(tmp_path, first, second)
    check_outline(text)
    assert re.findall(r'<section id="(\w+)">', text) == ["runs", "results", "settings", "curves", "training"]
    assert line(text, "Held-out loss, end") == ["0.5000", "0.9000+0.4000"]  # one run each: no interval
    assert line(text, "<code>num_train_epochs</code>") == ["1", "2"]
    assert "output_dir</code>" not in text
    assert "seed</code>" not in text  # the same in both
    titles = re.findall(r"<figcaption><strong>Instruction tuning: ([^<]*)", text)
    assert titles == ["training loss", "held-out loss", "Japanese bits per byte"]  # gradient norms are equal
    assert "0.500 (a) to 0.900 at the end" in text


def test_runs_that_differ_in_their_seeds_are_one_recipe(tmp_path, no_figures):
    losses = {"one": (0.50, 0.52, 0.54), "two": (0.40, 0.41, 0.42)}
    directories = [
        save_run(tmp_path / f"{name}-epoch-{seed}", (2.0, loss), seed=seed, num_train_epochs=epochs)
        for epochs, (name, ends) in enumerate(losses.items(), 1)
        for seed, loss in zip((42, 43, 44), ends, strict=True)
    ]
    text = compared(tmp_path, *directories)
    assert "Comparison of 2 recipes 6 runs; a recipe is" in words(text)
    assert re.findall(r"<b>([^<]*)</b> <small>3 runs", text) == ["one-epoch", "two-epoch"]
    assert line(text, "<code>seed</code>") == ["42, 43, 44"] * 2
    change, low, high = seed_difference(losses["one"], losses["two"])
    expected = f"0.41000.4000 to 0.4200{change:+.4f} ({low:+.4f} to {high:+.4f}) better".replace("-", "−")
    assert line(text, "Held-out loss, end") == ["0.52000.5000 to 0.5400", expected]


@pytest.mark.parametrize(
    ("names", "common"),
    [
        (["lora_2_epochs-42", "lora_2_epochs-43"], "lora_2_epochs"),
        (["seed-42-long", "seed-43-long"], "seed-long"),
        (["a/seed_1", "a/seed_2"], "a"),
        (["lora-1", "lora-2-again"], "lora"),
        (["x", "y"], "x"),
    ],
)
def test_a_recipe_is_called_what_its_runs_have_in_common(names, common):
    assert compare._common_name(names) == common


def test_the_model_is_a_setting_unless_its_training_is_shown(tmp_path):
    for name in ("a", "b"):
        save_run(tmp_path / name / "step5_pt_adapter", seed=name, stage="pt")
        save_run(tmp_path / name / "step6_sft_adapter", **{"model checksum": name})
    runs = [read_run(tmp_path / name, name) for name in ("a", "b")]
    assert len(group_by_recipe(runs)) == 1
    alone = [read_run(tmp_path / name / "step6_sft_adapter", name) for name in ("a", "b")]
    assert len(group_by_recipe(alone)) == 2


def test_accuracy_is_paired_by_question(tmp_path, no_figures):
    first = save_work_dir(tmp_path / "a", correct=30)
    better = save_work_dir(tmp_path / "b", correct=36, lora_rank=64)
    text = compared(tmp_path, first, better)
    grades = [[number < correct for number in range(NUM_QUESTIONS)] for correct in (30, 36)]

    def cell(change, low, high):
        return f"{100 * change:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})".replace("-", "−")

    assert line(text, "Japanese, 40 questions") == ["75%", f"90%{cell(*paired_difference(*grades))} better"]
    assert "Wall time1 min 1 s1 min 1 s" in words(text)
    shown = re.findall(r"<h3 lang=\"ja\">問(\d+)？", text)
    assert len(shown) == 6  # all on which they differ
    assert {*map(int, shown)} == {*range(30, 36)}
    check_outline(text)
    assert line(compared(tmp_path, better, first), "Japanese, 40 questions")[1].endswith("worse")
    others = save_work_dir(tmp_path / "c", correct=36, asked="別の問", lora_rank=64)
    text = compared(tmp_path, first, others)
    assert line(text, "Japanese, each run its own questions") == ["75%", f"90%{cell(*unpaired_difference(*grades))}"]
    assert "Where the answers differ" not in text


def test_a_training_that_all_runs_share_is_left_out(tmp_path, no_figures):
    directories = [save_work_dir(tmp_path / name, correct) for name, correct in (("a", 30), ("b", 31))]
    text = compared(tmp_path, *directories)
    assert "Instruction tuning is the same in all runs and left out below." in words(text)
    assert "Held-out loss" not in text


def test_held_out_losses_of_other_data_are_not_compared_in_silence(tmp_path, no_figures):
    directories = [save_run(tmp_path / name, (2.0, len(name)), val_size=len(name)) for name in ("a", "bb")]
    assert "held-out losses may not compare, since the runs differ in val_size" in compared(tmp_path, *directories)


def test_what_cannot_be_compared_is_said(tmp_path, no_figures):
    run, empty, fresh = save_run(tmp_path / "a"), tmp_path / "empty", save_run(tmp_path / "fresh")
    empty.mkdir()
    (fresh / "training_args.json").unlink()
    pretraining = save_run(tmp_path / "pt", stage="pt")
    for directories, message in (
        ([run], "needs two directories or more"),
        ([run, tmp_path / "a" / ".." / "a"], "is given twice"),
        ([run, tmp_path / "nowhere"], "nowhere does not exist"),
        ([run, empty], "empty holds no run"),
        ([run, fresh], "no training_args.json yet. Compare it once it has saved a checkpoint"),
        ([run, pretraining], "nothing in common .*instruction tuning; .*continued pretraining"),
    ):
        with pytest.raises(UserError, match=message):
            write_comparison(directories, tmp_path / "compare.html")
    (fresh / "checkpoint-2").mkdir()
    (fresh / "checkpoint-2" / "training_args.json").write_text(json.dumps(SETTINGS | {"num_train_epochs": 9}))
    assert line(compared(tmp_path, run, fresh), "<code>num_train_epochs</code>") == ["1", "9"]  # it is under way
    (run / "training_args.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*training_args\.json"):
        compared(tmp_path, run, fresh)


def test_overlay_draws_mean_and_range_at_shared_steps():
    def series(*points):
        return tuple(numpy.array(values) for values in zip(*points, strict=True))

    several = [series((1, 4.0), (2, 3.0), (3, 1.0)), series((1, 2.0), (3, 2.0))]
    figure = figures.overlay(
        [
            figures.Curve("several", "#0067A3", "-", several),
            figures.Curve("single", "#B84A00", "--", [series((1, 5.0), (9, 0.1))]),
        ],
        "loss",
    )
    mean, single = [[list(values) for values in drawn.get_data()] for drawn in figure.axes[0].lines]
    assert mean == [[1, 3], [3.0, 1.5]]
    assert single == [[1, 9], [5.0, 0.1]]
    (band,) = figure.axes[0].collections
    assert {(x, round(y, 6)) for x, y in band.get_paths()[0].vertices.tolist()} == {(1, 2), (3, 1), (3, 2), (1, 4)}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["several", "single"]
    assert figure.get_label() == "0.100 (single) to 1.50 at the end"
