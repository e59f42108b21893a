"""Evaluation: what the figures of a report mean, and that an interrupted one goes on where it was."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import random_example, small_model
from naive_sampler import Token, hidden_states

import eval as evaluation
from data import Example, read_split, write_dataset
from data.tasks import families
from eval import EvalConfig, checker, chrf, distinct, evaluate, lines, perplexity, row_of, score
from masks import encode_prompt
from methods import MethodConfig
from model import load_checkpoint, save_checkpoint
from sample import SampleConfig, Sampler
from settings import ROOT
from tags import Round, Span, Tokenizer, plain_text

SHORT = SampleConfig(max_tokens=24)
TIMED = ("seconds_p50", "seconds_p95", "peak_memory_mb")
N = 5  # test examples
EXAMPLE = Example("?", (Round("Here:", (Span("food", "fish", 2), Span("play", "a b", 3))), Round("End.")), "facts")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a data set without a checker, and checkpoints of random models."""
    folder = tmp_path_factory.mktemp("eval")
    examples = [random_example(seed, SimpleNamespace(units=lambda text: 1)) for seed in range(N)]
    write_dataset(folder, {"train": examples, "test": examples}, 256 + 74 + 40, 4)
    tokenizer, ar = Tokenizer.load(folder / "tokenizer.json"), {"method": vars(MethodConfig("ar"))}
    made = {"planned": ({"method": vars(MethodConfig())}, 2), "ar": (ar, 2), "small": (ar, 1), "old": ({}, 1)}
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
        row = row_of(EXAMPLE, result_of(text=text), check, False)
        assert (row["exact"], row["spans"]) == (exact, spans)
    assert check is families.check and checker(tmp_path) is None
    assert not {"exact", "spans"} & row_of(EXAMPLE, result_of(), None, True).keys()


@pytest.mark.parametrize("plan, right, off", [
    ([("food", 2), ("play", 3)], 1, 0),
    ([("food", 2), ("play", 7)], 0, 2),  # 0 and 4 units off
    ([("play", 3), ("food", 2)], 0, 0),  # another order
    ([("food", 1), ("sleep", 9)], 0, 1),  # the length of an unknown topic is neither right nor wrong
    ([], 0, 0),
])  # fmt: skip
def test_a_plan_is_right_if_topics_lengths_and_order_are_and_length_errors_are_of_known_topics(plan, right, off):
    row = row_of(EXAMPLE, result_of(plan), None, True)
    assert (row["plan_right"], row["length_error"], row["n_spans"]) == (right, off, len(plan))
    without = row_of(EXAMPLE, result_of(plan), None, False)  # methods that write no plan
    assert not {"plan_right", "length_error", "n_spans"} & without.keys()


@pytest.mark.parametrize("broken, cut, valid", [(False, False, 1), (True, False, 0), (False, True, 0)])
def test_broken_and_cut_answers_are_not_valid_and_passes_are_those_of_both_stages(broken, cut, valid):
    costs = {"plan_passes": 5, "denoise_passes": 7, "draft_passes": 11}
    row = row_of(EXAMPLE, result_of(broken=broken, cut=cut, **costs), None, False)
    assert (row["valid"], row["passes"], row["draft_passes"]) == (valid, 12, 11)
    assert row_of(EXAMPLE, result_of(), None, False)["draft_passes"] == 0


def test_scores_are_means_over_each_family_and_over_all_which_comes_last():
    """A family called "all" is no second one, and an example without a family counts under ""."""
    examples = [Example("?", (), family) for family in ("b", "", "all", "b", "a")]
    results = [result_of(text=str(n), plan_passes=n, broken=n == 1) for n in (1, 2, 3, 4, 10)]
    scores = score(examples, results, lambda e, text: SimpleNamespace(exact=text == "4", spans=[]), True)
    assert list(scores)[-1] == "all"
    assert {name: row["n"] for name, row in scores.items()} == {"a": 1, "b": 2, "": 1, "all": 5}
    assert {name: row["passes"] for name, row in scores.items()} == {"a": 10, "b": 2.5, "": 2, "all": 4}
    assert [scores["b"][name] for name in ("valid", "exact")] == [0.5, 0.5]
    assert [scores["all"][name] for name in ("valid", "exact")] == [0.8, 0.2]


