"""What readers see: figures counted by hand, their intervals, and two evaluations compared."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import each, random_example, small_model
from naive_sampler import Token, hidden_states

from config import MethodConfig, SampleConfig
from data import read_split, write_dataset
from data.recipes.consistency import Recipe, count, ingredient_words, words
from masks import encode_prompt
from measure import readers
from measure.eval import EvalConfig, evaluate, lines
from measure.readers import compare, doubled, figures, fingerprint, interval, judged_by, overlap, table, value
from plumbing.settings import ROOT, command
from tags import Example, Round, Span, plain_text
from tokenizer import Tokenizer
from training.checkpoint import load_checkpoint, save_checkpoint


def example(text: str) -> Example:
    return Example("?", (Round(text),))


# ---------------------------------------------------------------- the numbers of one answer


DOUBLED = [
    ("Stir the the soup.", 1, 0, 4),
    ("The the soup", 1, 0, 3),
    ("the soup the soup", 0, 0, 4),
    ("stirring stirring stirring", 2, 0, 3),
    ("Serve. Serve hot", 0, 0, 3),  # a mark is between them
    ("Serve\nserve", 1, 0, 2),
    ("stirring..", 0, 1, 1),
    ("Stir. . Serve,, and eat)), now", 0, 3, 5),
    ("wait... and see", 0, 0, 3),
    ("wait.... and see", 0, 3, 3),  # no ellipsis
    ("well (hot), 2-3 minutes.", 0, 0, 4),
    ("1.5 1.5 g of low-fat low-fat milk", 2, 0, 7),
    ("add 5 5", 1, 0, 3),
    ("cafe cafés", 0, 0, 2),
    ("", 0, 0, 0),
]  # fmt: skip


def test_doubled_words_and_marks_are_those_counted_by_hand():
    for text, words_, marks, all_words in each(DOUBLED):
        found = doubled(example(""), text)
        counted = {"doubled words": words_, "doubled marks": marks, "doubled words and marks": words_ + marks}
        assert found == {name: [n, all_words] for name, n in counted.items()}


TEXTS = ["The otter eats crabs.", "", "otter", "x", "The otter eats fish and\ncrabs. It lives in rivers."]


def test_chrf_is_that_of_sacrebleu_over_all_answers():
    """Short texts lack n-grams of the higher orders, on either side."""
    for reference in each(["Here: fish.\na b\nEnd.", "ab", "The otter eats crabs and fish."]):
        metric = pytest.importorskip("sacrebleu.metrics").CHRF()
        for some in (TEXTS, *([text] for text in TEXTS)):
            sums = np.array([overlap(example(reference), text)["chrF"] for text in some]).sum(0)
            assert value("chrf", sums) == pytest.approx(metric.corpus_score(some, [[reference] * len(some)]).score)


def test_chrf_of_ab_against_abc_is_worked_out_by_hand():
    """Orders 1 and 2 are on both sides: precisions 1 and 1, recalls 2/3 and 1/2."""
    sums = np.array(overlap(example("a bc"), "ab")["chrF"])
    assert sums.tolist() == [2, 3, 2, 1, 2, 1, 0, 1, 0, *[0] * 9]
    precision, recall = 1, (2 / 3 + 1 / 2) / 2
    assert value("chrf", sums) == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with data without a checker but with consistency.py, and two random models."""
    folder = tmp_path_factory.mktemp("readers")
    examples = [random_example(seed, SimpleNamespace(units=lambda text: 1)) for seed in range(4)]
    write_dataset(folder, {"train": examples, "test": examples}, 256 + 74 + 40, 4)
    (folder / "consistency.py").write_text("def count(example, text):\n    return {'vowels': [3, 4]}\n")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    for name in ("ar", "planned"):
        model = small_model(tokenizer.vocab_size, seed=1, n_layer=2)
        save_checkpoint(folder / f"{name}.safetensors", model, tokenizer, {"method": vars(MethodConfig(name))})
    return folder


def test_perplexity_is_that_of_the_judge_token_by_token(files):
    """Of the text and its <eos> after the prompt; an empty answer is an <eos>."""
    path = files / "ar.safetensors"
    model, tokenizer, *_ = load_checkpoint(path)
    judge, all_nats = judged_by(str(path), "cpu", path.parent, tokenizer), []
    texts = ["It eats fish.\nAnd crabs.", "", "otter"]
    examples = [Example(prompt, (Round("fish"),)) for prompt in ("otter?", "x", "")]
    for one, text in zip(examples, texts):
        prompt, answer, nats = encode_prompt(one.prompt, tokenizer), [*tokenizer.encode(text), tokenizer.eos], []
        for i, token in enumerate(answer):
            hidden = hidden_states(model, [Token(t, 0) for t in prompt + answer[:i]], "sparse")[-1]
            nats.append(-torch.log_softmax(model.logits(hidden).double(), -1)[token].item())
        assert judge(one, text)["perplexity"] == [pytest.approx(sum(nats), rel=1e-4), len(answer)]
        all_nats += nats
    found = figures(examples, texts, [("perplexity", judge)])["perplexity"]
    assert found["value"] == pytest.approx(math.exp(sum(all_nats) / len(all_nats)), rel=1e-4)
    own = figures(examples, ["fish"] * 3, [("perplexity", judge)])["perplexity"]
    assert found["references"] == pytest.approx(own["value"]) != found["value"]


