"""Recordings, the animated picture and the drawn mask: each shows the answer and nothing else."""

import random
import re
import runpy
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import SENTENCES, each, small_model

from config import METHODS, MethodConfig, SampleConfig
from demo import svg
from demo.demo import PROMPTS
from drafting import decoding
from masks import ATTENTION
from methods import DECODERS
from sample import Sampler
from show.mask import INK, KINDS, otter, seen
from show.mask import show as mask_lines
from show.record import Frame, FrameRound, FrameTopic, frame, record

ROOT = Path(__file__).resolve().parents[2]
MODELS = {name: ROOT / f"checkpoints/tasks/{name}.safetensors" for name in ("planned", "ar")}
RIVER = "Tell me about the river, the food and the ruler of Brivok."


def random_sampler(tokenizer, method, seed=2, **config):
    """A random model that likes to plan, and writes ASCII only, so that its tokens join to its text."""
    model = small_model(tokenizer.vocab_size, seed=seed)
    logits, likely = model.logits, [tokenizer.topic, tokenizer.length_id(2)]
    strange = [
        i
        for i, token in enumerate(tokenizer.tokens)
        if not token.decode(errors="replace").isprintable() or max(token) > 126
    ]

    def steered(hidden, n=None):
        scores = logits(hidden, n)
        scores[..., strange] = -1e4
        if n is None:
            scores[..., likely] += 6
        return scores

    model.logits = steered
    block = 8 if METHODS[method].plan == "given" else 0
    return Sampler(
        model, tokenizer, SampleConfig(**{"max_tokens": 60, **config}), MethodConfig(method=method, block=block)
    )


def known(frame):
    """The text of every token that a frame knows: of text and spans."""
    rounds = [[*round_.text, *(slot for span in round_.spans for slot in span if slot)] for round_ in frame.rounds]
    return sum(rounds, [])


# ---------------------------------------------------------------- the recording

WAYS = [(method, {}) for method in DECODERS]
WAYS += [(method, {"ahead": 3}) for method in ("planned", "parallel-ar", "ar")]
WAYS += [("planned", {"threshold": 0.9, "temperature": 1.0})]


def test_the_last_frame_is_the_answer_and_each_pass_has_a_frame(tokenizer):
    for method, config in each(WAYS):
        sampler = random_sampler(tokenizer, method, **config)
        frames, (answer,) = record(sampler.answer, SENTENCES[0]), sampler.answer([SENTENCES[0]])
        result, last = answer.result(), frames[-1]
        assert [frame.passes for frame in frames] == [*range(1, len(frames) + 1)]
        for name in ("plan_passes", "denoise_passes", "critical_path", "positions"):
            assert getattr(last, name) == result[name]
        plain = lambda text: " ".join(text.split())
        if METHODS[method].plan == "given":
            assert plain("".join(known(last))) == plain(result["text"])
        else:
            for shown, told in zip(last.rounds, result["rounds"], strict=True):
                assert plain("".join(shown.text)) == plain(told["text"])
                plan = [{"topic": plain("".join(topic.name)), "length": topic.length} for topic in shown.topics]
                assert plan == [{**topic, "topic": plain(topic["topic"])} for topic in told["plan"]]
                assert [plain("".join(filter(None, span))) for span in shown.spans] == [
                    plain(text) for text in told["spans"]
                ]
        slots = [slot for round_ in last.rounds for span in round_.spans for slot in span]
        assert len(slots) == result["slots"] and slots.count("") == result["pads"] and (None not in slots)
        assert [bool(frame.ending) for frame in frames] == [False] * (len(frames) - 1) + [True]
        assert last.ending == ("cut" if result["cut"] else "finished")


def test_what_a_frame_knows_stays_so_drafts_are_in_none(monkeypatch, tokenizer):
    for method, config in each(WAYS):
        monkeypatch.setattr(decoding, "DRAFT_CONFIDENCE", 0)  # a random model is sure of nothing
        rejected = 0
        for seed in range(12 if "ahead" in config else 3):
            frames = []
            sampler = random_sampler(tokenizer, method, seed, **config)
            (answer,) = sampler.answer([SENTENCES[1]], watch=lambda answer: frames.append(frame(answer)))
            rejected += answer.drafted - answer.accepted
            for before, after in zip(frames, frames[1:]):
                assert grows(before, after)
        assert rejected or not sampler.config.ahead


