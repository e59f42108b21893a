"""What an assignment is made of: probes, wrong solutions, and how a difference is found and drawn.

An assignment (assignments/hw1_tags.py and so on) is a file that declares

    TITLE, HOURS      its name, and how long it takes
    TESTS_TAKE        minutes of CPU that its tests take
    FUNCTIONS         {"masks.py": ("Layout.write", "visible")}: what is to be built, by qualified name
    HANDOUT           Markdown: what to read, what to build, hints in steps
    WRITTEN           points for written answers that a person gives (optional)
    WRONG             plausible wrong solutions, each a `Wrong`
    probes            functions decorated with `check`

The points of all probes, FILES and WRITTEN make 100. A probe is called as `probe(rng, size)`: it imports what it needs
from the project (inside the function), makes inputs from `rng`, a numpy Generator, calls what is to be built, and
returns plain data: numbers, texts, lists, dicts, tensors and arrays. It runs on the solution when the assignment is
built, which gives the expected values, and later on each submission. Where a right solution may draw its random
numbers in another order, a probe has to return facts that do not depend on them.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FILES = 5  # points for leaving the tests as they were handed out
PUBLIC, HIDDEN = 1, 3  # sizes of a probe's inputs: in the student tree, and in the autograder alone
LONGEST = 20_000  # characters of a picture that are kept
CASES = {PUBLIC: 2, HIDDEN: 2}  # how many cases of each size a probe has

Draw = Callable[[Any, Any], str]


@dataclass(frozen=True)
class Check:
    """What is known of a probe besides its body."""

    points: int  # half of them for the public cases, half for the hidden ones
    idea: str  # the sentence that a submission missed if the probe fails
    draw: Draw | None  # draw(expected, came) -> a picture of lines of text
    seconds: float  # of CPU, for all cases of one size
    tolerance: float  # relative, and a tenth of it absolute


def check(points: int, idea: str, draw: Draw | None = None, seconds: float = 20, tolerance: float = 1e-3) -> Callable:
    """Make a function a probe; the arguments are those of `Check`."""

    def decorate(probe: Callable) -> Callable:
        probe.check = Check(points, idea, draw, seconds, tolerance)
        return probe

    return decorate


@dataclass(frozen=True)
class Wrong:
    """A plausible wrong solution: the solution with one text, which occurs exactly once in the file, replaced."""

    name: str
    file: str
    old: str
    new: str
    loses: str | tuple[str, ...]  # the probes that have to fail, by name; at least one other has to pass


def probes_of(module: Any) -> dict[str, Callable]:
    """The probes of an assignment's module by name, in the order in which they are written."""
    return {name: value for name, value in vars(module).items() if hasattr(value, "check")}


# ---------------------------------------------------------------- differences


def difference(expected: Any, came: Any, tolerance: float, path: str = "") -> tuple[str, Any, Any] | None:
    """The first place where plain data differ, and what is expected and what came there; None if nowhere."""
    if isinstance(expected, dict) and isinstance(came, dict) and expected.keys() == came.keys():
        pairs = [(f"{path}.{key}" if path else key, expected[key], came[key]) for key in expected]
    elif isinstance(expected, list) and isinstance(came, list) and len(expected) == len(came):
        pairs = [(f"{path}[{i}]", e, c) for i, (e, c) in enumerate(zip(expected, came))]
    else:
        return None if _same(expected, came, tolerance) else (path, expected, came)
    return next((found for p, e, c in pairs if (found := difference(e, c, tolerance, p))), None)


def _same(expected: Any, came: Any, tolerance: float) -> bool:
    numbers = isinstance(expected, (int, float)) and isinstance(came, (int, float))
    if not numbers or not isinstance(expected, float) and not isinstance(came, float):
        return expected == came and isinstance(expected, str) == isinstance(came, str)
    if expected != expected or came != came:  # NaN
        return expected != expected and came != came
    try:
        return math.isclose(expected, came, rel_tol=tolerance, abs_tol=tolerance / 10)
    except OverflowError:  # an int beyond all floats
        return False


