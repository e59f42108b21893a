"""Evaluation: what the figures of a report mean, and that an interrupted one goes on where it was."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import each, random_example, small_model
from test_quality import EXAMPLE, result_of

from config import MethodConfig, SampleConfig
from data import read_split, write_dataset
from measure import eval as evaluation
from measure.eval import Answers, EvalConfig, answer_all, evaluate, lines, passes_so_far
from plumbing.settings import command
from sample import Sampler
from tags import format_answer
from tokenizer import Tokenizer
from training.checkpoint import load_checkpoint, save_checkpoint

SHORT, HOT = SampleConfig(max_tokens=24), SampleConfig(max_tokens=24, temperature=1.0)
TIMED = ("seconds_p50", "seconds_p95", "peak_memory_mb")
N = 4  # test examples


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
BAD = {"text": None, "seconds": "1", "slots": -1, "pads": 1.5, "cut": 0, "rounds": {}, "plan_passes": "3",
       "positions": float("nan"), "prompt": 7}  # fmt: skip
BAD_ROUNDS = [7, {}, {"text": ""}, {"text": "", "plan": [{}], "spans": [""]}, {"text": "", "plan": [], "spans": [7]}]


def test_a_whole_line_that_is_no_answer_is_named_and_the_file_stays(config, fresh):
    for junk in each(JUNK):
        tmp_path = fresh()
        path = tmp_path / "kept.jsonl"
        evaluate(config("ar", answers=str(path), limit=2, batch=1), SHORT)
        head, first, second = path.read_text().splitlines()
        number = json.loads(second)[0]
        changes = [*({name: value} for name, value in BAD.items()), *({"rounds": [bad]} for bad in BAD_ROUNDS)]
        changed = [json.dumps([number, json.loads(second)[1] | change]) for change in changes]
        moved = [second.replace(f"[{number}", f"[{to}") for to in (2, -1)]
        for other in (junk, first, *moved, *(changed if junk == JUNK[0] else ())):
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
    assert any("| draft |" in line for line in lines(drafted))


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


def test_a_judge_is_a_model_of_the_same_data(config, files, tmp_path):
    """A pretrained model, whose tokenizer is of no data set, says what it was trained on."""
    model, tokenizer, info, _ = load_checkpoint(files / "small.safetensors")
    other = Tokenizer([*tokenizer.tokens[:-1], b"not of this data"], tokenizer.unit, tokenizer.pattern)
    for data, refused in ((None, True), (str(tmp_path), True), (str(files), False)):
        trained = {} if data is None else {"train": {"data": data}}
        save_checkpoint(tmp_path / "judge.safetensors", model, other, info | trained)
        judged = config("ar", judge=str(tmp_path / "judge.safetensors"), limit=1)
        if refused:
            with pytest.raises(ValueError, match="--judge .*judge.safetensors: of another data set than .*: train one"):
                evaluate(judged, SHORT)
        else:
            assert evaluate(judged, SHORT)["readers"]["perplexity"]["value"] > 1


def test_a_likelihood_is_measured_once_where_nothing_is_noised(config, monkeypatch):
    """By chance of noise alone a figure changes from draw to draw."""
    drawn, validate = [], evaluation.validate
    monkeypatch.setattr(
        evaluation, "validate", lambda *a, draws, **k: drawn.append(draws) or validate(*a, draws=1, **k)
    )
    model, tokenizer, *_ = load_checkpoint(config("small").checkpoint)
    examples = read_split(Path(config().data) / "test.jsonl", tokenizer)[:1]
    for method in ("ar", "parallel-ar", "planned", "dense", "block"):
        sampler = Sampler(model, tokenizer, SHORT, MethodConfig(method, block=6 if method == "block" else 0))
        evaluation.likelihoods(sampler, examples, 7)
    assert drawn == [1, 1, 7, 7, 7]


def test_what_is_shown_of_answers_commands_no_terminal(config, files, tmp_path, monkeypatch, capsys):
    row = {"prompt": "a\x1b[2J\x9bb\nc", "answer": format_answer(EXAMPLE.rounds), "family": "\x07"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    options = ["--checkpoint", config().checkpoint, "--data", str(tmp_path), "--show", "1", "--max_tokens", "9"]
    monkeypatch.setattr(sys, "argv", ["measure/eval.py", *options, "--device", "cpu", "--draws", "1"])
    command(evaluation.main)
    out = capsys.readouterr().out
    assert "**a?[2J?b\nc**" in out and all(c.isprintable() or c == "\n" for c in out)


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


def test_only_a_terminal_is_told_within_a_batch_and_once_a_second(monkeypatch):
    terminal, clock = io.StringIO(), iter([0, 0.5, 1.5, 2, 3])
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("measure.eval.time.monotonic", lambda: next(clock))
    assert passes_so_far() is None
    terminal.isatty = lambda: True
    clock = iter([0, 0.5, 1.5, 2, 3])
    watch = passes_so_far()
    for passes in range(1, 5):
        watch(SimpleNamespace(plan_passes=passes, denoise_passes=1))
    assert [line.strip() for line in terminal.getvalue().split("\r")[1:]] == [
        "this batch: 3 passes, 2 s", "this batch: 5 passes, 3 s"]  # fmt: skip
