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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FILES = 5  # points for leaving the tests as they were handed out
PUBLIC, HIDDEN = 1, 3  # sizes of a probe's inputs: in the student tree, and in the autograder alone
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


def plain(value: Any) -> Any:
    """What a probe returned as JSON knows it. Raises TypeError for what is no plain data."""
    if hasattr(value, "tolist"):  # a tensor or an array
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} came where a number, a text, a list, a dict or a tensor was expected")


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
    if math.isnan(expected) or math.isnan(came):
        return math.isnan(expected) and math.isnan(came)
    return math.isclose(expected, came, rel_tol=tolerance, abs_tol=tolerance / 10)


def message(check_: Check, expected: Any, came: Any, found: tuple[str, Any, Any]) -> str:
    """What is said of a case that fails: the idea, the first difference, and a picture where there is one."""
    path, e, c = found
    lines = [f"idea: {check_.idea}", f"{path or 'the result'}: expected {short(e)}, came {short(c)}"]
    if isinstance(e, list) and isinstance(c, list):
        lines[-1] += f" (a list of {len(e)}, and one of {len(c)})"
    if check_.draw:
        try:
            lines.append(check_.draw(expected, came))
        except Exception as error:  # what came may have any shape, and a picture is not worth the run
            lines.append(f"(what came cannot be drawn: {error!r:.200})")
    return "\n".join(lines)


def short(value: Any, longest: int = 200) -> str:
    """A value as text, cut in the middle where it is long."""
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


# ---------------------------------------------------------------- pictures


def draw_mask(expected: Any, came: Any) -> str:
    """Two masks (lists of rows of truth values) as one picture; with names of the tokens if given.

    `expected`, `came`: rows, or a dict {"mask": rows, "names": texts}; rows are queries, columns are keys.
    """
    names = expected.get("names") if isinstance(expected, dict) else None
    expected, came = (mask["mask"] if isinstance(mask, dict) else mask for mask in (expected, came))
    ink = {(1, 1): "#", (0, 0): ".", (0, 1): "X", (1, 0): "O", (1, None): "?", (0, None): "?"}
    lines = ["# sees, . does not; wrong: X sees but must not, O must see but does not, ? is missing"]
    for n, row in enumerate(expected):
        cells = came[n] if n < len(came) else []
        cells = [*map(bool, cells[: len(row)]), *[None] * (len(row) - len(cells))]
        drawn = "".join(ink[bool(e), c] for e, c in zip(row, cells))
        label = names[n].strip() if names else str(n)
        lines.append(f"{label[:12]:>12} {drawn}" + ("  <-" if set(drawn) & set("XO?") else ""))
    return "\n".join(lines)


def draw_rows(expected: Any, came: Any) -> str:
    """Columns of equal length side by side, one line per entry, wrong ones marked.

    `expected`, `came`: dicts of lists; a list "names" (of texts) only labels the lines. Of long lists the lines around
    the first wrong one are drawn.
    """
    names = expected.get("names")
    columns = [key for key in expected if key != "names" and isinstance(expected[key], list)]
    n = max(len(table[key]) for table in (expected, came) for key in columns)
    cell = lambda table, key, i: short(table[key][i], 24) if i < len(table[key]) else "-"
    wrong = [{key for key in columns if cell(expected, key, i) != cell(came, key, i)} for i in range(n)]
    first = max(0, next((i for i, keys in enumerate(wrong) if keys), 0) - 8)
    lines = [" " * 16 + "".join(f"{key[:24]:>26}" for key in columns)]
    for i in range(first, min(n, first + 24)):
        label = names[i].strip() if names and i < len(names) else str(i)
        both = lambda key: cell(expected, key, i) + (f" came {cell(came, key, i)} X" if key in wrong[i] else "")
        lines.append(f"{label[:15]:>15} " + "".join(f"{both(key):>26}" for key in columns))
    return "\n".join(lines)
