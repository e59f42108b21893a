"""The picture of training losses: what is read from logs, and what is drawn."""

import sys

import numpy as np
import pytest
from conftest import each

from measure import plot
from measure.plot import draw, gather, named, read
from plumbing.settings import command
from training.bookkeeping import Log

FIGURE = pytest.importorskip("matplotlib.figure").Figure


def write(path, rows):
    """A log as a training writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = Log(path, 0)
    for row in rows:
        log.write(row)
    log.close()
    return str(path)


def run_of(plan, val=(), span=0.0):
    """Rows of a log every 50 updates; `val` at every second of them."""
    rows = [
        {"step": 50 * n, "tokens": 1000 * n, "seconds": 1.0, "plan": p, "span": span} for n, p in enumerate(plan, 1)
    ]
    for row, value in zip(rows[1::2], val):
        row |= {"val_plan": value, "val_span": 2 * value if span else 0.0}
    return rows


def test_columns_are_read_against_updates_tokens_or_epochs_and_losses_of_0_are_left_out(tmp_path):
    path = write(tmp_path / "log.csv", run_of([4.0, 3.0, 2.0], [2.5]))
    assert read(path) == {"plan": {50: 4, 100: 3, 150: 2}, "val_plan": {100: 2.5}}
    assert read(path, "tokens", 1e3)["plan"] == {1: 4, 2: 3, 3: 2} and read(path, "step", 25)["val_plan"] == {4: 2.5}
    assert read(write(tmp_path / "span.csv", run_of([1.0, 1.0], [2.0], span=3.0))) == {
        "plan": {50: 1, 100: 1}, "span": {50: 3, 100: 3}, "val_plan": {100: 2}, "val_span": {100: 4}}  # fmt: skip


def test_a_log_of_before_there_were_drafts_is_read(tmp_path):
    (tmp_path / "old.csv").write_text("step,tokens,seconds,plan,span,val_plan,val_span\n1,9,1,2.5,0,2,0\n")
    assert read(str(tmp_path / "old.csv")) == {"plan": {1: 2.5}, "val_plan": {1: 2}}


def test_what_is_no_log_is_named(fresh):
    for text, said in each([
    ("step,tokens\n", "no losses yet"), ("", "no losses yet"), ("step,plan\n1,much\n", "expected the log.csv"),
    ("plan,tokens\n1,2\n", "expected the log.csv"),
]):  # fmt: skip
        tmp_path = fresh()
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(ValueError, match=f"a.csv: {said}"):
            read(str(tmp_path / "a.csv"))


def test_a_label_is_what_is_before_the_equals_sign_or_the_folder_or_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [named(text) for text in ("AR, 3 seeds=runs/a/log.csv", "runs/a/log.csv", "checkpoints/joint.csv")] == [
        ("AR, 3 seeds", "runs/a/log.csv"), ("a", "runs/a/log.csv"), ("joint", "checkpoints/joint.csv")]  # fmt: skip
    (tmp_path / "lr=1").mkdir()
    (tmp_path / "lr=1" / "log.csv").touch()
    assert named("lr=1/log.csv") == ("lr=1", "lr=1/log.csv") and named("log.csv")[0] == tmp_path.name


def test_logs_of_one_label_are_seeds_at_the_places_that_all_of_them_have():
    curves = gather([("a", {"plan": {1: 4, 2: 3, 3: 2}}), ("b", {"plan": {1: 1}}), ("a", {"plan": {1: 2, 3: 6, 4: 9}})])
    x, values = curves["a"]["plan"]
    assert x.tolist() == [1, 3] and values.tolist() == [[4, 2], [2, 6]] and curves["b"]["plan"][1].tolist() == [[1]]
    with pytest.raises(ValueError, match="a: its 2 logs have no value of plan at the same place"):
        gather([("a", {"plan": {1: 4}}), ("a", {"plan": {2: 4}})])


def made_up(seeds, labels):
    """Curves that fall and rise again, those of all labels close to one another."""
    rng, x = np.random.default_rng(0), np.arange(1, 31)
    fall = 1 + 2 / x + (x > 10) * 0.002 * (x - 10) ** 2
    return {label: {name: (x, np.stack([fall * (1 + 0.01 * rng.standard_normal(30)) for _ in range(seeds)]))
                    for name in ("plan", "val_plan", "span", "val_span")} for label in labels}  # fmt: skip


@pytest.mark.parametrize(
    "seeds, labels", [(1, ["autoregressive"]), (1, ["a", "b", "c"]), (3, ["autoregressive", "planned"])]
)
def test_every_curve_has_its_name_at_its_end_and_the_best_validation_loss_its_value(seeds, labels):
    figure, curves = FIGURE(figsize=(11, 4.6), layout="tight"), made_up(seeds, labels)
    draw(curves, ["plan", "span"], "epochs", figure)
    figure.draw_without_rendering()
    for axis, loss in zip(figure.axes, ("plan", "span")):
        texts = [text for text in axis.texts if text.get_text()]
        ends, best = {}, {}
        for label in labels:
            x, values = curves[label][f"val_{loss}"]
            mean = values.mean(0)
            ends |= {label: (x[-1], mean[-1]), f"{label}, training": (30, curves[label][loss][1].mean(0)[-1])}
            best[label] = x[mean.argmin()], mean.min()
        found = [(text.get_text(), text.xy) for text in texts]
        assert sorted(found) == sorted([*ends.items(), *((f"{y:.3f} at {x}", (x, y)) for x, y in best.values())])
        filled = [
            line
            for line in axis.lines
            if line.get_markerfacecolor() == line.get_color() and line.get_marker() != "None"
        ]
        assert [tuple(line.get_xydata()[0]) for line in filled] == [*best.values()]
        bands = [collection.get_paths()[0].get_extents() for collection in axis.collections]
        assert len(bands) == (2 * len(labels) if seeds > 1 else 0)
        if bands:
            values = curves[labels[0]][loss][1]
            assert (bands[0].y0, bands[0].y1) == pytest.approx((values.min(), values.max()))
        boxes = [text.get_window_extent() for text in texts]
        assert not any(box.overlaps(other) for n, box in enumerate(boxes) for other in boxes[:n])
        assert all(axis.bbox.x0 < box.x0 and box.x1 < figure.bbox.x1 and axis.bbox.y0 < box.y0 for box in boxes)
        shapes = {(line.get_marker(), line.get_markersize()) for line in axis.lines if len(line.get_xdata()) > 1}
        assert len(shapes - {("None", 6.0)}) == len(labels), "validation curves that meet can be told apart"


@pytest.mark.parametrize("options, said", [
    ("--x epochs", "--updates_per_epoch 0: expected more than 0"),
    ("--losses causal", "--losses causal: the logs have only plan"),
])  # fmt: skip
def test_settings_that_cannot_be_drawn_are_named(tmp_path, monkeypatch, options, said):
    path = write(tmp_path / "log.csv", run_of([2.0, 1.0]))
    monkeypatch.setattr(sys, "argv", ["measure/plot.py", path, *options.split()])
    with pytest.raises(SystemExit, match=f"^plot.py: {said}"):
        command(plot.main)


def test_the_picture_is_a_png_with_a_panel_per_loss_that_a_log_has(tmp_path, monkeypatch, capsys):
    paths = [
        write(tmp_path / name / "log.csv", run_of([2.0, 1.5, 1.0, 0.8], [2.0, 1.9], span))
        for name, span in (("a", 0.0), ("b", 1.0))
    ]
    drawn = []
    monkeypatch.setattr(
        plot, "draw", lambda curves, losses, x_label, figure: drawn.append((list(curves), losses, x_label))
    )
    for options in ("", "--x tokens --losses span", "--x epochs --updates_per_epoch 25"):
        monkeypatch.setattr(sys, "argv", ["plot.py", *paths, "--png", str(tmp_path / "p.png"), *options.split()])
        command(plot.main)
    assert drawn == [(["a", "b"], ["plan", "span"], "updates"), (["a", "b"], ["span"], "million tokens"),
                     (["a", "b"], ["plan", "span"], "epochs")]  # fmt: skip
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG") and "wrote" in capsys.readouterr().out
