"""The picture of the stages: it says what a run of the sampler gives, pass by pass."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import each

from demo import stages, svg
from sample import Sampler
from show.record import record

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run():
    """(recording, answer) of what the picture shows, made anew by the shipped model."""
    sampler = Sampler.load(ROOT / stages.CHECKPOINT, stages.CONFIG)
    return record(sampler.answer, stages.PROMPT), sampler.answer([stages.PROMPT])[0].result()


def sections(picture):
    """[(heading or label, the shapes below it)] from top to bottom."""
    found, label = [], re.compile(r"(after pass|scaffold: |Prompt$|Plan|Spans|Text|span$)")
    for shape in (e for e in ElementTree.fromstring(picture).iter() if e.get("y") and e.get("class") != "page"):
        if label.match(shape.text or "") and shape.get("class"):
            found.append((shape.text, []))
        else:
            found[-1][1].append(shape)
    return found


def words(shapes, *kinds):
    return [e.text for e in shapes if e.tag.endswith("text") and e.get("class") in kinds]


def test_the_picture_in_the_documents_says_what_a_run_gives(run):
    shown = (ROOT / "docs/stages.svg").read_text(encoding="utf-8")
    said = [[(label, words(shapes, None, "strong", "note"), [e.get("class") for e in shapes if e.get("rx")])
             for label, shapes in sections(picture)] for picture in (shown, stages.draw(stages.PROMPT, run[0]))]  # fmt: skip
    assert said[0] == said[1]


def test_its_prompt_is_the_first_of_the_test_split_that_has_a_second_round(run):
    (round_0, round_1) = run[1]["rounds"]
    assert round_0["plan"] and round_1["text"]
    path = ROOT / "data/tasks/test.jsonl"
    if not path.exists():
        pytest.skip("needs data/tasks/prepare.py")
    examples = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert next(e for e in examples if "<sync/>" in e["answer"])["prompt"] == stages.PROMPT


def test_each_row_of_spans_holds_what_is_known_after_its_pass_and_at_least_what_the_rule_asks_for(run):
    frames, _ = run
    rows = [s for s in sections(stages.draw(stages.PROMPT, frames)) if re.match("after|scaffold", s[0])]
    spans = frames[-1].rounds[0].spans
    steps = math.ceil(stages.CONFIG.steps_ratio * max(map(len, spans)))
    first = next(n for n, frame in enumerate(frames, 1) if frame.denoise_passes)
    assert [label.split(":")[0] for label, _ in rows[1:]] == [f"after pass {first + s}" for s in range(len(rows) - 1)]
    assert len(rows) - 1 == frames[-1].denoise_passes >= steps > 1
    for s, (label, shapes) in each(enumerate(rows)):
        now, before = (frames[first + i - 2].rounds[0].spans for i in (s, max(0, s - 1)))
        known = [[slot.strip() or svg.PAD for slot in span if slot is not None] for span in now]
        filled = [len(span) for span in known]
        assert all(n >= math.ceil(len(span) * min(s, steps) / steps) for n, span in zip(filled, now))
        assert Counter(words(shapes, None)) == Counter(sum(known, []))
        counts = Counter(e.get("class") for e in shapes if e.tag.endswith("rect"))
        assert counts["slot"] == sum(span.count(None) for span in now) and counts["rule"] == len(now)
        assert counts["new"] == sum(filled) - sum(slot is not None for span in before for slot in span)
        numbers = (
            " + ".join(map(str, filled)) + f" of {sum(map(len, now))}" if s else " + ".join(str(len(x)) for x in now)
        )
        assert numbers in label


def test_prompt_plan_and_text_are_those_of_the_answer_with_one_sync(run):
    _, answer = run
    picture = sections(stages.draw(stages.PROMPT, run[0]))
    told = {label.split(",")[0]: " ".join(words(shapes, None, "strong", "note")) for label, shapes in picture}
    assert " ".join(words(picture[0][1], None)) == stages.PROMPT
    plan, rest = answer["tagged"].split("<async>")[0], answer["tagged"].split("</async>")[-1]
    for stage, said in (("Plan", plan), ("Text of the next round", rest)):
        assert told[stage].replace(" ", "").endswith(said.replace(" ", ""))
    assert [told[stage].count("<sync/>") for stage in told] == [0, 1, 0, *[0] * 4, 2, 0]


def test_the_command_writes_the_picture_and_no_checkpoint(run, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["stages.py", "--out", str(tmp_path / "a.svg")])
    stages.main()
    assert sections((tmp_path / "a.svg").read_text(encoding="utf-8"))[-1][0] == "span"
    monkeypatch.setattr("sys.argv", ["stages.py", "--out", str(ROOT / stages.CHECKPOINT)])
    with pytest.raises(ValueError, match="--out"):
        stages.main()