def grows(before, after):
    """Whether a frame knows all that the frame before it knew, and more if its pass denoised."""
    rounds, kept = [*zip(before.rounds, after.rounds)], []
    for old, new in rounds:
        kept.append(new.text[: len(old.text)] == old.text)
        for topic, grown in zip(old.topics, new.topics):
            kept.append(grown.name[: len(topic.name)] == topic.name and topic.length in (0, grown.length))
        for span, filled in zip(old.spans, new.spans):
            kept.append(len(span) == len(filled) and all(slot in (None, now) for slot, now in zip(span, filled)))
    masked = [sum(span.count(None) for old_new in rounds for span in old_new[i].spans) for i in (0, 1)]
    return all(kept) and (
        after.denoise_passes == before.denoise_passes or not rounds[-1][0].spans or masked[1] < masked[0]
    )


def test_a_broken_answer_says_so(tokenizer):
    ending = record(random_sampler(tokenizer, "planned", constrained=False).answer, "otter")[-1].ending
    assert ending == "broken"


# ---------------------------------------------------------------- the picture


class Picture:
    """An SVG as a browser shows it."""

    SPACE = "{http://www.w3.org/2000/svg}"

    def __init__(self, text):
        self.root = ElementTree.fromstring(text)
        css = self.root.find(self.SPACE + "style").text
        self.seconds = float(re.search(r"animation:([\d.]+)s step-end infinite", css)[1])
        keyframes = re.findall(r"@keyframes (\w+)\{((?:[\d.]+%\{visibility:\w+\})+)\}", css)
        steps = {name: re.findall(r"([\d.]+)%\{visibility:(\w+)\}", body) for name, body in keyframes}
        self.steps = {
            name: [(float(time) / 100 * self.seconds, value) for time, value in body] for name, body in steps.items()
        }

    def at(self, seconds):
        """The elements that are visible; None: without animation."""
        for group in self.root.findall(self.SPACE + "g"):
            kind = group.get("class")
            visible = kind != "until"
            if kind and seconds is not None:
                steps = self.steps[group.get("style").removeprefix("animation-name:")]
                visible = [value for time, value in steps if time <= seconds][-1] == "visible"
            if visible:
                yield from group

    def after(self, n_passes):
        """The elements that are visible between a pass and the next."""
        return [*self.at(svg.START + (n_passes + 0.5) * svg.STEP)]


def tokens_in(elements):
    """The texts of tokens among the elements of a picture: neither legend nor headings nor what passes do."""
    texts = [element for element in elements if element.tag.endswith("text")]
    (legend,) = (float(element.get("y")) for element in texts if element.text == svg.LEGEND[0][-1])
    texts = [element.text for element in texts if not element.get("class") and float(element.get("y")) < legend]
    return Counter(text for text in texts if not re.match(r"(writes|denoises|extends) .", text))


def tokens_of(frame):
    texts = known(frame) + [svg.PAD for round_ in frame.rounds for span in round_.spans for slot in span if slot == ""]
    for topic in (topic for round_ in frame.rounds for topic in round_.topics):
        texts += [*topic.name, *[str(topic.length)] * (topic.length > 0)]
    return Counter(text.strip() for text in texts if text.strip())


def words_in(elements):
    """The words that texts form where they stand."""
    place = lambda element: (float(element.get("y")), float(element.get("x")))
    line, end, text = None, 0, ""
    for element in sorted((e for e in elements if e.tag.endswith("text")), key=place):
        y, x = place(element)
        text += ("" if y == line and x - end < svg.CHARACTER / 2 else " ") + element.text
        line, end = y, x + len(element.text) * svg.CHARACTER
    return text.split()


@pytest.fixture(scope="module")
def race():
    """(recordings by method, answers, the picture's text) of a prompt that both shipped models answer."""
    samplers = {name: Sampler.load(path, SampleConfig()) for name, path in MODELS.items()}
    frames = {name: record(sampler.answer, RIVER) for name, sampler in samplers.items()}
    answers = {name: sampler.answer([RIVER])[0].result() for name, sampler in samplers.items()}
    return frames, answers, svg.draw(RIVER, [*frames.items()])


def test_after_each_pass_the_picture_shows_both_frames_and_nothing_else(race):
    frames, _, text = race
    picture, longest = Picture(text), max(map(len, frames.values()))
    assert len(frames["planned"]) < longest == len(frames["ar"])
    for n in range(longest + 1):
        visible = picture.after(n)
        now = [recorded[min(n, len(recorded)) - 1] for recorded in frames.values()] if n else []
        assert tokens_in(visible) == sum(map(tokens_of, now), Counter())
        masked = sum(span.count(None) for frame in now for round_ in frame.rounds for span in round_.spans)
        assert sum(element.get("class") == "slot" for element in visible) == masked + 1  # and the legend
        counts = [e.text for e in visible if e.get("class") == "strong" and re.fullmatch(r"\d+ pass(es)?", e.text)]
        assert [*map(int, re.findall(r"\d+", " ".join(counts)))] in ([frame.passes for frame in now] or [0, 0],
                                                                     [frame.passes for frame in now[::-1]])  # fmt: skip