def test_distinct_is_the_mean_share_of_different_n_grams_of_an_answer():
    results = [{"text": text} for text in ("a b a b a", "a b c", "", "a")]
    assert distinct(results, 1) == pytest.approx((2 / 5 + 1 + 0 + 1) / 4)
    assert distinct(results, 3) == pytest.approx((2 / 3 + 1 + 0 + 0) / 4)  # aba bab aba


def test_an_interrupted_evaluation_computes_only_what_is_missing_and_reports_the_same(config, monkeypatch, tmp_path):
    """Ctrl-C in the second batch, while a line was being written. Pads and times are those of the answers."""
    whole, path, asked, answer = evaluate(config(), SHORT), tmp_path / "answers.jsonl", [], Sampler.answer
    prompts = [e.prompt for e in read_split(Path(config().data) / "test.jsonl")]

    def counted(sampler, wanted, watch=None):
        asked.append(wanted)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answer(sampler, wanted, watch)

    monkeypatch.setattr(Sampler, "answer", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config(answers=str(path)), SHORT)
    kept = path.read_text().splitlines()
    assert len(kept) == 1 + 2, "what they are of, and a batch"
    path.write_text(path.read_text() + '[4, {"text": "half a li')
    report = evaluate(config(answers=str(path)), SHORT)
    missing = [prompts[i] for i in range(N) if i not in {json.loads(row)[0] for row in kept[1:]}]
    assert sorted(sum(asked[4:], [])) == sorted(missing), "the first call is a warm-up"
    assert {k: v for k, v in report.items() if k not in TIMED} == {k: v for k, v in whole.items() if k not in TIMED}
    assert path.read_text().splitlines()[:3] == kept
    results, asked[:] = [json.loads(row)[1] for row in path.read_text().splitlines()[1:]], []
    again = evaluate(config(answers=str(path)), SHORT)
    assert sum(asked, []) == [] and {**again, "peak_memory_mb": 0} == {**report, "peak_memory_mb": 0}
    assert report["pad_share"] == sum(r["pads"] for r in results) / sum(r["slots"] for r in results) > 0
    *_, third, fourth, last = sorted(r["seconds"] for r in results)  # of five; 0.95 is 0.8 between the last two
    assert [report[name] for name in TIMED[:2]] == pytest.approx([third, 0.2 * fourth + 0.8 * last])


