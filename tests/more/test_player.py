"""The page that plays answers: what recordings tell about each pass, what the page holds, and what a browser shows."""

import html
import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES, each
from naive_sampler import Token, hidden_states
from test_show import WAYS, random_sampler, run

from demo import demo
from drafting import decoding
from grammar import Grammar
from masks import SLOT
from show.page import Race, data, page
from show.record import FrameRound, FrameTopic, parts, record
from tags import EOS, SYNC, TOPIC_END

# ---------------------------------------------------------------- what a recording tells about each pass


@pytest.fixture
def unsure(monkeypatch):
    """Drafts of a random model, which is sure of nothing."""
    monkeypatch.setattr(decoding, "DRAFT_CONFIDENCE", 0)


def text_of(part, frame):
    """The text of a part that a frame knows."""
    kind, r, *place = part
    if kind == "text":
        return frame.rounds[r].text[place[0]]
    if kind == "slot":
        return frame.rounds[r].spans[place[0]][place[1]]
    topic = frame.rounds[r].topics[place[0]]
    if kind == "name":
        return topic.name[place[1]]
    return {"topic": "<topic>", "length": str(topic.length)}[kind]


def test_each_token_is_drawn_in_the_pass_that_shows_it_or_was_forced(unsure, tokenizer, monkeypatch):
    monkeypatch.setattr("grammar.Grammar.repeats", lambda *_: False)  # what is taken back: tests/test_repeats.py
    for method, config in each([*WAYS, ("planned", {"ahead": 4, "constrained": False})]):
        for seed in range(3):
            frames, known = record(random_sampler(tokenizer, method, seed, **config).answer, SENTENCES[1]), set()
            for frame in frames:
                written = [draw for draw in frame.draws if draw.outcome in ("new", "accepted")]
                kept = {draw.part: draw for draw in written if draw.part}
                tags, broken = (TOPIC_END, SYNC, EOS), frame.ending == "broken"
                assert all(draw.part or draw.text in tags or broken for draw in written)
                fresh = {part for part in parts(frame) if part[0] != "span"} - known
                assert kept.keys() <= fresh
                assert all(text_of(part, frame).strip() == draw.text.strip() for part, draw in kept.items())
                for part in fresh - kept.keys():
                    assert text_of(part, frame) == "" if part[0] == "slot" else config.get("constrained", True)
                known |= fresh


def test_drafts_are_those_that_the_answer_counts(unsure, tokenizer):
    for method, config in each([way for way in WAYS if "ahead" in way[1]]):
        rejected = 0
        for seed in range(6):
            sampler = random_sampler(tokenizer, method, seed, **config)
            draws = [draw.outcome for frame in record(sampler.answer, SENTENCES[1]) for draw in frame.draws]
            (answer,) = sampler.answer([SENTENCES[1]])
            assert draws.count("accepted") == answer.accepted
            assert draws.count("rejected") == answer.drafted - answer.accepted
            rejected += draws.count("rejected")
        assert rejected


def test_probabilities_are_those_of_a_fresh_pass_over_the_whole_sequence(tokenizer):
    for method in each(["planned", "dense", "ar", "block"]):
        sampler, before = random_sampler(tokenizer, method), []
        attention = "dense" if method == "dense" else "sparse"

        def watch(answer):
            layout = answer.layout
            rows = zip(layout.token, layout.round, layout.span, layout.kind)
            tokens = [Token(i, r, None if span < 0 else span, kind == SLOT) for i, r, span, kind in rows]
            before.append((tokens, answer.phase and answer.phase.in_spans, torch.from_numpy(answer.grammar.allowed())))

        frames, compared = record(sampler.answer, SENTENCES[0], watch), 0
        for (tokens, in_spans, allowed), frame in zip(before, frames[1:]):
            hidden = hidden_states(sampler.model, tokens, attention)
            if in_spans:
                masked = [n for n, token in enumerate(tokens) if token.slot and token.id == tokenizer.mask]
                expected = sampler.model.logits(hidden[masked], tokenizer.pad + 1).softmax(-1).amax(-1)
            else:
                expected = sampler.model.logits(hidden[-1:]).masked_fill(~allowed, -torch.inf).softmax(-1).amax(-1)
            given = torch.tensor([draw.probability for draw in frame.draws])
            torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-3)
            compared += 1
        assert compared > 5


