"""What frontier.py shows: figures of seeds, the table, and the picture."""

import random
import sys

import numpy as np
import pytest
from test_frontier import report_of

from measure.frontier import GROUPS
from measure.report import draw, plot, quality, table

ROWS = [{"name": name, "sample": sample, "seeds": [report_of() | {"seconds_batch_8": 3}]}
        for name, sample in (("ar", ""), ("planned", "--steps_ratio 1"), ("planned", "--threshold 0.7"))]  # fmt: skip


def test_quality_is_the_mean_of_three_families_or_chrf():
    report, shares = report_of(), {"facts": 0.3, "lookups": 0.6, "transforms": 0.9, "stories": 0, "all": 0}
    report["scores"] = {name: {"exact": exact} for name, exact in shares.items()}
    assert quality(report) == pytest.approx(0.6)
    assert quality(report | {"readers": {"chrF": {"value": 43.2}}}) == pytest.approx(0.432)


def test_the_table_has_a_row_per_method_and_setting_and_the_mean_and_range_of_seeds_that_differ():
    rows = [row | {"seeds": [report_of(exact, seconds) | {"seconds_batch_8": 0.5} for exact, seconds in seeds]}
            for row, seeds in zip(ROWS, [[(0.5, 1)], [(0.5, 1), (0.9, 2)], [(1, 0.0012), (1, 0.0009), (1, 0.0012)]])]  # fmt: skip
    head, rule, *cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table(rows))
    assert len(head) == len(rule) and {len(c) for c in cells} == {len(head)}
    found = [[c[head.index(name)] for name in ("method", "setting", "quality", "stories", "ms (p95)")] for c in cells]
    assert found == [["ar", "", "50.0%", "50%", "2000"],
                     ["planned", "steps_ratio 1", "70.0% (50.0% to 90.0%)", "70% (50% to 90%)", "3000 (2000 to 4000)"],
                     ["planned", "threshold 0.7", "100.0%", "100%", "2"]]  # fmt: skip
    assert {c[head.index("tokens per pass")] for c in cells} == {"5.00"}
    assert cells[0][head.index("ms (p50) at batch 8")] == "500" and cells[0][head.index("positions")] == "50.0"


def test_the_table_of_free_text_has_what_readers_see_and_no_families():
    readers = {"chrF": {"value": 43.21}, "doubled words": {"value": 3.456}, "perplexity": {"value": 7.123}}
    rows = [row | {"seeds": [row["seeds"][0] | {"readers": readers}]} for row in ROWS]
    head, _, first, *_ = table(rows)
    assert "stories" not in head and "| chrF | doubled words | perplexity | distinct_1 | distinct_3 | passes |" in head
    assert "| 43.2% | 3.46 | 7.12 | 0.25 | 0.75 | 4.0 |" in first


# ---------------------------------------------------------------- the picture


def test_the_picture_is_a_png_if_there_is_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plot(ROWS, tmp_path / "none.png")
    monkeypatch.undo()
    assert "pip install matplotlib" in capsys.readouterr().out and not any(tmp_path.iterdir())
    pytest.importorskip("matplotlib")
    plot(ROWS, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def crowded():
    """Rows of every method and setting, most of them equally good and nearly equally fast, some the same."""
    rng = random.Random(0)
    for name, entry in GROUPS["methods"].items():
        for sample in entry.sample:
            row = report_of(rng.choice((1, 1, 0.5, 0)), rng.choice((0.1, 0.11, 2)))
            row["scores"] = {family: whole | {"passes": rng.choice((10, 11, 12, 140))}
                             for family, whole in row["scores"].items()}  # fmt: skip
            yield {"name": name, "sample": sample, "seeds": [row | {"seconds_batch_8": 1}]}


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], list(crowded())], ids=["two methods", "one point", "crowded"])
def test_every_line_of_the_picture_has_its_name_at_its_end_and_nothing_hides_anything(rows):
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(13, 5), layout="tight")
    draw(rows, figure)
    figure.draw_without_rendering()
    names = list(dict.fromkeys(row["name"] for row in rows))
    for axis in figure.axes:
        labels, lines = [text for text in axis.texts if text.get_text()], axis.lines
        assert [label.get_text() for label in labels] == names and len(lines) == len(names)
        for label, line in zip(labels, lines):
            assert label.xy == (max(line.get_xdata()), line.get_ydata()[-1]) and label.get_color() == line.get_color()
        boxes = [label.get_window_extent() for label in labels]
        dots = [axis.transData.transform(point) for line in lines for point in line.get_xydata()]
        for n, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:n]) and not any(box.contains(*dot) for dot in dots)
            assert axis.bbox.x0 < box.x0 and box.x1 < axis.bbox.x1 and axis.bbox.y0 < box.y0 and box.y1 < axis.bbox.y1
        assert all(line.get_markerfacecolor() == "none" for line in lines)
        assert len({(line.get_marker(), line.get_markersize()) for line in lines}) == len(lines)


def test_seeds_are_a_point_at_their_mean_with_bars_to_the_lowest_and_the_highest():
    seeds = [report_of(exact, seconds) | {"seconds_batch_8": 1} for exact, seconds in ((0.2, 1), (0.9, 2), (0.4, 6))]
    figure = pytest.importorskip("matplotlib.figure").Figure(layout="tight")
    draw([{"name": "ar", "sample": "", "seeds": seeds}, ROWS[1]], figure)
    by_passes, by_time = figure.axes
    for axis, low, middle, high in ((by_passes, 4, 4, 4), (by_time, 1000, 3000, 6000)):
        assert axis.lines[0].get_xydata() == pytest.approx(np.array([[middle, 0.5]]))
        across, upwards, *_ = (bars.get_segments()[0] for bars in axis.collections)
        assert across == pytest.approx(np.array([[low, 0.5], [high, 0.5]]))
        assert upwards == pytest.approx(np.array([[middle, 0.2], [middle, 0.9]]))
