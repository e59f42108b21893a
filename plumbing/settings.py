"""Settings as dataclasses: one field per setting, from which every `--help` is made. And what all commands share."""

import argparse
import errno
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]  # the project's folder


def setting(default: Any, help: str, at_least: float = -math.inf, above: float = -math.inf, at_most: float = math.inf,
            below: float = math.inf, among: Iterable[str] = (), acts: Iterable[Any] = ()) -> Any:  # fmt: skip
    """A dataclass field with the sentence that `--help` shows and the values that `check` allows.

    `among`: the words that are allowed; `--help` lists them. `acts`: all of these have to hold for the setting to
    change anything (config.Acts); `refuse_idle` looks.
    """
    among = tuple(among)
    if among:
        help += f": {', '.join(filter(None, among))}"
    limits = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    return field(default=default, metadata={"help": help, "limits": limits, "among": among, "acts": acts})


def check(config: Any) -> None:
    """Raise ValueError for the first setting of a dataclass that is not allowed. Call it in `__post_init__`."""
    for f in fields(config):
        if "limits" not in f.metadata:
            continue
        value, among = getattr(config, f.name), f.metadata["among"]
        if among and value not in among:
            raise ValueError(f"--{f.name} {value}: expected one of {', '.join(among)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        limits = {word: limit for word, limit in f.metadata["limits"].items() if math.isfinite(limit)}
        kept = {"at least": value >= limits.get("at least", value), "above": value > limits.get("above", -math.inf),
                "at most": value <= limits.get("at most", value), "below": value < limits.get("below", math.inf)}  # fmt: skip
        if isinstance(value, float) and not math.isfinite(value) or not all(kept.values()):
            expected = " and ".join(f"{word} {limit}" for word, limit in limits.items()) or "a finite number"
            raise ValueError(f"--{f.name} {value}: expected {expected}")


def refuse_idle(config: Any, method: Any = None) -> None:
    """Raise ValueError for a setting that would change nothing: two runs that differ in it alone would be one.

    `acts` of each setting says when it changes something: of `config`, and of the `method` (a MethodConfig).
    """
    for f in fields(config):
        value = getattr(config, f.name)
        for acts in f.metadata.get("acts", ()) if value != f.default else ():
            if not acts.when(config, method):
                why = acts.why.format(method=getattr(method, "method", ""))
                raise ValueError(f"{f'--no-{f.name}' if value is False else f'--{f.name} {value}'}: {why}")


def add_settings(parser: argparse.ArgumentParser, *classes: type) -> None:
    """Give the parser an option for each `setting` of the dataclasses."""
    for cls in classes:
        group = parser.add_argument_group(cls.__doc__.splitlines()[0].rstrip("."))
        for f in fields(cls):
            if "help" not in f.metadata:
                continue
            kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
            text = f.metadata["help"].replace("%", "%%") + " (default: %(default)s)"
            group.add_argument("--" + f.name, default=f.default, help=text, **kind)


class Help(argparse.HelpFormatter):
    """Wraps the paragraphs of a description, and keeps its indented lines: what of one is too long goes on below it."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled = []
        for line in re.sub(r"(?m)^(\S.*)\n(?=\S)", r"\1 ", text).strip("\n").split("\n"):
            margin, line = indent + re.match(" *", line)[0], line.strip()
            parts = re.split(" {3,}", line) if len(margin + line) > width else [line]  # a command, and what it does
            for n, part in enumerate(parts):
                below = margin + "    " * bool(margin)
                filled += textwrap.wrap(part, width, initial_indent=below if n else margin, subsequent_indent=below,
                                        break_long_words=False, break_on_hyphens=False) or [""]  # fmt: skip
        return "\n".join(filled)


def pick(cls: type, args: argparse.Namespace, **more: Any) -> Any:
    """The dataclass filled from parsed arguments (and `more`)."""
    given = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
    return cls(**{**given, **more})


def locate(path: str | Path) -> Path:
    """A path as given or, if nothing is there, in the project's folder: commands work from anywhere."""
    return Path(path) if Path(path).exists() else ROOT / path


def printable(text: str) -> str:
    """Text that came from outside, without control codes, which a terminal would obey and XML forbids, and without half
    characters; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def one_line(text: str) -> str:
    """Text that came from outside as a cell or a line of a report: white space of any kind is a space."""
    return printable("".join(" " if c.isspace() else c for c in text))


def command(main: Callable[[], None]) -> None:
    """Run a script's `main`, and end in one line that says what is wrong if a ValueError or OSError does.

    Output goes on where the terminal lacks a character, and ends quietly where the reader of a pipe has left.
    """
    name = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains as it exits
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(f"{name}: stopped")
    except ValueError as error:
        sys.exit(printable(f"{name}: {error}"))
    except OSError as error:
        advice = {errno.ENOSPC: ": free some space, or write elsewhere", errno.EACCES: ": write elsewhere",
                  errno.EROFS: ": write elsewhere"}.get(error.errno, "")  # fmt: skip
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(printable(f"{name}: {where}{error.strerror or error}{advice}"))