def test_the_most_certain_slots_are_filled_first(tokenizer):
    frames = record(random_sampler(tokenizer, "planned", order="confidence", apart=False).answer, SENTENCES[0])
    compared = 0
    for frame in frames:
        for span in {draw.part[:3] for draw in frame.draws if draw.part and draw.part[0] == "slot"}:
            of_span = [draw for draw in frame.draws if draw.part and draw.part[:3] == span]
            filled = [draw.probability for draw in of_span if draw.outcome == "new"]
            left = [draw.probability for draw in of_span if draw.outcome == "unsure"]
            assert not (filled and left) or min(filled) >= max(left)
            compared += bool(filled and left)
    assert compared > 5


def test_an_answer_without_a_pass_has_its_end_for_a_recording_and_a_page(tokenizer):
    frames = record(random_sampler(tokenizer, "planned", max_tokens=1).answer, "otter")
    assert [(frame.passes, frame.ending) for frame in frames] == [(0, "cut")]
    assert data([Race("otter", [("Planned", "planned", frames)])])[0]["answers"][0]["passes"] == []


# ---------------------------------------------------------------- what the page holds

NASTY = "</script><script>alert(1)</script> <!-- & <b>\u2028 \x1b \ud800 水獺 {{data}}"
SHOWN = re.sub("[\u2028\x1b\ud800]", "?", NASTY)


@pytest.fixture(scope="module")
def race(tokenizer):
    """A prompt made to break a page, and four answers to it."""
    ways = {"planned": {}, "parallel-ar": {"ahead": 3}, "ar": {"ahead": 3}, "block": {"threshold": 0.5}}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(decoding, "DRAFT_CONFIDENCE", 0)
        monkeypatch.setattr(Grammar, "repeats", lambda grammar, token: False)  # test_repeats.py has what is taken back
        recordings = {way: record(random_sampler(tokenizer, way, **ways[way]).answer, SENTENCES[0]) for way in ways}
    return Race(NASTY, [(f"<i>{way}", way, frames) for way, frames in recordings.items()])


HELD = re.compile(r'<script type="application/json" id="recording">(.*?)</script>', re.S)


def held(text):
    """The data that a page holds."""
    return json.loads(HELD.search(text)[1])


def at(rounds, n):
    """What the page's data know of an answer after pass n, as a frame says it."""

    def texts(tokens):
        return tuple(token["text"] for token in tokens if token["since"] <= n)

    def shown(round_):
        lengths = [int(topic["length"]["text"]) * (topic["length"]["since"] <= n) for topic in round_["topics"]]
        topics = [
            FrameTopic(texts(topic["name"]), length)
            for topic, length in zip(round_["topics"], lengths)
            if topic["since"] <= n
        ]
        spans = [
            tuple(slot["text"] if slot["since"] <= n else None for slot in span["slots"])
            for span in round_["spans"]
            if span["since"] <= n
        ]
        return FrameRound(texts(round_["text"]), tuple(topics), tuple(spans))

    return [shown(round_) for round_ in rounds]


def test_the_data_are_the_recording(race):
    (told,) = held(page([race]))
    assert told["prompt"] == SHOWN
    for answer, (title, _, frames) in zip(told["answers"], race.answers, strict=True):
        assert (answer["title"], answer["ending"]) == (title, frames[-1].ending)
        for n, (step, frame) in enumerate(zip(answer["passes"], frames, strict=True), 1):
            rounds = at(answer["rounds"], n)
            assert rounds[: len(frame.rounds)] == [*frame.rounds]
            assert all(round_ == FrameRound((), (), ()) for round_ in rounds[len(frame.rounds) :])
            assert (step["positions"], step["critical_path"]) == (frame.positions, frame.critical_path)
            outcomes = [draw.outcome for draw in frame.draws]
            assert (step["accepted"], len(step["rejected"])) == (outcomes.count("accepted"), outcomes.count("rejected"))
            kept = {draw.part: draw for draw in frame.draws if draw.outcome in ("new", "accepted")}
            for token in tokens_of(answer["rounds"]):
                draw = kept.get(part_of(token["part"]))
                if draw and token["since"] == n:
                    assert token["probability"] == round(draw.probability, 3)
                    assert token["draft"] == (draw.outcome == "accepted")


