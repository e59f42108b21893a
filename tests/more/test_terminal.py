"""An answer as it is written in a terminal, or where its output is piped to."""

import io
import itertools
import json
import re
import sys
from functools import partial
from types import SimpleNamespace

import pytest
from conftest import SENTENCES, each
from test_show import ROOT, random_sampler, run

from demo import demo
from methods import DECODERS
from show.record import counted
from show.terminal import BOLD, FADED, NEW, PAUSE, Screen, Token, wrap


class Terminal(io.StringIO):
    """A terminal: keeps the lines that are on it, and those before each jump up."""

    def __init__(self):
        super().__init__()
        self.lines, self.row, self.column, self.widest, self.styles, self.frames = [""], 0, 0, 0, set(), []
        self.written = ""

    def isatty(self):
        return True

    def write(self, text):
        self.written += text
        for part in re.split(r"(\x1b\[\d+A|\x1b\[K|\x1b\[[\d;]*m|\n)", text):
            if up := re.fullmatch(r"\x1b\[(\d+)A", part):
                self.frames.append([*self.lines])
                self.row -= int(up[1])
                assert self.row >= 0
            elif part == "\x1b[K":
                self.lines[self.row] = self.lines[self.row][: self.column]
            elif part == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif part.startswith("\x1b"):
                self.styles.add(part)
            else:
                line, self.column = self.lines[self.row], self.column + len(part)
                self.lines[self.row] = line[: self.column - len(part)] + part + line[self.column :]
                self.widest = max(self.widest, self.column)