def message(check_: Check, expected: Any, came: Any, found: tuple[str, Any, Any]) -> str:
    """What is said of a case that fails: the idea, the first difference, and a picture where there is one."""
    path, e, c = found
    lines = [f"idea: {check_.idea}", f"{path or 'the result'}: expected {short(e)}, came {short(c)}"]
    if isinstance(e, list) and isinstance(c, list):
        lines[-1] += f" (a list of {len(e)}, and one of {len(c)})"
    if check_.draw:
        try:
            lines.append(str(check_.draw(expected, came))[:LONGEST])
        except Exception as error:  # what came may have any shape, and a picture is not worth the run
            lines.append(f"(what came cannot be drawn: {error!r:.200})")
    return "\n".join(lines)


def short(value: Any, longest: int = 200) -> str:
    """A value as text, cut in the middle where it is long."""
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


# ---------------------------------------------------------------- pictures

WIDE = 80  # columns of a terminal


def draw_mask(expected: Any, came: Any) -> str:
    """Two masks (lists of rows of truth values) as one picture; with names of the tokens if given.

    `expected`, `came`: rows, or a dict {"mask": rows, "names": texts}; rows are queries, columns are keys. Of wide
    masks those columns are drawn in which the first wrong one is.
    """
    names = expected.get("names") if isinstance(expected, dict) else None
    expected, came = (mask["mask"] if isinstance(mask, dict) else mask for mask in (expected, came))
    ink = {(1, 1): "#", (0, 0): ".", (0, 1): "X", (1, 0): "O", (1, None): "?", (0, None): "?"}
    drawn, wide = [], WIDE - 17
    for n, row in enumerate(expected):
        cells = came[n] if n < len(came) else []
        cells = [*map(bool, cells[: len(row)]), *[None] * (len(row) - len(cells))]
        drawn.append("".join(ink[bool(e), c] for e, c in zip(row, cells)))
    first = min((found.start() for line in drawn if (found := re.search("[XO?]", line))), default=0) // wide * wide
    lines = ["# sees, . does not; wrong: X sees but must not,", "O must see but does not, ? is missing"]
    if (n_keys := max(map(len, drawn), default=0)) > wide:
        lines.append(
            f"keys {first} to {min(first + wide, n_keys) - 1} of {n_keys}; <- marks rows that are wrong anywhere"
        )
    for n, line in enumerate(drawn):
        label = names[n].strip() if names else str(n)
        lines.append(f"{label[:12]:>12} {line[first : first + wide]}" + ("  <-" if set(line) & set("XO?") else ""))
    return "\n".join(lines)


def draw_rows(expected: Any, came: Any) -> str:
    """Columns of equal length side by side, one line per entry, wrong ones marked.

    `expected`, `came`: dicts of lists; a list "names" (of texts) only labels the lines. Of long lists the lines around
    the first wrong one are drawn; where there is no room for all columns, wrong ones go before others.
    """
    names = expected.get("names")
    columns = [key for key in expected if key != "names" and isinstance(expected[key], list)]
    cell = lambda table, key, i: short(table[key][i], 20) if i < len(table[key]) else "-"
    n = max(len(expected[key]) for key in columns) + 1  # the last is of what came in excess
    wrong = [{key for key in columns if cell(expected, key, i) != cell(came, key, i)} for i in range(n)]
    first = max(0, next((i for i, keys in enumerate(wrong) if keys), 0) - 8)
    shown = range(first, min(n - (not wrong[-1]), first + 24))
    both = lambda key, i: cell(expected, key, i) + (f" came {cell(came, key, i)} X" if key in wrong[i] else "")
    width = {key: 2 + max(map(len, [key[:24], *(both(key, i) for i in shown)])) for key in columns}
    kept, left = [], WIDE - 15
    for key in sorted(columns, key=lambda key: not any(key in wrong[i] for i in shown)):
        left -= width[key]
        kept += [key] if left >= 0 or not kept else []
    kept.sort(key=columns.index)
    lines = [" " * 15 + "".join(f"{key[:24]:>{width[key]}}" for key in kept)]
    for i in shown:
        label = names[i].strip() if names and i < len(names) else str(i)
        lines.append(f"{label[:15]:>15}" + "".join(f"{both(key, i):>{width[key]}}" for key in kept))
    return "\n".join(lines)
