"""What the figures of answers mean: which lines and plans are right, and means over families."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import each

from measure import eval as evaluation
from measure.quality import COSTS, aligned, checker, distinct, row_of, score, wrong_lines
from plumbing.settings import ROOT
from tags import Example, Round, Span, plain_text

EXAMPLE = Example("?", (Round("Here:", (Span("food", "fish", 2), Span("play", "a b", 3))), Round("End.")), "facts")
TWICE = (Round("", (Span("food", "fish", 1),)), Round("", (Span("food", "crabs and frogs", 4),)))  # a topic repeated


def result_of(plan=(), text="", **more):
    """A made-up result: one round with a plan of (topic, length) pairs."""
    costs = dict.fromkeys(("plan_passes", "denoise_passes", "critical_path", "positions", "content_tokens", "pads"), 0)
    rounds = [{"text": "", "plan": [{"topic": t, "length": n} for t, n in plan], "spans": [""] * len(plan)}]
    return {"text": text, "rounds": rounds, "cut": False, "broken": False, **costs, **more}


def test_exact_and_spans_are_the_verdict_of_the_checker_of_the_data(tmp_path):
    right, check = plain_text(EXAMPLE.rounds), checker(ROOT / "data" / "tasks")
    wrong = right.replace("fish", "crab")
    for text, exact, spans in [(right, 1, 1), (wrong, 0, 3 / 4), ("", 0, 0), (right + "\nmore", 0, 1)]:
        row = row_of(EXAMPLE, result_of(text=text), check, None)
        assert (row["exact"], row["right_lines"]) == (exact, spans)
    assert checker(tmp_path) is None
    assert not {"exact", "right_lines"} & row_of(EXAMPLE, result_of(), None, ()).keys()


def test_the_checker_is_the_file_in_the_folder_of_the_data_and_no_other_of_that_name(tmp_path):
    """Even if the project has a data set of the same name."""
    for place, answer in (("here", "1"), ("there", "2")):
        folder = tmp_path / place / "tasks"
        folder.mkdir(parents=True)
        (folder / "families.py").write_text(f"def check(example, text):\n    return {answer}\n")
    assert [checker(tmp_path / place / "tasks")(None, "") for place in ("here", "there", "here")] == [1, 2, 1]
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "families.py").write_bytes((ROOT / "data" / "tasks" / "families.py").read_bytes())
    assert checker(tmp_path / "copy")(EXAMPLE, plain_text(EXAMPLE.rounds)).exact


def test_a_checker_that_cannot_be_used_is_named(fresh):
    for code in each(["check(", "import nothing_of_that_name", "families = 1"]):
        tmp_path = fresh()
        (tmp_path / "families.py").write_text(code)
        with pytest.raises(ValueError, match=r"families.py: expected Python code with check\(example, text\), but: "):
            checker(tmp_path)


def test_wrong_lines_are_counted_by_the_topic_of_their_span_or_as_text():
    """The lines of EXAMPLE: a text, food, play, a text; TWICE has a topic twice."""
    check, twice = checker(ROOT / "data" / "tasks"), Example("?", TWICE, "arithmetic")
    right = plain_text(EXAMPLE.rounds)
    texts = [right, right.replace("fish", "crab"), right.replace("End", "Fin") + "\nmore", "", "fish\nfrogs"]
    found = wrong_lines([*[EXAMPLE] * 4, twice], [{"text": text} for text in texts], check)
    assert found["facts"] == {"text": [1 + 2, 8], "spans": {"food": [1 + 1, 4], "play": [1, 4]}}
    assert found["arithmetic"] == {"text": [0, 0], "spans": {"food": [1, 2]}}
    said = "wrong lines of facts: 3 of 8 spans (food: 2, play: 1), 3 of 8 texts"
    assert [*evaluation.wrong(found)] == [said, "wrong lines of arithmetic: 1 of 2 spans (food: 1), 0 of 0 texts"]
    assert [*evaluation.wrong(wrong_lines([EXAMPLE], [{"text": right}], check))] == []


def test_a_line_of_a_text_of_several_counts_for_itself_whatever_topics_are_called():
    for topics in each(["end", "text"]):
        example = Example("?", (Round("a\nb", (Span(topics, "c", 1),)), Round("")), "facts")
        found = wrong_lines([example], [{"text": "a\nB\nC"}], checker(ROOT / "data" / "tasks"))
        assert found == {"facts": {"text": [1, 2], "spans": {topics: [1, 1]}}}


PLANS = [
    (EXAMPLE.rounds, [("food", 2), ("play", 3)], 1, (0, 0)),
    (EXAMPLE.rounds, [("food", 2), ("play", 7)], 0, (0, 4)),
    (EXAMPLE.rounds, [("play", 3), ("food", 2)], 0, ()),  # another order
    (EXAMPLE.rounds, [("food", 1), ("sleep", 9)], 0, (1,)),  # the length of an unknown topic is neither right nor wrong
    (EXAMPLE.rounds, [], 0, ()),
    (TWICE, [("food", 1), ("food", 4)], 1, (0, 0)),
    (TWICE, [("food", 4), ("food", 1)], 0, (3, 3)),
    (TWICE, [("food", 1)], 0, (0,)),
    ((), [], 1, ()),
]  # fmt: skip


def test_a_plan_is_right_if_all_is_and_length_errors_are_of_topics_in_their_place():
    for rounds, plan, right, off in each(PLANS):
        row = row_of(EXAMPLE, result_of(plan), None, rounds)
        assert (row["plan_right"], row["n_spans"]) == (right, len(plan))
        assert (row["topics_right"], row["length_error"]) == (len(off), sum(off))
        without = row_of(EXAMPLE, result_of(plan), None, None)  # methods that write no plan
        assert not {"plan_right", "length_error", "n_spans"} & without.keys()


def test_the_error_of_lengths_is_a_mean_over_topics_so_that_no_answer_without_one_makes_it_smaller():
    results = [result_of([("food", 8), ("play", 3)]), result_of([("sleep", 60)]), result_of([])]
    scores = score([EXAMPLE] * 3, results, None, [EXAMPLE.rounds] * 3)
    assert scores["all"]["length_error"] == 3  # 6 and 0 units


def test_broken_and_cut_answers_are_not_valid_and_passes_are_those_of_both_stages():
    for broken, cut, valid in each([(False, False, 1), (True, False, 0), (False, True, 0)]):
        costs = {"plan_passes": 5, "denoise_passes": 7, "draft_passes": 11}
        row = row_of(EXAMPLE, result_of(broken=broken, cut=cut, **costs), None, None)
        assert (row["valid"], row["passes"], row["draft_passes"]) == (valid, 12, 11)
        assert row_of(EXAMPLE, result_of(), None, None)["draft_passes"] == 0


def test_scores_are_means_over_each_family_and_over_all_which_comes_last():
    """A family called "all" is one of them, and an example without a family counts under ""."""
    examples = [Example("?", (), family) for family in ("b", "", "all", "b", "a")]
    results = [result_of(text=str(n), plan_passes=n, broken=n == 1) for n in (1, 2, 3, 4, 10)]
    scores = score(examples, results, lambda e, text: SimpleNamespace(exact=text == "4", spans=[]), [TWICE] + [()] * 4)
    assert list(scores)[-1] == "all"
    assert {name: row["n"] for name, row in scores.items()} == {"a": 1, "b": 2, "": 1, "(all)": 1, "all": 5}
    assert {name: row["passes"] for name, row in scores.items()} == {"a": 10, "b": 2.5, "": 2, "(all)": 3, "all": 4}
    assert [scores["b"][name] for name in ("valid", "exact")] == [0.5, 0.5]
    assert [scores["all"][name] for name in ("valid", "exact", "plan_right")] == [0.8, 0.2, 0.8]


def test_a_family_of_any_name_is_one_row_of_a_table_and_one_line(tmp_path):
    families = ["a|b", "a/b", "a\nb", "all", "\x1b[2J"]
    examples, results = [replace(EXAMPLE, family=name) for name in families], [result_of(text="", seconds=1)] * 5
    scores = score(examples, results, None, [None] * 5)
    rows = ["a/b 1", "a/b 1", "a b 1", "(all) 1", "?[2J 1", "all 5"]
    found, costs = "\n".join(evaluation.table(scores)).rstrip("\n").split("\n\n")
    assert [" ".join(line.replace("|", "").split()[:-1]) for line in found.split("\n")[2:]] == rows
    for lines in (found.split("\n"), costs.split("\n")):
        assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1
    check = checker(ROOT / "data" / "tasks")
    said = [*evaluation.wrong(wrong_lines(examples, [{"text": ""}] * 5, check))]
    names = [line.split(":")[0].removeprefix("wrong lines of ") for line in said]
    assert names == ["a/b", "a/b", "a b", "(all)", "?[2J"]


def test_a_table_fits_a_terminal_and_loses_no_word():
    """Its lines are equally wide; a name that has no room goes on in the next row."""
    for name in each(["a", "a family whose name is so long that it has no room beside its figures", "x" * 99]):
        lines = [*aligned(["family", "passes", "positions"], [[name, "1.0", "12345.6"], ["all", "100.0", "9.0"]])]
        assert {len(line) for line in lines} == {len(lines[0])} and len(lines[0]) <= 80
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        assert cells[2][1:] == ["1.0", "12345.6"] and cells[-1] == ["all", "100.0", "9.0"]
        assert "".join(first for first, *_ in cells[2:-1]).replace(" ", "") == name.replace(" ", "")


def test_a_report_fits_a_terminal(monkeypatch, capsys):
    """With every cost there is, in numbers of several digits, and names of any length."""
    example = replace(EXAMPLE, family="a family with a name of many words " * 3)
    costs = dict.fromkeys(COSTS, 10000)
    results = [result_of([("food", 2), ("play", 3)], seconds=1234.5, slots=10000, looping=True) | costs] * 2
    check = checker(ROOT / "data" / "tasks")
    scores = score([example] * 2, results, check, [EXAMPLE.rounds] * 2)
    report = {"scores": scores, "wrong_lines": wrong_lines([example] * 2, results, check), "shown": [], "readers": {},
              "plan_nll": 10.0, "span_elbo": 10.0, "span_elbo_error": 0.1, "spans_exact": False, "pad_share": 0.1,
              "spans_per_answer": {n: 0.1 for n in range(20)}, "distinct_1": 0.1, "distinct_3": 0.1, "batch": 128,
              "seconds_p50": 1234.5, "seconds_p95": 1234.5, "peak_memory_mb": 100000.0}  # fmt: skip
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: report)
    monkeypatch.setattr("sys.argv", ["eval.py"])
    evaluation.main()
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert all(f" {name} |" in out for name in ("exact", "same plan", "draft", "critical path", "positions"))
    assert "drafted: 10000.0, accepted: 10000.0" in out and "answers that repeat themselves: 100.0%" in out


def test_distinct_is_the_mean_share_of_different_n_grams_of_an_answer():
    results = [{"text": text} for text in ("a b a b a", "a b c", "", "a")]
    assert distinct(results, 1) == pytest.approx((2 / 5 + 1 + 1) / 3)
    assert distinct(results, 3) == pytest.approx((2 / 3 + 1) / 2)  # aba bab aba; the others have none
    assert distinct(results[2:], 3) == 0
