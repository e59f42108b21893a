"""Evaluation: what the figures of a report mean, and that an interrupted one goes on where it was."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import each, random_example, small_model

from config import MethodConfig, SampleConfig
from data import read_split, write_dataset
from measure import eval as evaluation
from measure.eval import Answers, EvalConfig, answer_all, evaluate, lines
from measure.quality import checker, distinct, row_of, score, wrong_lines
from plumbing.settings import ROOT, command
from sample import Sampler
from tags import Example, Round, Span, format_answer, plain_text
from tokenizer import Tokenizer
from training.checkpoint import load_checkpoint, save_checkpoint

SHORT, HOT = SampleConfig(max_tokens=24), SampleConfig(max_tokens=24, temperature=1.0)
TIMED = ("seconds_p50", "seconds_p95", "peak_memory_mb")
N = 4  # test examples
EXAMPLE = Example("?", (Round("Here:", (Span("food", "fish", 2), Span("play", "a b", 3))), Round("End.")), "facts")
TWICE = (Round("", (Span("food", "fish", 1),)), Round("", (Span("food", "crabs and frogs", 4),)))  # a topic repeated


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a data set without a checker, and checkpoints of random models."""
    folder = tmp_path_factory.mktemp("eval")
    examples = [random_example(seed, SimpleNamespace(units=lambda text: 1)) for seed in range(N)]
    write_dataset(folder, {"train": examples, "test": examples}, 256 + 74 + 40, 4)
    tokenizer, ar = Tokenizer.load(folder / "tokenizer.json"), {"method": vars(MethodConfig("ar"))}
    made = {"planned": ({"method": vars(MethodConfig())}, 2), "ar": (ar, 2), "small": (ar, 1), "old": ({}, 1),
            "block": ({"method": vars(MethodConfig("block", block=6))}, 1)}  # fmt: skip
    for name, (info, layers) in made.items():
        model = small_model(tokenizer.vocab_size, seed=1, n_layer=layers)
        model.embedding.weight.data[[tokenizer.topic, tokenizer.topic_end, tokenizer.pad]] *= 5  # so that it plans
        save_checkpoint(folder / f"{name}.safetensors", model, tokenizer, info)
    return folder


@pytest.fixture
def config(files):
    def make(name="planned", **more):
        options = {"batch": 2, "draws": 2, "device": "cpu", **more}
        return EvalConfig(str(files / f"{name}.safetensors"), str(files), **options)

    return make


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


PERFECT = [
    (MethodConfig(), [("food", 2), ("play", 3)]),
    (MethodConfig(topics="numbers"), [("topic 1", 2), ("topic 2", 3)]),
    (MethodConfig(rounds="one"), [("food", 2), ("play", 3), ("end", 2)]),
    (MethodConfig("parallel-ar", rounds="one", topics="numbers"), [("topic 1", 2), ("topic 2", 3), ("topic 3", 2)]),
    (MethodConfig("ar"), None),
    (MethodConfig("diffusion", block=24), None),
]  # fmt: skip