def tokens_of(rounds):
    for round_ in rounds:
        yield from round_["text"]
        for topic in round_["topics"]:
            yield from [*topic["name"], topic["length"]]
        for span in round_["spans"]:
            yield from span["slots"]


def part_of(name):
    kind, *numbers = name.split("-")
    return kind, *map(int, numbers)


def test_text_stays_text_and_the_page_needs_nothing_else(race):
    text = page([race])
    assert text.count("<script") == text.count("</script>") == 2 and "<!--" not in text
    assert "<" not in HELD.search(text)[1] and "<title>&lt;/script&gt;" in text
    assert re.findall(r'href="(.*?)"', text) == ["https://arxiv.org/abs/2510.18087"], "one link, to the paper"
    assert not re.search(r"http:|url\(|@import|\ssrc=|fetch\(|XMLHttpRequest|import\(|innerHTML|eval\(", text)
    assert text.count("https:") == 1
    assert "default-src 'none'" in text
    text.encode()  # also a prompt that is no Unicode text
    assert len(text) < 300_000


def test_the_commands_write_pages(monkeypatch, capsys, tmp_path):
    two = ("--prompt", "one", "--prompt", "<b>")
    assert run(monkeypatch, "sample.py", *two, "--max_tokens", 20, "--html", tmp_path / "a.html") is None
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert [race["prompt"] for race in held(text)] == ["one", "<b>"]
    assert [[answer["title"] for answer in race["answers"]] for race in held(text)] == [["Planned diffusion"]] * 2
    assert re.search(rf"{tmp_path / 'a.html'}: \d+ passes, \d+ passes\n$", capsys.readouterr().out)
    words = ("--data", "tasks", "--prompt", "What is the food of Brivok?", "--delay", 0, "--device", "cpu")
    monkeypatch.setattr(demo, "measure", partial(demo.measure, repeats=1))
    monkeypatch.setattr("sys.argv", ["demo.py", *map(str, words), "--html", str(tmp_path / "b.html")])
    demo.main()
    (race,) = held((tmp_path / "b.html").read_text(encoding="utf-8"))
    passes = [str(len(answer["passes"])) for answer in race["answers"]]
    assert re.search(rf"b.html: {' passes, '.join(passes)} passes\n$", capsys.readouterr().out) and len(passes) > 1


def test_a_page_and_json_are_one_too_many(monkeypatch, capsys):
    assert run(monkeypatch, "sample.py", "--prompt", "x", "--json", "--html", "a.html") == 2
    assert "not allowed with argument --json" in capsys.readouterr().err


# ---------------------------------------------------------------- what a browser shows

TOUR = Path(__file__).resolve().parents[2] / "course/tour.ipynb"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
STEP_THROUGH = """<pre id="log"></pre><script>
const seen = [];
for (let n = 0; n <= slider.max; n++) {
  slider.value = n;
  slider.dispatchEvent(new Event("input"));
  seen.push([...document.querySelectorAll(".answer")].map((lane) => ({
    count: lane.querySelector(".head b").textContent, doing: lane.querySelector(".doing").firstChild.textContent,
    costs: lane.querySelector(".costs").textContent, bar: lane.querySelectorAll(".bar .done").length,
    tokens: [...lane.querySelectorAll("[data-part]")].map((token) => ({
      part: token.dataset.part, state: token.dataset.state, rejected: token.dataset.rejected,
      p: +token.style.getPropertyValue("--p"), accepted: token.classList.contains("draft"),
      words: token.firstChild.checkVisibility({checkVisibilityCSS: true}) ? token.textContent : null })),
    topics: [...lane.querySelectorAll(".plan li")].filter((n) => getComputedStyle(n).visibility === "visible").length,
  })));
}
log.textContent = JSON.stringify({prompt: $("prompt").textContent, seen});
</script>"""
PRESS_KEYS = """<pre id="log"></pre><script>
const seen = {loaded: [$("now").textContent, $("play").ariaLabel]};
const press = (key, target = document.body) => {
  target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  return [$("now").textContent, $("play").ariaLabel];
};
seen.end = press("End"); seen.left = press("ArrowLeft"); seen.home = press("Home"); seen.right = press("ArrowRight");
seen.below = (press("Home"), press("ArrowLeft")); seen.onSlider = press("ArrowRight", slider);
seen.onSelect = press("End", speed);
seen.again = (press("End"), press(" ")); press("ArrowRight"); seen.playing = press(" "); seen.paused = press(" ");
forth.click(); seen.forth = [$("now").textContent, $("play").ariaLabel];
back.click(); seen.back = [$("now").textContent, $("play").ariaLabel];
press(" ");
setTimeout(() => { seen.later = [$("now").textContent, $("play").ariaLabel]; log.textContent = JSON.stringify(seen); }, 60000);
</script>"""


