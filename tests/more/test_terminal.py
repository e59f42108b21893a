"""An answer as it is written in a terminal, or where its output is piped to."""

import io
import itertools
import re
import sys

import pytest
from conftest import SENTENCES, each
from test_show import random_sampler, run

from methods import DECODERS
from show.terminal import Screen


class Terminal(io.StringIO):
    """A terminal of `columns`: keeps the lines that are on it, obeying cursor up and erase below."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.lines, self.row, self.widest, self.redrawn = columns, [""], 0, 0, 0

    def isatty(self):
        return True

    def write(self, text):
        for part in re.split(r"(\x1b\[\d+A|\x1b\[J|\x1b\[[\d;]*m|\n)", text):
            if up := re.fullmatch(r"\x1b\[(\d+)A", part):
                self.row, self.redrawn = self.row - int(up[1]), self.redrawn + 1
                assert self.row >= 0
            elif part == "\x1b[J":
                self.lines[self.row :] = [""]
            elif part == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif not part.startswith("\x1b"):
                self.lines[self.row] += part
                self.widest = max(self.widest, len(self.lines[self.row]))


@pytest.fixture(scope="module")
def drawn(tokenizer):
    return random_sampler(tokenizer, "planned")


def test_in_a_terminal_frames_overwrite_each_other_and_no_line_is_too_long(monkeypatch, drawn):
    for columns, prompt in each(itertools.product([40, 100], [SENTENCES[0], "", "long" * 40])):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", "50")
        terminal = Terminal(columns)
        (answer,) = drawn.answer([prompt], watch=Screen(terminal, delay=0))
        assert answer.denoise_passes and terminal.redrawn == answer.plan_passes + answer.denoise_passes - 1
        assert sum(line.strip().startswith("prompt") for line in terminal.lines) == 1, "the last frame alone is left"
        assert "____" not in "".join(terminal.lines)
        assert terminal.widest <= columns


def test_piped_frames_are_few_and_plain(drawn):
    stream = io.StringIO()
    (answer,) = drawn.answer([SENTENCES[0]], watch=Screen(stream, delay=9))
    frames = stream.getvalue().count("-- after")
    assert 2 <= frames < answer.plan_passes + answer.denoise_passes
    assert "____" in stream.getvalue() and "____" not in stream.getvalue().rpartition("-- after")[2]
    assert "\x1b" not in stream.getvalue()


class Tty(io.StringIO):
    """A terminal that keeps all that was written."""

    def isatty(self):
        return True


def plain(text):
    return re.sub(r"\x1b\[[\d;]*[mAJ]", "", text)


def test_the_terminal_ends_with_all_text_of_an_answer(monkeypatch, tokenizer):
    """Also if it has fewer lines than the answer: nothing overwrites the last frame, so all of it is printed."""
    for stream, method in each(itertools.product([io.StringIO, Tty], DECODERS)):
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("LINES", "3")
        stream = stream()
        (answer,) = random_sampler(tokenizer, method).answer([SENTENCES[0]], watch=Screen(stream, delay=0))
        last = re.split(r"\x1b\[J|-- after.*\n", stream.getvalue())[-1]
        margin = [line[14:] for line in plain(last).splitlines()]
        joined = "".join("".join(margin).split())
        for piece in (SENTENCES[0], *answer.result()["text"].split("\n")):
            assert "".join(piece.split()) in joined
        assert "____" not in last


def test_one_screen_can_show_one_answer_after_another(tokenizer):
    stream = Tty()
    screen, sampler = Screen(stream, delay=0), random_sampler(tokenizer, "ar")
    for prompt in ("one", "two"):
        sampler.answer([prompt], watch=screen)
    second = stream.getvalue().index("two")
    assert "\x1b[J" not in stream.getvalue()[stream.getvalue().rindex("one") : second]


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
    assert sum(len(re.findall("[水獺吃魚]", line)) for line in lines) == 80
    assert all(14 + 2 * len(line[14:]) < 40 for line in lines)


SHORT = ("--device", "cpu", "--prompt", "Straße 水獺", "--max_tokens", 8)


def test_a_terminal_without_utf8_shows_what_it_can(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert run(monkeypatch, "sample.py", *SHORT) is None
    assert b"prompt  Stra?e ??" in sys.stdout.buffer.getvalue()