# ---------------------------------------------------------------- consistency of recipes

RECIPE = """100 g of lentils, 200 ml of milk, 2 boiled eggs, 1 tomato and 3 g of salt (fine).
Rinse 100 g of red lentils. Bring 500 ml of water to a boil and add milk (150 ml).
Add 20 g of butter and the tomatoes. Season with salt (3 g).
The dish has 250 kcal, 15 g of protein, 5.25 g of fat and 40 g of carbs. It weighs 300 g and takes 25 minutes.
Ready in 25 minutes with 250 kcal. It contains eggs. Tip: Add 10 g of sugar."""
LISTED, USED = "ingredients in the steps that are listed", "listed ingredients that are in the steps"
AMOUNTS = "amounts in the steps that agree with the list"
TIME, ENERGY = (f"{name} at the end equals that of the facts" for name in ("time", "energy"))


@pytest.fixture
def known(monkeypatch):
    """The words that name ingredients, whatever recipes are there."""
    names = {"lentil", "milk", "egg", "tomato", "salt", "butter", "sugar", "pepper"}
    monkeypatch.setitem(count.__globals__, "ingredient_words", lambda: names)


CHANGED = [
    ("", "", {}),
    ("and the tomatoes", "", {LISTED: [3, 4], USED: [3, 5]}),
    ("the tomatoes", "the eggs", {}),  # tomatoes are not used, but eggs are
    ("Rinse", "Grind pepper. Rinse", {LISTED: [4, 6]}),
    ("milk (150 ml)", "milk (200 ml)", {AMOUNTS: [3, 4]}),
    ("100 g of red lentils", "10 g of red lentils", {AMOUNTS: [1, 4]}),
    ("100 g of red lentils", "200 ml of red lentils", {AMOUNTS: [1, 4]}),  # the amount of something else
    ("100 g of red lentils", "100 ml of red lentils", {AMOUNTS: [1, 4]}),
    ("in 25 minutes", "in 20 minutes", {TIME: [0, 1]}),
    ("has 250 kcal", "has 25 kcal", {ENERGY: [0, 1]}),
    ("with 250 kcal", "", {ENERGY: [0, 1]}),
    ("takes 25 minutes", "takes minutes", {TIME: [0, 1]}),
    (RECIPE, "", {LISTED: [0, 0], USED: [0, 0], AMOUNTS: [0, 0], TIME: [0, 1], ENERGY: [0, 1]}),
    (RECIPE, "The dish has a Ready in.", {LISTED: [0, 0], USED: [0, 0], AMOUNTS: [0, 0], TIME: [0, 1], ENERGY: [0, 1]}),
]  # fmt: skip


def test_what_parts_of_a_recipe_agree_on_is_counted_as_by_hand(known):
    """Steps name lentils, milk, tomatoes, salt, which are listed, and butter, which is not; eggs are listed alone."""
    for old, new, changed in each(CHANGED):
        assert not old or old in RECIPE
        whole = {LISTED: [4, 5], USED: [4, 5], AMOUNTS: [2, 4], TIME: [1, 1], ENERGY: [1, 1]}
        assert count(example(""), RECIPE.replace(old, new) if old else RECIPE) == whole | changed


def test_a_list_is_read_with_whole_and_broken_amounts_and_without_what_is_in_parentheses():
    recipe = Recipe.read("0.25 tsp of vanilla extract, 150 g of yogurt (2-5%), 1 egg and 10 ml of oil (of olives).")
    assert recipe.listed == [(("0.25", "tsp"), {"vanilla", "extract"}), (("150", "g"), {"yogurt"}),
                             (("1", ""), {"egg"}), (("10", "ml"), {"oil"})]  # fmt: skip
    assert words("2 Tomatoes, berries and couscous with asparagus, eggs, peas; gas") == {
        "tomato", "berry", "couscous", "asparagus", "egg", "pea", "gas"}  # fmt: skip