def test_all_marks_of_a_picture_are_in_its_legend():
    meanings = {meaning for *_, meaning in svg.LEGEND}
    for path in each(("docs/answer.svg", "docs/stages.svg")):
        shapes = [*ElementTree.parse(ROOT / path).iter()]
        legend = min(float(e.get("y")) for e in shapes if e.text in meanings) - svg.LINE
        boxes = [e for e in shapes if e.tag.endswith("rect") and e.get("class") != "page"]
        above, below = ({e.get("class") for e in boxes if (float(e.get("y")) > legend) == is_} for is_ in (False, True))
        assert {"slot", "new", "rule"} <= above == below


def test_each_pass_has_its_own_step_of_equal_length(race):
    frames, _, text = race
    picture = Picture(text)
    begins = sorted({round(time, 2) for steps in picture.steps.values() for time, _ in steps})
    passes = max(map(len, frames.values()))
    steps = [round(svg.START + n * svg.STEP, 2) for n in range(1, passes + 2)]
    assert begins in ([0, *steps], [0, *steps[:-1]]), "the last one ends what is new in the last pass, if anything is"
    assert picture.seconds == pytest.approx(svg.START + passes * svg.STEP + svg.END)


def test_the_end_and_the_picture_without_motion_hold_every_word_of_both_answers(race):
    _, answers, text = race
    picture = Picture(text)
    end, still = [*picture.at(picture.seconds - 0.01)], [*picture.at(None)]
    assert Counter(map(ElementTree.tostring, end)) == Counter(map(ElementTree.tostring, still))
    shown = Counter(words_in(still))
    assert not Counter(" ".join([RIVER, *(a["text"] for a in answers.values())]).split()) - shown
    for name, answer in answers.items():
        ending = f"finished after {answer['plan_passes'] + answer['denoise_passes']} passes"
        assert ending in [element.text for element in still], name
    rule = ".until{visibility:hidden}@media(prefers-reduced-motion:reduce){.from,.until{animation:none!important}}"
    assert rule in text and text.count(".until") == 3, "or `Picture.at(None)` is not what is seen"


def test_the_picture_needs_nothing_else_and_fits_its_size(race):
    text = race[2].replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"<script|https?:|url\(|@import|href", text)
    assert len(text) < 150_000
    width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', text).groups())
    for element in Picture(race[2]).at(None):
        wide = element.get("width") or len(element.text) * svg.CHARACTER
        assert 0 <= float(element.get("x")) and float(element.get("x")) + float(wide) <= width
        assert 0 <= float(element.get("y")) <= height


def test_every_method_has_a_picture(tokenizer):
    for method in each(DECODERS):
        frames = record(random_sampler(tokenizer, method).answer, SENTENCES[0])
        picture = Picture(svg.draw(SENTENCES[0], [(method, frames)]))
        assert tokens_in(picture.at(None)) == tokens_of(frames[-1])


def test_text_that_xml_would_misread_is_shown_as_it_is():
    topic = FrameTopic((" <b>", "&amp;"), 1)
    frames = [
        Frame((FrameRound((" <i>", " &", "\x00", " ]]>\n"), (topic,), ((None, " '\""),)),), 1, 0, 1, 1, ""),
        Frame(
            (FrameRound((" <i>", " &", "\x00", " ]]>\n"), (topic,), ((" </svg>", " '\""),)),), 1, 1, 2, 2, "finished"
        ),
    ]
    text = svg.draw("<eos> & \x1b[1m\ufffe", [("planned", frames)])
    texts = [element.text for element in Picture(text).at(None) if element.tag.endswith("text")]
    assert {"<eos> & ?[1m?", "<i>", "&", "?", "]]>", "<b>", "&amp;", "</svg>", "'\"", "<b>&amp;:"} <= set(texts)


def test_lines_break_between_words_and_lose_nothing_but_space():
    for seed in each(range(50)):
        rng = random.Random(seed)
        columns = rng.randint(1, 12)
        tokens = [
            rng.choice(["", " "]) + "".join(rng.choices("abc\n ", (9, 9, 9, 1, 1), k=rng.randint(0, 5)))
            for _ in range(30)
        ]
        places = [*svg.flow(tokens, columns)]
        assert "".join(text for *_, text in places).replace(" ", "") == "".join("".join(tokens).split())
        cells = {}
        for n, line, column, text in places:
            for i, character in enumerate(text):
                assert (line, column + i) not in cells and column + i < columns
                cells[line, column + i] = character
            assert text in tokens[n]
        lines = [
            "".join(cells.get((line, i), " ") for i in range(columns)) for line in range(max(n for n, _ in cells) + 1)
        ]
        words = "".join(tokens).split()
        if max(map(len, words)) <= columns:
            assert " ".join(lines).split() == words


