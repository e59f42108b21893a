"""The page on the paper: every claim is written and drawn from reports alone, and its verdict follows the figures."""

import re
import sys

import pytest
from conftest import each

from data import write_dataset
from data.tasks.prepare import make_splits
from data.towns.families import FAMILIES, TRAIN_SHARES
from measure import beyond, claims, drawings, models, paper
from measure.claims import Found
from measure.drawings import PICTURES
from measure.models import EPOCHS, MODELS, WARM_UP
from measure.paper import CLAIMS, page

LAST = f"planned {EPOCHS[-1]} epochs"
VERDICT = r"\*\*(agrees|differs|cannot|no claim of the paper)\*\*"


@pytest.fixture(autouse=True)
def towns(tmp_path_factory, monkeypatch):
    """Every claim reads a small data set of towns."""
    folder = tmp_path_factory.mktemp("towns")
    write_dataset(folder, make_splits({"train": 30, "val": 3, "test": 15}, 0, FAMILIES, TRAIN_SHARES), 400, 5)
    for module in (claims, beyond, models, paper):
        monkeypatch.setattr(module, "TOWNS", str(folder))
    return folder


class Made:
    """A study with made-up figures: planned diffusion is as good as any, in fewer passes.

    `change`(name, options) -> figures of the reports of a model that are others, and perhaps `families` they are of.
    """

    device = "cpu"

    def __init__(self, change=lambda name, sample: {}, **probed):
        self.change, self.probed, self.used = change, probed, {}

    def report(self, name, seed, sample="", draft=""):
        assert name in MODELS and (draft in MODELS or not draft), "a model that is trained"
        ratio = float(re.search(r"steps_ratio (\S+)|$", sample)[1] or 0.2)
        n = 100 if name.startswith("ar") else 4
        row = {"exact": 0.8, "plan_passes": n, "denoise_passes": 20 * ratio, "passes": n + 20 * ratio, "positions": 150,
               "critical_path": n + 20 * ratio, "content_tokens": 90, "draft_passes": 7, "valid": 1, "plan_right": 1,
               "length_error": 0.1, "length_bias": 0.05, "chrF": 50}  # fmt: skip
        other = self.change(name, sample)
        changed = dict.fromkeys(other.get("families", ("towns", "sums", "coupled", "all")), row | other)
        scores = {family: changed.get(family, row) for family in ("towns", "sums", "coupled", "all")}
        scores = {
            family: row | {"exact": row["exact"] + 0.01 * seed * (row["exact"] > 0)} for family, row in scores.items()
        }
        return {"scores": scores, "readers": {"chrF": {"value": (row | other)["chrF"] + 0.1 * seed}}, "pad_share": 0.2,
                "spans_per_answer": {"3": 1.0}}  # fmt: skip

    def probe(self, what, parts, measure):
        kind = what.split(" seed")[0]
        if kind == "milliseconds":
            fast = {way: 0.5 if way.startswith("autoregression") else 0.1 for way in parts[1]}
            made = {"1": fast, "8": fast}
        elif kind == "plans":
            made = {"its own plan": 0.9, "the reference plan": 0.95, "lengths halved": 0.1}
        else:
            made = self.report("skeleton", 0)
        self.used[what] = {"what": what} | made | self.probed.get(kind, {})
        return self.used[what]

    def limit_of(self, data):
        return 0

    def key(self, name, seed):
        return name


def claimed(name, *args, seeds=(0, 1, 2), **probed):
    return CLAIMS[name](Found(Made(*args, **probed), [*seeds]))


# ---------------------------------------------------------------- the page


