"""Runs a probe on a submission in a process of its own, which can fail, hang or cheat without harm to the grading.

The process is forked from the grader before that reads any expected value, has limits of time and memory and, where
the grader is root, is another user. It answers through a pipe in JSON, a line per fact. Opening a guarded file is
refused and told to the grader. (As an ordinary user this catches Python's own `open`, not a program that it starts.)
"""

import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from checks import plain

ROOT = Path(__file__).resolve().parents[1]
MEMORY = 6 << 30  # bytes that a probe may allocate
ANSWER = 64 << 20  # bytes that it may return
PRINTED = 2000  # characters of what it printed that are kept
PATIENCE = 5  # a probe may take so many times its CPU seconds by the clock: the machine may be busy


@dataclass
class Outcome:
    """What became of a probe."""

    values: list | None = None  # what it returned for each case; None if it did not come to its end
    error: str = ""  # why not
    tried: list[str] = field(default_factory=list)  # guarded files that it tried to open
    printed: str = ""
    seconds: float = 0.0


def preload() -> None:
    """Import what submissions import and what takes seconds, once for all processes."""
    import regex  # noqa: F401
    import tiktoken  # noqa: F401
    import torch._dynamo  # noqa: F401


def run(tree: Path, probe: Callable, cases: Sequence[tuple[int, int]], seconds: float, guarded: Sequence[Path],
        user: int | None) -> Outcome:  # fmt: skip
    """Call `probe` for each case (seed, size) on the project in `tree`, with at most `seconds` of CPU."""
    begun, (answer, write) = time.monotonic(), os.pipe()
    with tempfile.TemporaryFile() as printed:
        process = os.fork()
        if not process:
            _be_the_child(tree, probe, cases, seconds, guarded, user, write, printed.fileno())
        os.close(write)
        text, status = _wait(process, answer, begun + PATIENCE * seconds)
        os.close(answer)
        _end(process, user)
        printed.seek(0)
        outcome = _outcome(text, status, seconds)
        outcome.printed = printed.read(4 * PRINTED).decode(errors="replace")[:PRINTED]
    outcome.seconds = time.monotonic() - begun
    return outcome


def other_user() -> int | None:
    """A user id for submissions, if we are root and Python's files are readable for others; else None."""
    if os.geteuid():
        return None
    user, process = 60_000 + os.getpid() % 5000, os.fork()
    if not process:
        try:
            _become(user)
            for module in (os, np, sys.modules["torch"]):
                open(module.__file__).close()
            os._exit(0)
        finally:
            os._exit(1)
    return user if os.waitpid(process, 0)[1] == 0 else None


# ---------------------------------------------------------------- in the grader


def _wait(process: int, answer: int, deadline: float) -> tuple[bytes, int | None]:
    """What comes from the pipe, and the status with which the process ends; None if it does not in time."""
    parts, size, status = [], 0, None
    while time.monotonic() < deadline and size <= ANSWER:
        ended = status is not None
        if not ended:
            done, code = os.waitpid(process, os.WNOHANG)
            status = code if done else None
        if select.select([answer], [], [], 0 if ended else 0.05)[0]:
            parts.append(os.read(answer, 1 << 20))
            size += len(parts[-1])
            if not parts[-1]:  # closed: nothing more will come
                time.sleep(0.001)
                if ended:
                    break
        elif ended:
            break
    return b"".join(parts), status


def _end(process: int, user: int | None) -> None:
    """Kill what is left of a probe: its process group and, of another user, all its processes."""
    for kill in (os.killpg, os.kill):
        try:
            kill(process, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    try:
        os.waitpid(process, 0)
    except ChildProcessError:  # was waited for
        pass
    if user is not None:
        killer = os.fork()
        if not killer:
            try:
                _become(user)
                os.kill(-1, signal.SIGKILL)
            finally:
                os._exit(0)
        os.waitpid(killer, 0)


def _outcome(text: bytes, status: int | None, seconds: float) -> Outcome:
    """What the lines of the pipe say, none of which can be trusted."""
    outcome = Outcome()
    for line in text.splitlines():
        try:
            facts = json.loads(line)
            outcome.tried += [str(facts["tried"])[:200]] if "tried" in facts else []
            outcome.error = str(facts.get("error", outcome.error))[:5000]
            outcome.values = facts.get("values", outcome.values)
        except (ValueError, TypeError, AttributeError, RecursionError):
            outcome.error = "what came from the probe's process is not what probes return"
    if outcome.values is not None and not isinstance(outcome.values, list):
        outcome.values = None
    if status is None or os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        outcome.values, outcome.error = None, f"no end after {seconds:g} seconds: is there an endless loop?"
    elif outcome.values is None and not outcome.error:
        ended = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {status >> 8}"
        outcome.error = f"the process ended with {ended} and without a result"
    return outcome


# ---------------------------------------------------------------- in the probe's process


def _be_the_child(tree: Path, probe: Callable, cases: Sequence[tuple[int, int]], seconds: float,
                  guarded: Sequence[Path], user: int | None, write: int, printed: int) -> NoReturn:  # fmt: skip
    """Answer through `write`, and never return."""
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(printed, 1), os.dup2(printed, 2)
        os.dup2(write, 3)
        os.closerange(4, 1 << 16)
        _limit(seconds, user)
        if user is not None:
            _become(user)
        _enter(tree)
        _guard([os.path.realpath(path) for path in guarded])
        _tell(values=[plain(probe(np.random.default_rng([seed, size]), size)) for seed, size in cases])
    except BaseException as error:
        _tell(error=_explained(error, tree))
    finally:
        sys.stdout.flush()
        os._exit(0)


def _tell(**facts: Any) -> None:
    text = json.dumps(facts).encode() + b"\n"
    while text:
        text = text[os.write(3, text) :]


def _limit(seconds: float, user: int | None) -> None:
    limits = {resource.RLIMIT_CPU: round(max(1, seconds)), resource.RLIMIT_DATA: MEMORY,
              resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 1 << 28}  # fmt: skip
    if user is not None:  # processes are counted per user
        limits[resource.RLIMIT_NPROC] = 200
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value + 1 if limit == resource.RLIMIT_CPU else value))


def _become(user: int) -> None:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def _enter(tree: Path) -> None:
    """Let imports come from the tree, also of modules that the grader has imported from its own project."""
    sys.modules["torch"].set_num_threads(1)  # a pool of threads does not survive the fork
    tree = tree.resolve()  # before the working folder changes
    os.chdir(tree)
    os.environ |= {"HOME": str(tree), "XDG_CACHE_HOME": str(tree / ".cache"), "USER": "student"}
    for name, module in list(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "/")
        of_course = path.is_relative_to(ROOT / "course") or "site-packages" in path.parts
        if path.is_relative_to(ROOT) and not of_course:
            del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]


def _guard(guarded: list[str]) -> None:
    """Refuse to open these files and folders, and tell the grader; a hook of this kind cannot be taken off again."""

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if any(path == place or path.startswith(place + os.sep) for place in guarded):
                _tell(tried=path)
                raise PermissionError(f"{path} belongs to the grader")

    sys.addaudithook(hook)


def _explained(error: BaseException, tree: Path) -> str:
    """An exception, and where in the submission it happened."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(tree)]
    where = "".join(f"\n  {Path(f.filename).relative_to(tree)}, line {f.lineno}, in {f.name}: {f.line}"
                    for f in frames[-6:])  # fmt: skip
    if isinstance(error, NotImplementedError) and frames:
        return f"{Path(frames[-1].filename).name}: {frames[-1].name} is not written yet{where}"
    return f"{type(error).__name__}: {error}"[:1000] + where