def tour_height():
    """Of the frame in which the notebook shows the page."""
    return int(re.search(r'<iframe.*? height=\\"(\d+)\\"', TOUR.read_text(encoding="utf-8"))[1])


@pytest.fixture
def browse(tmp_path):
    """A function that opens a page in a browser and returns its elements, as HTML, when its scripts have run."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)}")

    def open_page(text, fragment=""):
        path = tmp_path / "page.html"
        path.write_text(text, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command = [browser, *options, "--virtual-time-budget=120000", "--dump-dom", path.as_uri() + fragment]
        return subprocess.run(command, capture_output=True, timeout=300, check=True).stdout.decode()

    return open_page


LOOK = """<pre id="log"></pre><iframe id="frame" style="width: %dpx; height: %dpx"></iframe><script>
frame.srcdoc = %s;
frame.onload = () => {
  const page = frame.contentDocument, all = (selector) => [...page.querySelectorAll(selector)];
  const box = (node) => { const {left, top, right, bottom, width} = node.getBoundingClientRect();
                          return {left, top, right, bottom, width}; };
  const style = (node, name) => frame.contentWindow.getComputedStyle(node)[name];
  const masks = [], unlike = [];
  for (let n = 0, last = +page.getElementById("slider").max; n <= last; n++) {
    frame.contentWindow.go(n);
    masks.push(...all('.words [data-state="masked"]:not([data-rejected])')
      .map((node) => `${box(node).width}${node.previousSibling.data}`));
    page.getAnimations().forEach((animation) => animation.finish());
    for (const node of all('.words [data-state="known"], .over [data-state="new"]'))
      unlike.push(style(node, "backgroundColor"), style(node, "backgroundImage"), style(node, "outlineStyle"),
        style(node, "textDecorationLine"));
  }
  all(".words").forEach((node) => node.append("as long as answers are ".repeat(99)));
  log.textContent = JSON.stringify({masks: [...new Set(masks)], marks: [...new Set(unlike)], link: box(all("header a")[0]),
    legend: box(page.getElementById("legend")), lanes: all(".answer").map(box), words: all(".words").map(box),
    controls: all("#controls > *").map(box), footer: box(all("footer")[0]), width: page.documentElement.scrollWidth});
};
</script>"""


def log_in(dom):
    return json.loads(html.unescape(re.search(r'<pre id="log">(.*?)</pre>', dom, re.S)[1]))


def test_a_browser_shows_after_each_pass_what_the_recording_holds_and_nothing_else(browse, race):
    told = log_in(browse(page([race]).replace("</body>", STEP_THROUGH + "</body>"), "#frame=0"))
    assert told["prompt"] == SHOWN
    assert len(told["seen"]) == 1 + max(len(frames) for *_, frames in race.answers)
    rejected = 0
    for n, lanes in enumerate(told["seen"]):
        for lane, (_, method, frames) in zip(lanes, race.answers, strict=True):
            passes = min(n, len(frames))
            check_lane(lane, frames[passes - 1] if passes else None, frames[passes - 2] if passes > 1 else None)
            assert lane["bar"] == passes
            assert (lane["doing"] == frames[-1].ending) == (passes == len(frames))
            rejected += sum("rejected" in token for token in lane["tokens"])
    assert rejected


def check_lane(lane, frame, before):
    """One answer in the browser, after the pass between two frames (None: before the first pass)."""
    tokens = {part_of(token["part"]): token for token in lane["tokens"]}
    known = {part for part in parts(frame) if part[0] not in ("span", "topic")} if frame else set()
    old = set(parts(before)) if before else set()
    rounds = frame.rounds if frame else ()
    masked = {("slot", r, k, n) for r, round_ in enumerate(rounds)
              for k, span in enumerate(round_.spans) for n, slot in enumerate(span) if slot is None}  # fmt: skip
    for part, token in tokens.items():
        expected = "new" if part in known - old else "known" if part in known else "masked" if part in masked else ""
        assert token["state"] == (expected or "hidden")
        assert (token["words"] is not None) == (part in known)
        if part in known:
            assert token["words"].strip() == (text_of(part, frame).strip() or "·" * (part[0] == "slot"))
    assert known | masked <= tokens.keys()
    assert lane["topics"] == sum(len(round_.topics) for round_ in rounds)
    refused = {draw.part for draw in frame.draws if draw.outcome == "rejected"} if frame else set()
    assert {part for part, token in tokens.items() if "rejected" in token} == refused & tokens.keys()
    for draw in frame.draws if frame else ():
        token = tokens.get(draw.part)
        if token and draw.outcome == "rejected":
            assert token["rejected"] == draw.text.strip()
        elif token:
            assert token["p"] == round(draw.probability, 3) and token["accepted"] == (draw.outcome == "accepted")
    assert lane["count"].startswith(f"{frame.passes if frame else 0} pass")
    assert f"· {frame.positions if frame else 0} position" in lane["costs"]


def test_the_page_opens_at_a_frame_and_stands_still(browse, race):
    dom = browse(page([race]), "#frame=7")
    assert re.findall(r'data-pass="(\d+)"', dom) == [str(min(7, len(frames))) for *_, frames in race.answers]
    assert re.search(r'id="play"[^>]*aria-label="Play"', dom)


def test_keys_and_buttons_move_through_the_passes(browse, race):
    last = max(len(frames) for *_, frames in race.answers)
    seen = log_in(browse(page([race]).replace("</body>", PRESS_KEYS + "</body>")))
    at = lambda n, label="Play": [f"pass {n} of {last}", label]
    assert seen == {
        "loaded": at(0, "Pause"), "end": at(last), "left": at(last - 1), "home": at(0), "right": at(1), "below": at(0),
        "onSlider": at(1), "onSelect": at(1), "again": at(0, "Pause"), "playing": at(1, "Pause"), "paused": at(1), "forth": at(2),
        "back": at(1), "later": at(last),
    }  # fmt: skip


@pytest.mark.parametrize("width, height", [(1280, 800), (390, 844), (900, tour_height())])
def test_all_lanes_race_in_view_below_the_legend_and_tell_nothing_too_early(browse, race, width, height):
    three = Race("otter", race.answers[:3])
    look = log_in(browse(LOOK % (width, height, json.dumps(page([three])).replace("<", "\\u003c"))))
    assert len(look["masks"]) == 1, "all masks are alike, whatever word comes"
    assert set(look["marks"]) == {"none", "rgba(0, 0, 0, 0)"}, "neither words read nor a finished lane are marked"
    assert look["link"]["bottom"] <= look["legend"]["top"]
    assert len(look["lanes"]) == 3 and look["width"] <= width
    for lane, words in zip(look["lanes"], look["words"]):
        assert look["legend"]["bottom"] <= lane["top"] and lane["bottom"] <= look["footer"]["top"]
        assert words["bottom"] - words["top"] > 90, "some lines of its text"
        assert words["bottom"] <= lane["bottom"] + 1, "the rest scrolls"
    assert look["footer"]["bottom"] <= height
    middles = [(box["top"] + box["bottom"]) / 2 for box in look["controls"]]
    assert max(middles) - min(middles) < 2, "one row of controls"
    assert all(a["right"] <= b["left"] for a, b in zip(look["controls"], look["controls"][1:]))
    assert look["controls"][-1]["right"] <= width
