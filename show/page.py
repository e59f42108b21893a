"""Write a page that plays answers pass by pass: one file without network, for any browser.

`sample.py --html` and `demo/demo.py --html` call it. The page is player.html with its style, script and data written into
it; the data are those of the recordings (record.py), in the shape that the script builds the page from.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from plumbing.files import write_whole
from plumbing.settings import printable
from show.record import Frame, action, counted, denoises, since

FOLDER = Path(__file__).parent


class Race(NamedTuple):
    """One prompt and its answers, which the page plays side by side."""

    prompt: str
    answers: Sequence[tuple[str, str, Sequence[Frame]]]  # title, method, recording


class Places:
    """What a recording tells about each part of its answer."""

    def __init__(self, frames: Sequence[Frame]):
        self.since, self.kept, self.unsure, self.looks = since(frames), {}, {}, {}
        for n, draw in ((n, draw) for n, frame in enumerate(frames, 1) for draw in frame.draws):
            if draw.outcome in ("new", "accepted"):
                self.kept[draw.part] = draw
            elif draw.outcome == "unsure":
                self.unsure.setdefault(draw.part, []).append(round(draw.probability, 3))
            if draw.likeliest and draw.outcome != "rejected":
                likeliest = [(text, round(probability, 3)) for text, probability in draw.likeliest]
                self.looks.setdefault(draw.part, []).append((n, draw.waits, likeliest))

    def token(self, part: tuple, text: str | None) -> dict:
        """A token of the page: its text, the pass that wrote it (None: none did), and how sure the model was of it.

        `unsure` holds, of a slot, what the passes before gave the token that they drew for it and did not keep; `looks`,
        of a recording that has them, the likeliest tokens of each pass that drew it, and what it waited for.
        """
        token = {"part": name(part), "text": text or "", "since": self.since.get(part)}
        if part[0] == "slot":
            token["unsure"] = self.unsure.get(part, [])
        if draw := self.kept.get(part):
            token |= {"probability": round(draw.probability, 3), "draft": draw.outcome == "accepted"}
        if part in self.looks:
            token["looks"] = self.looks[part]
        return token


def name(part: tuple | None) -> str | None:
    """A part as the page names it, such as slot-0-2-5."""
    return part and "-".join(map(str, part))


def tree(frames: Sequence[Frame]) -> list[dict]:
    """The rounds of an answer in the page's data."""
    places, rounds = Places(frames), []
    for r, round_ in enumerate(frames[-1].rounds):
        topics = [
            {
                "since": places.since["topic", r, k],
                "name": [places.token(("name", r, k, n), text) for n, text in enumerate(topic.name)],
                "length": places.token(("length", r, k), f" {topic.length}"),
            }
            for k, topic in enumerate(round_.topics)
        ]
        spans = [
            {
                "since": places.since["span", r, k],
                "topic": "".join(round_.topics[k].name).strip() if round_.topics else "",
                "slots": [places.token(("slot", r, k, n), text) for n, text in enumerate(span)],
            }
            for k, span in enumerate(round_.spans)
        ]
        text = [places.token(("text", r, n), text) for n, text in enumerate(round_.text)]
        rounds.append({"text": text, "topics": topics, "spans": spans})
    return rounds


def steps(method: str, frames: Sequence[Frame]) -> list[dict]:
    """The passes of an answer in the page's data."""
    return [
        {
            "action": action(method, before, frame),
            "denoises": denoises(before, frame),
            "critical_path": frame.critical_path,
            "positions": frame.positions,
            "accepted": sum(draw.outcome == "accepted" for draw in frame.draws),
            "rejected": [[name(draw.part), draw.text, round(draw.probability, 3)]
                         for draw in frame.draws if draw.outcome == "rejected"],
        }
        for before, frame in zip([None, *frames], frames)
        if frame.passes
    ]  # fmt: skip


def data(races: Sequence[Race]) -> list[dict]:
    """All that the page plays."""
    return [
        {
            "prompt": printable(prompt),
            "answers": [
                {"title": title, "ending": frames[-1].ending, "rounds": tree(frames), "passes": steps(method, frames)}
                for title, method, frames in answers
            ],
        }
        for prompt, answers in races
    ]


def page(races: Sequence[Race]) -> str:
    """The page as HTML; without races it waits for its script's `load`."""
    text = json.dumps(data(races), separators=(",", ":"))
    contents = {
        "title": html.escape(printable(races[0].prompt if races else "Answers, pass by pass")),
        "style": (FOLDER / "player.css").read_text(encoding="utf-8"),
        "script": (FOLDER / "player.js").read_text(encoding="utf-8"),
        "data": text.replace("<", "\\u003c"),  # nothing in it ends the script element
    }
    template = (FOLDER / "player.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: contents[match[1]], template)


def write_page(path: str | Path, races: Sequence[Race]) -> str:
    """Write the page. Returns a line that says what is in it."""
    write_whole(Path(path), page(races))
    passes = [counted(frames[-1].passes, "pass", "passes") for race in races for *_, frames in race.answers]
    return f"{path}: {', '.join(passes)}"