def test_every_claim_is_a_row_of_the_table_that_leads_to_its_part():
    found = {name: claimed(name) for name in CLAIMS}
    text = page(found, [0, 1])
    table, *parts = text.split("\n## ")
    anchors = re.findall(r"^\| \[.+\]\(#(\S+)\) \|", table, re.MULTILINE)
    assert anchors == [*CLAIMS] == [re.match(r'<a id="(\w+)">', part)[1] for part in parts] and "seeds 0, 1." in table
    for claim, part in each(zip(found.values(), parts, strict=True)):
        assert re.match(VERDICT, claim.verdict)
        assert all(f"]({picture})" in part for picture in claim.pictures)
        widths = {line.count(" |") for line in part.split("\n") if line.startswith("|")}
        assert len(widths) == 1, "each row of a table has as many cells as its head"
        heads = next(line for line in part.split("\n") if line.startswith("|")).split("|")[2:-1]
        named = [head for head in heads if head.strip() != "bound"]  # of the column before it
        assert len({*named}) == len(named)


def test_all_pictures_belong_to_one_claim_and_are_drawn_from_the_same_figures(tmp_path, capsys, monkeypatch):
    study, asked = Made(), set()
    report = study.report
    study.report = lambda *args: asked.add(args) or report(*args)
    found = Found(study, [0, 1, 2])
    names = [picture for make in CLAIMS.values() for picture in make(found).pictures]
    of_the_page = {*asked}
    assert {*MODELS} - {name for name, *_ in asked} == {WARM_UP}, "nothing is trained for no claim"
    assert sorted(names) == sorted(PICTURES)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        paper.draw(found, names, tmp_path)
        assert "no pictures: pip install" in capsys.readouterr().out and not [*tmp_path.iterdir()]
    pytest.importorskip("matplotlib")
    paper.draw(found, names, tmp_path)
    assert asked == of_the_page, "nothing is measured for a picture alone"
    assert {path.name for path in tmp_path.iterdir()} == {*names}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_milliseconds_are_drawn_beside_each_path(monkeypatch):
    """By the names that `times` gives them."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    found, figure = Found(Made(), [0]), Figure()
    CLAIMS["times"](found)
    drawings.path(found, figure)
    assert [len(axis.patches) for axis in figure.axes] == [2 * len(drawings.PATH), len(drawings.PATH)]


# ---------------------------------------------------------------- verdicts


def of(names, **figures):
    """A change of the models of these names alone."""
    return lambda name, sample: figures if name in names else {}


def by_scale(best):
    return lambda name, sample: {"exact": v, "chrF": 50 * v} if (v := {f"length_scale {best}": 0.9}.get(
        sample.split("--")[-1], 0.6 if "length_scale" in sample else 0)) else {}  # fmt: skip


def cells(name, sample):  # as an autoregressive model whose passes are few, or a planned one whose are many
    return {"critical_path": 200} if name == "planned" else {}


WORSE, GAIN = {"exact": 0.3}, {LAST, f"diffusion {EPOCHS[-1]} epochs"}
VERDICTS = [
    ("topics", of({"numbered topics"}, **WORSE), "agrees"), ("topics", of(()), "differs"),
    ("topics", of({"planned"}, **WORSE), "differs"), ("topics", of({"numbered topics"}, exact=0.79), "differs"),  # seeds overlap
    ("topics", of({"topic not repeated"}, **WORSE), "differs"), ("topics", of(MODELS, exact=0), "cannot"),
    ("sync", of({"untagged"}, **WORSE), "agrees"), ("sync", of({"one round"}, families=["sums"], **WORSE), "agrees"),
    ("sync", of({"untagged"}, families=["towns"], **WORSE), "cannot"), ("sync", of(MODELS, exact=0), "cannot"),
    ("sync", of({"untagged", "one round"}, exact=0.9), "differs"),
    ("training", of(GAIN, chrF=60), "agrees"), ("training", of({LAST}, chrF=60), "differs"), ("training", of(()), "differs"),
    ("training", of({f"{m} {EPOCHS[-1]} epochs" for m in ("ar", "planned", "diffusion")}, chrF=60), "differs"),
    ("training", of(GAIN, chrF=40), "differs"),
    ("training", lambda name, sample: of(GAIN, chrF=40)(name, sample) or of({f"ar {EPOCHS[-1]} epochs"}, chrF=20)(name, sample),
     "differs"),
    ("lengths", by_scale("1"), "agrees"), ("lengths", by_scale("1.5"), "differs"), ("lengths", by_scale("0.75"), "differs"),
    ("lengths", lambda name, sample: by_scale("1.5" if name == LAST else "1")(name, sample), "differs"),
    ("lengths", lambda name, sample: by_scale("1.5" if name == "planned" else "1")(name, sample), "differs"),
    ("frontier", of(()), "agrees"), ("frontier", cells, "differs"), ("frontier", of({"planned"}, **WORSE), "differs"),
    ("frontier", of(MODELS, exact=0), "cannot"),
    ("times", of(()), "agrees"), ("times", of({"planned"}, critical_path=90), "differs"),
    ("knobs", lambda name, sample: {"chrF": 60} if sample == "--steps_ratio 1" else {}, "agrees"),
    ("knobs", of(()), "differs"), ("knobs", of({LAST}, denoise_passes=5), "differs"),
    ("plans", of(()), "agrees"), ("plans", of({LAST}, valid=0.5), "differs"), ("plans", of({"planned"}, valid=0.5), "differs"),
]  # fmt: skip


def test_verdicts_follow_the_figures():
    for name, change, verdict in each(VERDICTS):
        assert re.match(VERDICT, claimed(name, change).verdict)[1] == verdict


def test_what_is_worse_in_all_seeds_is_named():
    claim = claimed("parts", of({"extra pads", "no warm-up"}, **WORSE))
    assert "worse in all seeds: 0 to 10 random `[PAD]`, no autoregressive warm-up, equal updates (" in claim.here
    assert "worse in all seeds: lengths halved" in claimed("given").verdict


def test_rivals_are_not_compared_at_a_setting_that_ruins_the_answers():
    ruined = lambda name, sample: {"exact": 0.1} if name == "planned" and "0.1" in sample else {}
    assert "planned 6.0 (81%)" in claimed("rivals").here and "planned 8.0 (81%)" in claimed("rivals", ruined).here


def test_agreement_above_what_spans_drawn_apart_reach_is_said():
    def verdict(free: float, apart: float, named: float) -> str:
        shares = {"coupled ar": free, "coupled named": named}
        change = lambda name, sample: {"exact": shares.get(name, apart)} if "temperature" in sample else {}
        return claimed("independence", change).verdict

    assert "measured above it" in verdict(0.9, 0.8, 0.9)
    assert "keep to the bound, a plan that names the shared choice lifts it" in verdict(0.9, 0.05, 0.9)
    assert "keep to the bound, a plan that names the shared choice does not lift it" in verdict(0.9, 0.05, 0.1)
    assert "cannot be told" in verdict(0.1, 0.05, 0.1)


def test_a_figure_shows_its_seeds_where_they_differ():
    assert claims.spread([1.0, 2.0, 3.04]) == "2.0 (1.0 to 3.0)" and claims.spread([2.01, 2.04]) == "2.0"
    assert claims.always([2, 3], [1, 1.9]) and not claims.always([2, 3], [1, 2])


def test_the_preset_of_minutes_trains_a_twentieth_and_writes_beside_its_trainings(monkeypatch, tmp_path):
    steps = lambda model: int(re.search(r"--steps (\d+)", model.train)[1])
    made, study = [], Made()
    monkeypatch.setattr(paper, "prepare", lambda folder: None)
    monkeypatch.setattr(paper.variants, "write_variant", lambda *args: None)
    monkeypatch.setattr(paper, "Study", lambda *args: made.append(args) or study)
    monkeypatch.setattr(sys, "argv", ["paper.py", "--preset", "minutes", "--out", str(tmp_path)])
    paper.main()
    ((trained, out, kept, limit, _),) = made
    assert {name: steps(model) for name, model in trained.items()} == {n: steps(m) // 20 for n, m in MODELS.items()}
    assert out == tmp_path and kept == tmp_path / "paper.json" and max(limit.values()) < 10
    assert "Topics matter" in (tmp_path / "paper.md").read_text()