def test_a_perfect_plan_is_the_one_that_the_method_writes(files, fresh, monkeypatch):
    for method, plan in each(PERFECT):
        tmp_path = fresh()

        def answered(plan):
            result = result_of(plan or [], seconds=1, slots=1)
            monkeypatch.setattr(evaluation, "answer_all", lambda *_: [result])
            return evaluate(EvalConfig(str(tmp_path / "m"), str(tmp_path), draws=1, device="cpu"), SHORT)["scores"][
                "all"
            ]

        row = {"prompt": EXAMPLE.prompt, "answer": format_answer(EXAMPLE.rounds)}
        (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
        model, tokenizer, *_ = load_checkpoint(files / "small.safetensors")
        save_checkpoint(tmp_path / "m", model, tokenizer, {"method": vars(method)})
        if plan is None:
            assert not {"plan_right", "length_error"} & answered(plan).keys()
        else:
            found = [answered(p) for p in (plan, [(topic, length + 1) for topic, length in plan])]
            assert [(row["plan_right"], row["length_error"]) for row in found] == [(1, 0), (0, 1)]


def test_broken_and_cut_answers_are_not_valid_and_passes_are_those_of_both_stages():
    for broken, cut, valid in each([(False, False, 1), (True, False, 0), (False, True, 0)]):
        costs = {"plan_passes": 5, "denoise_passes": 7, "draft_passes": 11}
        row = row_of(EXAMPLE, result_of(broken=broken, cut=cut, **costs), None, None)
        assert (row["valid"], row["passes"], row["draft_passes"]) == (valid, 12, 11)
        assert row_of(EXAMPLE, result_of(), None, None)["draft_passes"] == 0


def test_scores_are_means_over_each_family_and_over_all_which_comes_last():
    """A family called "all" is no second one, and an example without a family counts under ""."""
    examples = [Example("?", (), family) for family in ("b", "", "all", "b", "a")]
    results = [result_of(text=str(n), plan_passes=n, broken=n == 1) for n in (1, 2, 3, 4, 10)]
    scores = score(examples, results, lambda e, text: SimpleNamespace(exact=text == "4", spans=[]), [TWICE] + [()] * 4)
    assert list(scores)[-1] == "all"
    assert {name: row["n"] for name, row in scores.items()} == {"a": 1, "b": 2, "": 1, "all": 5}
    assert {name: row["passes"] for name, row in scores.items()} == {"a": 10, "b": 2.5, "": 2, "all": 4}
    assert [scores["b"][name] for name in ("valid", "exact")] == [0.5, 0.5]
    assert [scores["all"][name] for name in ("valid", "exact", "plan_right")] == [0.8, 0.2, 0.8]


def test_distinct_is_the_mean_share_of_different_n_grams_of_an_answer():
    results = [{"text": text} for text in ("a b a b a", "a b c", "", "a")]
    assert distinct(results, 1) == pytest.approx((2 / 5 + 1 + 1) / 3)
    assert distinct(results, 3) == pytest.approx((2 / 3 + 1) / 2)  # aba bab aba; the others have none
    assert distinct(results[2:], 3) == 0


def test_above_temperature_0_each_prompt_has_a_seed_of_its_own_whatever_the_batch(config):
    sampler, examples = Sampler.load(config().checkpoint, HOT), [read_split(Path(config().data) / "test.jsonl")[0]] * 4
    texts = lambda batch: [r["text"] for r in answer_all(sampler, examples, batch, Answers("", {}, 4))]
    assert texts(1) == texts(2) == texts(4) and len(set(texts(1))) == 4


def test_an_interrupted_evaluation_computes_only_what_is_missing_and_reports_the_same(config, monkeypatch, tmp_path):
    """Ctrl-C while the second batch was being written. All of that batch is lost."""
    whole, path, asked, answer = evaluate(config(), HOT), tmp_path / "new" / "answers.jsonl", [], Sampler.answer
    prompts = [e.prompt for e in read_split(Path(config().data) / "test.jsonl")]

    def counted(sampler, wanted, watch=None):
        asked.append(wanted)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answer(sampler, wanted, watch)

    monkeypatch.setattr(Sampler, "answer", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config(answers=str(path)), HOT)
    kept = path.read_text().splitlines()
    assert len(kept) == 1 + 2, "what they are of, and a batch"
    missing = sorted({*range(N)} - {json.loads(row)[0] for row in kept[1:]})
    half_a_batch = json.dumps([missing[0], json.loads(kept[1])[1] | {"text": "of half a batch"}])
    path.write_text(path.read_text() + f'{half_a_batch}\n[{missing[1]}, {{"text": "half a')
    report = evaluate(config(answers=str(path)), HOT)
    assert sorted(sum(asked[4:], [])) == sorted(prompts[i] for i in missing), "the first call is a warm-up"
    assert {k: v for k, v in report.items() if k not in TIMED} == {k: v for k, v in whole.items() if k not in TIMED}
    assert path.read_text().splitlines()[:3] == kept
    results, asked[:] = [json.loads(row)[1] for row in path.read_text().splitlines()[1:]], []
    again = evaluate(config(answers=str(path)), HOT)
    assert sum(asked, []) == [] and {**again, "peak_memory_mb": 0} == {**report, "peak_memory_mb": 0}
    assert report["pad_share"] == sum(r["pads"] for r in results) / sum(r["slots"] for r in results) > 0
    _, second, third, last = sorted(r["seconds"] for r in results)  # 0.95 is 0.85 between the last two
    assert [report[name] for name in TIMED[:2]] == pytest.approx([(second + third) / 2, 0.15 * third + 0.85 * last])


def test_answers_of_another_checkpoint_data_or_settings_are_refused(config, files, fresh):
    for change in each(["checkpoint", "data", "settings", "limit", "draft", "batch"]):
        tmp_path = fresh()
        path, small, short = tmp_path / "kept.jsonl", str(files / "small.safetensors"), replace(SHORT, ahead=1)
        evaluate(config("ar", answers=str(path), limit=1), short)
        before, rows = path.read_text(), (files / "test.jsonl").read_text().splitlines()
        (tmp_path / "test.jsonl").write_text("\n".join(reversed(rows)))
        more = {"checkpoint": small, "data": str(tmp_path), "draft": small, "limit": 2, "batch": 1}
        other = replace(config("ar", answers=str(path), limit=1), **{k: v for k, v in more.items() if k == change})
        with pytest.raises(ValueError, match="kept.jsonl: holds answers of another checkpoint, data or settings"):
            evaluate(other, SampleConfig(max_tokens=25) if change == "settings" else short)
        assert path.read_text() == before and json.loads(before.split("\n")[0])["device"] == "cpu"


JUNK = ["nonsense", "[0]", "7", '[0, "text"]', '[0, {"text": "x"}]', "[[], {}]", "[" * 9999, "\ufffd", ""]


def test_a_whole_line_that_is_no_answer_is_named_and_the_file_stays(config, fresh):
    for junk in each(JUNK):
        tmp_path = fresh()
        path = tmp_path / "kept.jsonl"
        evaluate(config("ar", answers=str(path), limit=2, batch=1), SHORT)
        head, first, second = path.read_text().splitlines()
        number = json.loads(second)[0]
        for other in (junk, first, second.replace(f"[{number}", "[2"), second.replace(f"[{number}", "[-1")):
            path.write_text("\n".join([head, first, other, ""]))
            with pytest.raises(ValueError, match=r"kept.jsonl, line 3: expected an answer .*: remove the file"):
                evaluate(config("ar", answers=str(path), limit=2, batch=1), SHORT)
            assert path.read_text() == "\n".join([head, first, other, ""])


def test_a_file_of_something_else_is_refused_and_stays(config, fresh):
    for text in each(["my notes", "my notes\n", "my notes\nof today\n", "\n"]):
        tmp_path = fresh()
        (tmp_path / "notes").write_text(text)
        with pytest.raises(
            ValueError, match="--answers .*notes: holds answers of another .* or something else: name another"
        ):
            evaluate(config("ar", answers=str(tmp_path / "notes"), limit=1), SHORT)
        assert (tmp_path / "notes").read_text() == text


def test_a_first_line_that_was_cut_off_is_written_again(config, tmp_path):
    path = tmp_path / "a.jsonl"
    evaluate(config("ar", answers=str(path), limit=1), SHORT)
    head = path.read_text().splitlines()[0]
    for cut in (head[:20], head):
        path.write_text(cut)
        evaluate(config("ar", answers=str(path), limit=1), SHORT)
        assert path.read_text().splitlines()[0] == head and path.read_text().count("\n") == 2


def test_answers_go_to_a_file_and_not_to_a_folder(config, tmp_path):
    with pytest.raises(ValueError, match="--answers .*: expected a file"):
        evaluate(config(answers=str(tmp_path)), SHORT)


def test_a_disk_that_is_full_is_named_and_what_was_written_is_kept(config, tmp_path, monkeypatch):
    """The limit on a file's size makes a write fail halfway, as a full disk does; what fitted is used again."""
    resource = pytest.importorskip("resource")
    path, limits = tmp_path / "a.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = evaluate(config("ar", answers=str(tmp_path / "whole")), SHORT)
    size = (tmp_path / "whole").stat().st_size * 3 // 4
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            evaluate(config("ar", answers=str(path)), SHORT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(path) and path.stat().st_size == size
    report = evaluate(config("ar", answers=str(path)), SHORT)
    assert {k: v for k, v in report.items() if k not in TIMED} == {k: v for k, v in whole.items() if k not in TIMED}


def test_an_empty_file_of_answers_is_a_new_one(config, tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    evaluate(config("ar", answers=str(tmp_path / "a.jsonl"), limit=1), SHORT)
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2


def test_peak_memory_is_that_of_the_answers(config, monkeypatch):
    called = []
    for name in ("answer_all", "peak_memory", "likelihoods"):
        whole = getattr(evaluation, name)
        monkeypatch.setattr(evaluation, name, lambda *args, n=name, f=whole: [called.append(n), f(*args)][1])
    evaluate(config("ar", limit=1), SHORT)
    assert called == ["answer_all", "peak_memory", "likelihoods"]


def test_an_answer_without_room_and_a_single_draw_give_a_whole_report(config):
    for name in each(["planned", "ar", "block"]):
        report = evaluate(config(name, draws=1, limit=2), SampleConfig(max_tokens=1))
        assert report["span_elbo_error"] is None and json.dumps(report, allow_nan=False)
        assert report["scores"]["all"]["valid"] == 0 and not any(" +- " in line for line in lines(report))


def test_broken_answers_count_as_not_valid_and_stop_nothing(config):
    loose = SampleConfig(max_tokens=24, constrained=False, temperature=1.0)
    report = evaluate(config(show=N, batch=1), loose)
    sampler, examples = Sampler.load(config().checkpoint, loose), read_split(Path(config().data) / "test.jsonl")
    valid = [not a.broken and not a.cut for e in examples for a in sampler.answer([e.prompt])]
    assert report["scores"]["all"]["valid"] == sum(valid) / N < 1
    assert sum(line.startswith("**") for line in lines(report)) == N


def test_with_a_draft_the_answers_are_the_same_and_the_passes_of_both_models_are_told(config, files):
    small = str(files / "small.safetensors")
    settings = (SHORT, replace(SHORT, ahead=4))
    alone, drafted = (evaluate(config("ar", draft=draft, limit=2), s) for draft, s in zip(("", small), settings))
    assert all(drafted[name] == alone[name] for name in ("plan_nll", "readers", "distinct_1", "distinct_3"))
    before, after = alone["scores"]["all"], drafted["scores"]["all"]
    assert before["content_tokens"] == after["content_tokens"] and before["draft_passes"] == 0
    assert after["draft_passes"] > 0 and after["passes"] <= before["passes"]
    assert any("draft_passes" in line for line in lines(drafted))


def test_tokens_drafted_per_pass_are_a_setting_and_answers_of_another_are_not_taken_for_its_own(config, tmp_path):
    """With itself as its draft a model agrees with all: a pass brings the drafted tokens and one more."""
    path, model = tmp_path / "kept.jsonl", config("ar").checkpoint
    drafted, kept = config("ar", draft=model, limit=1), config("ar", draft=model, limit=1, answers=str(path))
    tokens = evaluate(config("ar", limit=1), SHORT)["scores"]["all"]["passes"]
    for n in (1, 3, 7):
        passes = evaluate(drafted, replace(SHORT, ahead=n))["scores"]["all"]["passes"]
        assert tokens / (n + 1) <= passes <= tokens / (n + 1) + 2, "the answer's end may cut a draft short"
    evaluate(kept, replace(SHORT, ahead=3))
    with pytest.raises(ValueError, match="holds answers of another checkpoint, data or settings"):
        evaluate(kept, replace(SHORT, ahead=7))


def test_a_judge_that_is_no_autoregressive_model_is_refused(config, files):
    for name, said in each([("planned", "expected an autoregressive model"), ("old", "does not say by which method")]):
        with pytest.raises(ValueError, match=f"{name}.safetensors.* {said}"):
            evaluate(config("ar", judge=str(files / f"{name}.safetensors"), limit=1), SHORT)


def test_json_is_one_object_and_nothing_else_and_an_error_is_one_line(config, files, monkeypatch, capsys):
    (files / "none.jsonl").write_text("")
    options = [
        "measure/eval.py",
        "--data",
        str(files),
        "--max_tokens",
        "24",
        "--device",
        "cpu",
        "--json",
        "--show",
        "2",
    ]
    judged = ["--checkpoint", config().checkpoint, "--judge", config("ar").checkpoint]
    monkeypatch.setattr(sys, "argv", [*options, *judged])
    command(evaluation.main)
    out = capsys.readouterr().out
    report = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert out.count("\n") == 1 and report["scores"]["all"]["n"] == N and report["readers"]["perplexity"]["value"] > 1
    assert report["span_elbo_error"] > 0
    for wrong, said in [(["--checkpoint", config("old").checkpoint], "old.safetensors does not say by which method"),
                        ([*judged, "--split", "none"], "none.jsonl has no examples"),
                        (["--draft", config().checkpoint], "--draft .*: expected --ahead")]:  # fmt: skip
        monkeypatch.setattr(sys, "argv", [*options, *wrong])
        with pytest.raises(SystemExit, match=rf"^eval.py: [^\n]*{said}[^\n]*$"):
            command(evaluation.main)