def watched(monkeypatch, tokenizer, method, prompt=SENTENCES[0], columns=80, delay=0):
    """An answer of a random model, the terminal that it was shown in, and the last frame."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "99")
    terminal = Terminal()
    (answer,) = random_sampler(tokenizer, method).answer([prompt], watch=Screen(terminal, delay=delay))
    return answer, terminal, terminal.lines[: -1 - answer.cut - answer.looping]


def test_in_a_terminal_frames_overwrite_each_other_and_no_line_is_too_long(monkeypatch, tokenizer):
    for columns, prompt in each(itertools.product([40, 60, 80], [SENTENCES[0], "", "long" * 40])):
        answer, terminal, end = watched(monkeypatch, tokenizer, "planned", prompt, columns)
        assert answer.denoise_passes and len(terminal.frames) == answer.plan_passes + answer.denoise_passes
        assert sum(line.strip().startswith("prompt") for line in end) == 1, "the last frame alone is left"
        assert "".join(end).count("____") == 1, "in the legend"
        assert terminal.widest < columns


def test_no_line_moves_and_each_slot_keeps_its_columns_while_its_span_fills(monkeypatch, tokenizer):
    for method, columns in each(itertools.product(DECODERS, [40, 80])):
        _, terminal, (*end, _) = watched(monkeypatch, tokenizer, method, columns=columns)
        assert all(len(frame) == len(end) + 2 for frame in terminal.frames)
        check_places(terminal.frames, end)


def check_places(frames, end):
    """What a frame shows is, but for its last line, masked or where it is in the end."""
    for line, ended in (pair for *lines, _, _ in frames for pair in zip(lines, end)):
        assert len(line) <= len(ended) and all(c in (" ", "_", known) for c, known in zip(line, ended)), (line, ended)


def test_lines_break_between_words_whatever_tokens_they_are_made_of():
    lines = wrap("", [*map(Token, ("for", " 5", "-", "6", " mi", "n", ".\nDone", " !"))], 6)
    assert ["".join(token.text for token in tokens) for _, tokens in lines] == ["for", "5-6", "min.", "Done !"]


def test_the_last_line_counts_passes_and_says_what_they_do(monkeypatch, tokenizer):
    for method, verb in each(
        [("planned", "denoises"), ("parallel-ar", "extends"), ("ar", "writes"), ("block", "denoises")]
    ):
        answer, terminal, end = watched(monkeypatch, tokenizer, method)
        total = answer.plan_passes + answer.denoise_passes
        for n, frame in enumerate(terminal.frames, 1):
            assert re.fullmatch(rf" {{14}}pass {n} of {total}: (writes|{verb}) [\w ]+", frame[-2])
        assert verb in "".join(frame[-2] for frame in terminal.frames)
        assert end[-1].strip().startswith(counted(total, "pass", "passes"))


def test_a_legend_says_what_the_number_in_a_plan_is(monkeypatch, tokenizer):
    answer, _, end = watched(monkeypatch, tokenizer, "planned", columns=200)
    topic = next(round_ for round_ in answer.decoded() if round_.spans).spans[0]
    said = (
        f"({topic.topic} {topic.length}: {topic.length} x {tokenizer.unit} slots, a token each; ____ masked, · empty)"
    )
    assert [line.strip() for line in end].count(said) == 1
    assert "masked" in "".join(watched(monkeypatch, tokenizer, "block")[2])
    assert "masked" not in "".join(watched(monkeypatch, tokenizer, "ar")[2])


def test_a_terminal_may_be_of_any_colour_and_what_was_new_does_not_stay_marked(monkeypatch, tokenizer):
    _, terminal, _ = watched(monkeypatch, tokenizer, "planned")
    assert terminal.styles == {"\x1b[0m", *(f"\x1b[{style}m" for style in (FADED, BOLD, NEW))}
    assert {FADED, BOLD, NEW} <= {"1", "2", "4", "7"}, "a colour is hard to read on some background"
    assert f"\x1b[{NEW}m" in terminal.written and f"\x1b[{NEW}m" not in re.split(r"\x1b\[\d+A", terminal.written)[-1]


def test_frames_stay_longer_before_what_passes_do_changes(monkeypatch, tokenizer):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    _, terminal, _ = watched(monkeypatch, tokenizer, "planned", delay=1)
    says = [*(frame[-2].partition(": ")[2] for frame in terminal.frames), ""]
    assert slept == [PAUSE if now != then else 1 for now, then in zip(says, says[1:])] + [1]


def test_piped_frames_are_few_and_plain(tokenizer):
    stream = io.StringIO()
    (answer,) = random_sampler(tokenizer, "planned").answer(["long " * 40], watch=Screen(stream, delay=9))
    heads = re.findall("^-- (.*)", stream.getvalue(), re.MULTILINE)
    assert 2 <= len(heads) < answer.plan_passes + answer.denoise_passes
    assert re.fullmatch(r"pass \d+ of \d+: .*", heads[0]) and re.fullmatch(r"\d+ passes: .*", heads[-1])
    first, last = stream.getvalue().split("-- ")[1 :: len(heads) - 1]
    masked = lambda text: "__" in text.replace("____ masked", "")
    assert masked(first) and not masked(last)
    assert "\x1b" not in stream.getvalue() and max(map(len, stream.getvalue().splitlines())) <= 80


class Tty(io.StringIO):
    """A terminal that keeps all that was written."""

    def isatty(self):
        return True


def plain(text):
    return re.sub(r"\x1b\[[\d;]*[mAK]", "", text)


def test_the_terminal_ends_with_all_text_of_an_answer(monkeypatch, tokenizer):
    """Also if it has fewer lines than the answer: nothing overwrites the last frame, so all of it is printed."""
    for stream, method in each(itertools.product([io.StringIO, Tty], DECODERS)):
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("LINES", "3")
        stream = stream()
        (answer,) = random_sampler(tokenizer, method).answer([SENTENCES[0]], watch=Screen(stream, delay=0))
        last = re.split(r"\x1b\[\d+A|-- .*\n", stream.getvalue())[-1].replace("·", "")
        margin = [line[14:] for line in plain(last).splitlines()]
        joined = "".join("".join(margin).split())
        for piece in (SENTENCES[0], *answer.result()["text"].split("\n")):
            assert "".join(piece.split()) in joined
        assert "____" not in last.replace("____ masked", "")


def test_one_screen_can_show_one_answer_after_another(tokenizer):
    stream = Tty()
    screen, sampler = Screen(stream, delay=0), random_sampler(tokenizer, "ar")
    for prompt in ("one", "two"):
        sampler.answer([prompt], watch=screen)
    second = stream.getvalue().index("two")
    assert not re.search(r"\x1b\[\d+A", stream.getvalue()[stream.getvalue().rindex("one") : second])


@pytest.mark.parametrize("stream", [io.StringIO, Tty])
def test_an_answer_without_a_pass_is_shown(tokenizer, stream):
    stream = stream()
    (answer,) = random_sampler(tokenizer, "planned", max_tokens=1).answer(["otter"])
    assert not answer.phase and answer.cut
    Screen(stream, delay=0)(answer)
    assert "prompt  otter" in plain(stream.getvalue())


def test_letters_that_take_two_columns_do_not_overrun_a_line(monkeypatch, tokenizer):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Tty()
    random_sampler(tokenizer, "ar", max_tokens=2).answer(["水獺吃魚" * 20], watch=Screen(stream, delay=0))
    lines = [line for line in plain(stream.getvalue()).splitlines() if "水" in line or "魚" in line]
    assert sum(len(re.findall("[水獺吃魚]", line)) for line in lines) == 2 * 80, "in two frames"
    assert all(14 + 2 * len(line[14:]) < 40 for line in lines)


SHORT = ("--device", "cpu", "--prompt", "Straße 水獺", "--max_tokens", 8)


def test_a_terminal_without_utf8_shows_what_it_can(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert run(monkeypatch, "sample.py", *SHORT) is None
    assert b"prompt  Stra?e ??" in sys.stdout.buffer.getvalue()


# ---------------------------------------------------------------- the demo


def test_the_demo_fits_the_terminal(monkeypatch):
    """Also one of 60 columns; and all of it is there: each run with what it is, and its numbers side by side."""
    for data, columns in each([("tasks", 60), ("recipes", 80)]):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", "99")
        monkeypatch.setattr(sys, "stdout", terminal := Terminal())
        monkeypatch.setattr(demo, "measure", partial(demo.measure, repeats=1))
        monkeypatch.setattr(sys, "argv", ["demo.py", "--data", data, "--delay", "0", "--device", "cpu"])
        demo.main()
        assert terminal.widest <= columns
        check_places(terminal.frames, terminal.lines)
        said, *table = "\n".join(terminal.lines).split("side by side\n")
        runs = demo.RUNS[data]
        assert all(f"=== {data}: {run.title}\n" in said and run.what in " ".join(said.split()) for run in runs)
        passes = re.search(r"passes(( +\d+)+)\n", table[0])[1].split()
        assert passes == re.findall(r"^ {14}(\d+) pass", said, re.MULTILINE) and len(passes) == len(runs)


def test_who_waits_is_told_how_far_it_is(monkeypatch):
    """In one line, which goes away; and only in a terminal."""
    monkeypatch.setenv("COLUMNS", "40")
    for stream in (Tty(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        sampler = SimpleNamespace(answer=lambda prompts: [SimpleNamespace(result=lambda: {"seconds": 1.0})])
        assert demo.measure(sampler, "otters " * 9, "?", repeats=2)["seconds"] == 1
        lines = stream.getvalue().split("\r\x1b[K")
        assert lines == (["", *[f"timing {'otters ' * 9}"[:39]] * 2, ""] if stream.isatty() else [""])


def test_the_recipe_is_the_first_of_its_test_split():
    path = ROOT / "data/recipes/test.jsonl"
    if not path.exists():
        pytest.skip("needs `make data`")
    with path.open(encoding="utf-8") as lines:
        assert json.loads(next(lines))["prompt"] == demo.PROMPTS["recipes"]