def test_words_name_ingredients_if_nearly_all_training_recipes_that_have_them_in_their_steps_list_them(monkeypatch):
    """Of ten recipes or more: `oil` in 9 of 10 lists, `wrap` in 8 of 10, `kiwi` in 9 of 9; water never counts."""

    def recipe(n):
        listed = ["water", *["oil"] * (n < 9), *["wrap"] * (n < 8), *["kiwi"] * (n < 9)]
        steps = "Wrap it in oil and water" + " with kiwi." * (n < 9)
        return Example(
            str(n), (Round("", tuple(Span("s", text, 1) for text in ("1 g of " + ", 1 g of ".join(listed), steps))),)
        )

    monkeypatch.setitem(count.__globals__, "read_split", lambda path: [recipe(n) for n in range(10)])
    assert ingredient_words.__wrapped__() == {"oil"}


@pytest.mark.skipif(not (ROOT / "data/recipes/train.jsonl").exists(), reason="needs data/recipes: run its prepare.py")
def test_the_recipes_themselves_are_consistent():
    """The last line repeats the facts in each, and nearly all of the rest agrees; parts of two recipes agree less."""
    examples = read_split(ROOT / "data/recipes/test.jsonl")[:60]
    texts = [plain_text(e.rounds) for e in examples]
    mixed = ["\n".join([a.split("\n")[0], *b.split("\n")[1:-1], a.split("\n")[-1]])
             for a, b in zip(texts, texts[1:] + texts[:1])]  # fmt: skip
    counts = readers.counts_of(ROOT / "data/recipes")
    own, other = ({name: row["value"] for name, row in figures(examples, t, counts).items()} for t in (texts, mixed))
    assert own[TIME] == own[ENERGY] == 100 and own["chrF"] == pytest.approx(100) and own["doubled words and marks"] == 0
    assert all(own[name] > 85 for name in (LISTED, USED, AMOUNTS))
    assert all(other[name] < 60 for name in (LISTED, USED, AMOUNTS, TIME, ENERGY))


# ---------------------------------------------------------------- intervals


def test_an_interval_of_a_mean_is_that_of_the_normal_distribution():
    """400 answers, a third of which pass: standard error sqrt(p (1 - p) / n). Other draws give nearly the same."""
    passed = np.tile([1, 0, 0], 134)[:400]
    numbers = np.stack([passed, np.ones(400)], -1)
    p, error = passed.mean(), math.sqrt(passed.mean() * (1 - passed.mean()) / 400)
    for seed in range(3):
        low, high = interval(readers.draws("percent", numbers, seed))
        assert low == pytest.approx(100 * (p - 1.96 * error), abs=0.6)
        assert high == pytest.approx(100 * (p + 1.96 * error), abs=0.6)
    assert (readers.draws("percent", numbers) == readers.draws("percent", numbers)).all()


def test_draws_are_those_of_answers_with_all_their_numbers():
    """A naive bootstrap that draws whole answers, one at a time: here long answers are better."""
    rng = np.random.default_rng(1)
    length = rng.integers(10, 200, 50)
    numbers = np.stack([np.where(length > 100, 0, rng.integers(0, 5, 50)), length], -1)
    naive = []
    for _ in range(2000):
        some = [numbers[rng.integers(50)] for _ in range(50)]
        naive.append(1000 * sum(a for a, _ in some) / sum(b for _, b in some))
    wanted = np.percentile(naive, [2.5, 97.5])
    assert interval(readers.draws("per 1,000 words", numbers)) == pytest.approx(wanted, rel=0.06)