def test_the_picture_of_the_readme_shows_what_the_shipped_models_answer():
    text = (ROOT / "docs/answer.svg").read_text(encoding="utf-8")
    shown = Counter(words_in(Picture(text).at(None)))
    for path in MODELS.values():
        result = Sampler.load(path, SampleConfig()).answer([PROMPTS["tasks"]])[0].result()
        assert not Counter(result["text"].split()) - shown
        assert f"finished after {result['plan_passes'] + result['denoise_passes']} passes" in text


def run(monkeypatch, script, *args):
    """Run a script as the command line does. Returns what it exits with, None if it does not."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as exit_:
        return exit_.code
    return None


def test_the_command_writes_the_picture(monkeypatch, capsys, tmp_path, race):
    frames, _, text = race
    assert run(monkeypatch, "demo/svg.py", "--prompt", RIVER, "--out", tmp_path / "a.svg", "--device", "cpu") is None
    written = Picture((tmp_path / "a.svg").read_text(encoding="utf-8"))
    assert words_in(written.at(None)) == words_in(Picture(text).at(None))
    assert f"{len(frames['planned'])} passes and {len(frames['ar'])} passes" in capsys.readouterr().out


WRONG = [
    (("--planned", "NONE"), "NONE does not exist"),
    (("--device", "abacus"), "--device abacus"),
]


def test_the_command_says_in_one_line_what_is_wrong(monkeypatch):
    for args, said in each(WRONG):
        code = run(monkeypatch, "demo/svg.py", "--prompt", RIVER, "--device", "cpu", *args)
        assert code.startswith("svg.py: ") and said in code and "\n" not in code


# ---------------------------------------------------------------- the mask


@pytest.mark.parametrize("blocks", [True, False])
def test_the_drawn_mask_has_a_row_per_query_and_tells_the_kinds_of_keys_apart(blocks):
    layout, tokenizer = otter("sparse")
    *rows, legend = mask_lines(layout, tokenizer, blocks=blocks)
    inks = re.findall(r"(\S) (?:prompt|plan and|tags and|slot)", legend)
    assert len(set(inks)) == 4 and len(rows) == len(layout)
    assert max(map(len, [*rows, legend])) <= 80
    drawn = [[*row[13:]] for row in rows]
    for row, sees in zip(drawn, seen(layout).tolist()):
        assert row == [
            inks[kind] if see else row[-1] if not sees[-1] else row[i]
            for i, (see, kind) in enumerate(zip(sees, layout.kind))
        ]
    assert blocks or "".join(rows).isascii()


def test_without_matplotlib_a_picture_of_the_mask_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code = run(monkeypatch, "show/mask.py", "--png", tmp_path / "mask.png")
    assert code == "mask.py: --png needs matplotlib: pip install matplotlib"


def test_the_picture_of_the_mask_has_a_key_and_can_be_read_on_light_and_dark_pages(monkeypatch, tmp_path):
    figures = pytest.importorskip("matplotlib.figure")
    colors = pytest.importorskip("matplotlib.colors")
    drawn, save = [], figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda figure, *a, **b: drawn.append(figure) or save(figure, *a, **b)
    )
    assert run(monkeypatch, "show/mask.py", "--png", tmp_path / "mask.png") is None
    *axes, last = drawn[0].axes
    key = last.get_legend()
    names = dict(zip((text.get_text() for text in key.get_texts()), (p.get_facecolor() for p in key.get_patches())))
    assert [*names] == [*(name for name, *_ in KINDS.values()), "not seen"] and len({*names.values()}) == 5
    for axis in axes:
        used = {tuple(cell) for row in axis.images[0].get_array().tolist() for cell in row}
        assert used == {*names.values()} and axis.get_title() in ATTENTION
    assert drawn[0].get_facecolor()[3] == 0 and not any(axis.get_frame_on() and axis.axison for axis in drawn[0].axes)
    light = [
        sum(
            w * (c / 12.92 if c < 0.04 else ((c + 0.055) / 1.055) ** 2.4)
            for w, c in zip((0.2126, 0.7152, 0.0722), colors.to_rgb(colour))
        )
        for colour in ("#fff", INK, "#0d1117")
    ]
    assert light[0] + 0.05 > 4 * (light[1] + 0.05) > 16 * (light[2] + 0.05)