@pytest.mark.parametrize("change", ["checkpoint", "data", "settings", "limit", "draft"])
def test_answers_of_another_checkpoint_data_or_settings_are_refused(config, files, tmp_path, change):
    path, small = tmp_path / "kept.jsonl", str(files / "small.safetensors")
    evaluate(config("ar", answers=str(path), limit=1), SHORT)
    before, rows = path.read_text(), (files / "test.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(reversed(rows)))
    more = {"checkpoint": {"checkpoint": small}, "data": {"data": str(tmp_path)}, "draft": {"draft": small}}
    other = config("ar", answers=str(path), limit=2 if change == "limit" else 1)
    vars(other).update(more.get(change, {}))
    with pytest.raises(ValueError, match="kept.jsonl holds answers of another checkpoint, data or settings"):
        evaluate(other, SampleConfig(max_tokens=25) if change == "settings" else SHORT)
    assert path.read_text() == before


def test_broken_answers_count_as_not_valid_and_stop_nothing(config):
    loose = SampleConfig(max_tokens=24, constrained=False, temperature=1.0)
    report = evaluate(config(show=N, batch=1), loose)
    sampler, examples = Sampler.load(config().checkpoint, loose), read_split(Path(config().data) / "test.jsonl")
    valid = [not a.broken and not a.cut for e in examples for a in sampler.answer([e.prompt])]
    assert report["scores"]["all"]["valid"] == sum(valid) / N < 1
    assert sum(line.startswith("**") for line in lines(report)) == N


def test_with_a_draft_the_answers_are_the_same_and_the_passes_of_both_models_are_told(config, files):
    alone, drafted = (evaluate(config("ar", draft=draft), SHORT) for draft in ("", str(files / "small.safetensors")))
    assert all(drafted[name] == alone[name] for name in ("plan_nll", "chrf", "distinct_1", "distinct_3"))
    before, after = alone["scores"]["all"], drafted["scores"]["all"]
    assert before["content_tokens"] == after["content_tokens"] and before["draft_passes"] == 0
    assert after["draft_passes"] > 0 and after["passes"] <= before["passes"]
    assert any("drafting model" in line for line in lines(drafted))


def test_perplexity_is_that_of_the_judge_token_by_token(files):
    """Of the text and its <eos> after the prompt; an empty answer is an <eos>."""
    model, tokenizer, *_ = load_checkpoint(files / "ar.safetensors")
    found, texts = [], ["It eats fish.\nAnd crabs.", "", "otter"]
    examples = [Example(prompt, ()) for prompt in ("otter?", "x", "")]
    for example, text in zip(examples, texts):
        prompt, answer = encode_prompt(example.prompt, tokenizer), [*tokenizer.encode(text), tokenizer.eos]
        for i, token in enumerate(answer):
            hidden = hidden_states(model, [Token(t, 0) for t in prompt + answer[:i]], "sparse")[-1]
            found.append(-torch.log_softmax(model.logits(hidden).double(), -1)[token].item())
    results = [{"text": text} for text in texts]
    wanted = math.exp(sum(found) / len(found))
    assert perplexity(str(files / "ar.safetensors"), examples, results, "cpu") == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name, said", [("planned", "not an autoregressive model"), ("old", "by which method")])
def test_a_judge_that_is_no_autoregressive_model_is_refused(config, files, name, said):
    with pytest.raises(ValueError, match=f"{name}.safetensors .*{said}"):
        evaluate(config("ar", judge=str(files / f"{name}.safetensors"), limit=1), SHORT)


def test_chrf_is_that_of_sacrebleu_over_all_answers():
    metrics, texts = pytest.importorskip("sacrebleu.metrics"), ["The otter eats crabs.", "", "otter"]
    wanted = metrics.CHRF().corpus_score(texts, [[plain_text(EXAMPLE.rounds)] * 3]).score
    assert chrf([EXAMPLE] * 3, [{"text": text} for text in texts]) == wanted
    assert chrf([EXAMPLE], [{"text": plain_text(EXAMPLE.rounds)}]) == pytest.approx(100)


def test_without_sacrebleu_there_is_all_but_chrf(config, monkeypatch, capsys):
    for module in ("sacrebleu", "sacrebleu.metrics"):
        monkeypatch.setitem(sys.modules, module, None)
    report = evaluate(config(limit=1), SHORT)
    assert report["chrf"] is None and "pip install sacrebleu" in capsys.readouterr().err
    assert not any("chrF" in line for line in lines(report))


def test_json_is_one_object_and_nothing_else_and_an_error_is_one_line(config, files, monkeypatch, capsys):
    options = ["eval.py", "--data", str(files), "--max_tokens", "24", "--device", "cpu", "--json", "--show", "2"]
    judged = ["--checkpoint", config().checkpoint, "--judge", config("ar").checkpoint]
    monkeypatch.setattr(sys, "argv", [*options, *judged])
    evaluation.main()
    out = capsys.readouterr().out
    report = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert out.count("\n") == 1 and report["scores"]["all"]["n"] == N and report["perplexity"] > 1
    monkeypatch.setattr(sys, "argv", [*options, "--checkpoint", config("old").checkpoint])
    with pytest.raises(SystemExit, match=r"^eval.py: [^\n]*old.safetensors does not say by which method[^\n]*$"):
        evaluation.main()