def cells_of(lines):
    """The cells of a Markdown table."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_answers_that_are_all_alike_have_an_interval_of_no_width_and_nothing_to_count_is_left_out():
    counts = [("percent", lambda example, text: {"a": [1, 4], "none": [0, 0], "some": [text == "y", text == "y"]})]
    found = figures([example("")] * 3, ["x", "y", "x"], counts)
    assert {name: (row["value"], row["low"], row["high"]) for name, row in found.items()} == {
        "a": (25, 25, 25), "some": (100, 100, 100)}  # fmt: skip
    assert found["some"]["references"] is None and json.dumps(found, allow_nan=False)
    assert cells_of(table(found))[2:] == [
        ["a, %", "25.00", "25.00 to 25.00", "25.00"],
        ["some, %", "100.00", "100.00 to 100.00", ""],
    ]


def test_a_paired_difference_is_far_surer_than_two_intervals():
    """Answers that differ much, and a second evaluation that is better by one in a hundred on each."""
    rng = np.random.default_rng(0)
    right = rng.integers(0, 90, 100)
    a, b = ({"x": {"kind": "percent", "value": n.mean(), "numbers": np.stack([n, np.full(100, 100)], -1).tolist()}}
            for n in (right, right + 1))  # fmt: skip
    low, high = interval(readers.draws("percent", np.array(a["x"]["numbers"])))
    assert high - low > 5
    assert [*compare(a, b)] == [("x, %", pytest.approx(1), pytest.approx(1), pytest.approx(1))]
    assert [*compare(a, a)] == [("x, %", 0, 0, 0)] and [*compare(a, {})] == []


# ---------------------------------------------------------------- evaluation


@pytest.fixture
def report(files):
    def report(name="ar", **more):
        options = {"data": str(files), "batch": 4, "draws": 1, "device": "cpu", **more}
        config = EvalConfig(str(files / f"{name}.safetensors"), **options)
        return evaluate(config, SampleConfig(max_tokens=24))

    return report


def test_an_evaluation_reports_all_that_readers_see_and_what_counts_for_its_data(report, files):
    found = report(judge=str(files / "ar.safetensors"))
    names = ["chrF", "doubled words", "doubled marks", "doubled words and marks", "vowels", "perplexity"]
    assert list(found["readers"]) == names and found["readers"]["vowels"]["value"] == 75
    assert all(len(row["numbers"]) == 4 for row in found["readers"].values())
    assert ["vowels, %", "75.00", "75.00 to 75.00", "75.00"] in cells_of(lines(found))


def test_data_with_a_checker_have_right_answers_instead(report, files, tmp_path):
    shutil.copytree(files, tmp_path / "data")
    (tmp_path / "data" / "families.py").write_text(
        "from types import SimpleNamespace as N\ndef check(example, text):\n    return N(exact=True, spans=[])\n"
    )
    found = report(data=str(tmp_path / "data"))
    assert found["readers"] == {} and not any("readers" in line for line in lines(found))


def test_two_saved_reports_are_compared_and_others_are_refused(report, tmp_path, monkeypatch, capsys):
    a, b = report("ar"), report("planned")
    judged = {"one judge": a | {"judge": "1"}, "two judges": a | {"judge": "2"}}
    for name, saved in {"a": a, "b": b, "short": report(limit=2), **judged}.items():
        (tmp_path / name).write_text(json.dumps(saved))

    def run(*names):
        monkeypatch.setattr(sys, "argv", ["measure/readers.py", *(str(tmp_path / name) for name in names)])
        command(readers.main)
        return capsys.readouterr().out.splitlines()

    difference = b["readers"]["chrF"]["value"] - a["readers"]["chrF"]["value"]
    assert any(row[:2] == ["chrF", f"{difference:+.2f}"] for row in cells_of(run("a", "b")))
    assert ["chrF", "+0.00", "+0.00 to +0.00"] in cells_of(run("a", "a"))
    for other, said in [("short", "different examples: take the same --data"), ("none", "No such file")]:  # fmt: skip
        with pytest.raises(SystemExit, match=rf"^readers.py: [^\n]*{other}[^\n]*{said}[^\n]*$"):
            run("a", other)
    assert run("one judge", "one judge") and run("a", "one judge")
    with pytest.raises(SystemExit, match="perplexities under different judges: take the same --judge"):
        run(*judged)


MADE_UP = {"kind": "percent", "value": 50.0, "numbers": [[1, 4], [3, 4]]}
BAD_ROWS = [None, [], {}, MADE_UP | {"kind": "share"}, MADE_UP | {"kind": None}, MADE_UP | {"value": "50"},
            MADE_UP | {"value": 40}, MADE_UP | {"value": None}, MADE_UP | {"value": float("nan")},
            *(MADE_UP | {"numbers": n} for n in (None, 7, [], [[1], [2]], [["1", "4"]], [[1, None]], [[1, 2], [3]],
                                                 [[10**400, 1]], [[float("nan"), 1]], [1, 2]))]  # fmt: skip
BAD_REPORTS = [None, [], 7, {}, {"readers": {}}, {"readers": None, "examples": "x"}, {"readers": [], "examples": "x"},
               {"readers": {}, "examples": None}, {"readers": {}, "examples": "x", "judge": 7}]  # fmt: skip


def test_what_is_no_report_is_named(tmp_path):
    path, whole = tmp_path / "a.json", lambda row: json.dumps({"readers": {"x": row}, "examples": "e"})
    path.write_text(whole(MADE_UP))
    assert readers.read(str(path))["readers"] == {"x": MADE_UP}
    for text in ["no JSON", "[" * 99999, "\udce9", *map(json.dumps, BAD_REPORTS), *map(whole, BAD_ROWS)]:
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=r"a.json: expected what `measure/eval.py --json` prints, but: "):
            readers.read(str(path))
    for other in ({"numbers": [[1, 4]]}, {"kind": "per 1,000 words"}):
        with pytest.raises(ValueError, match="x: counted otherwise in one report than in the other"):
            [*compare({"x": MADE_UP}, {"x": MADE_UP | other})]


def test_examples_are_the_same_if_prompts_and_references_are():
    one = Example("a", (Round("b"),), "family")
    assert fingerprint([one]) == fingerprint([Example("a", (Round("b"),))])
    assert len({fingerprint(e) for e in ([one], [Example("x", one.rounds)], [Example("a", (Round("c"),))], [])}) == 4
