"""Runs probes on submissions, in processes that can fail, hang or cheat without harm to the grading.

A server, begun afresh, has imported what takes seconds, and holds nothing of the grader's. It forks a process per
probe, which loads the probe, is confined (confine.py), gets the cases and returns values, as JSON in a pipe. Expected
values never come here: the grader compares.
"""

import importlib.util
import itertools
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import confine

COURSE = Path(__file__).resolve().parent
MEMORY = 6 << 30  # bytes that a probe may allocate
ANSWER = 64 << 20  # bytes that it may return
PRINTED = 2000  # characters of what it printed that are kept
PATIENCE = 5  # a probe may take so many times its CPU seconds by the clock: the machine may be busy
GRACE = 2  # seconds in which a probe that is late may say where it is
KEPT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "OMP_NUM_THREADS")  # variables; others may be secret


@dataclass
class Outcome:
    """What became of a probe."""

    values: list | None = None  # what it returned for each case; None if it did not come to its end
    error: str = ""  # why not
    endless: bool = False  # a file of the submission did not end when it was imported
    printed: str = ""


class TimeUp(BaseException):
    """Raised in a probe that is late, wherever it is."""


def run(probes: Path, name: str, tree: Path, cases: Sequence[tuple[int, int]], seconds: float,
        trust: bool = False) -> Outcome:  # fmt: skip
    """Call probe `name` of the file `probes` for each case (seed, size) on the project in `tree`.

    `seconds`: of CPU. `trust`: the process may do whatever we may.
    """
    answer = _ask(probes=str(probes), name=name, tree=str(tree), cases=cases, seconds=seconds, trust=trust)
    return _outcome(answer, seconds)


def reachable(paths: Sequence[Path]) -> list[str]:
    """Those of the files that a submission could read, which is found out by trying."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        answer = _ask(secrets=[str(path.resolve()) for path in paths], tree=folder, seconds=20, trust=False)
    outcome = _outcome(answer, 20)
    if outcome.values is None:
        raise ValueError(f"processes cannot be confined here: {outcome.error}")
    return outcome.values


def load(path: Path) -> ModuleType:
    """Import the file of an assignment. Helpers beside it are found."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def cpu_limit(seconds: float) -> int:
    return round(max(1, seconds))


# ---------------------------------------------------------------- in the grader


@cache
def _server() -> subprocess.Popen:
    """The process that forks probes; it ends when its input does."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return subprocess.Popen([sys.executable, __file__], cwd="/", env=kept, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE)  # fmt: skip


def _ask(**request: Any) -> dict:
    """What the server answers."""
    server = _server()
    try:
        server.stdin.write(json.dumps(request).encode() + b"\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())
    except (OSError, ValueError):
        server.kill()  # if it is there still: as the same user, before Linux 6.12, a submission can end it
        _server.cache_clear()
        if server.wait() > 0:
            raise ValueError("the process that runs probes has ended, for the reason above") from None
        return {"text": "", "status": signal.SIGKILL, "late": False, "printed": ""}


def _outcome(answer: dict, seconds: float) -> Outcome:
    """What the lines of a probe's pipe say, none of which can be trusted."""
    outcome, status, late = Outcome(printed=answer["printed"]), answer["status"], answer["late"]
    try:
        for line in answer["text"].splitlines():
            facts = json.loads(line)
            outcome.error = str(facts.get("error", outcome.error))[:5000]
            late, outcome.endless = late or "endless" in facts, facts.get("endless") is True
            outcome.values = facts.get("values", outcome.values)
        if not isinstance(outcome.values, list | None):
            raise TypeError
    except (ValueError, TypeError, AttributeError, RecursionError, MemoryError):
        outcome.values, outcome.error = None, "what came from the probe's process is not what probes return"
    if late:
        outcome.values = None
        outcome.error = f"no end after {seconds:g} seconds: is there an endless loop?{outcome.error}"
    elif outcome.values is None and not outcome.error:
        ended = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {status >> 8}"
        outcome.error = f"the process ended with {ended} and without a result"
    return outcome


# ---------------------------------------------------------------- in the server


def _serve() -> None:
    import regex  # noqa: F401
    import tiktoken  # noqa: F401
    import torch._dynamo  # noqa: F401

    confine.adopt()
    user = confine.other_user(sys.modules[name].__file__ for name in ("os", "numpy", "torch"))
    for line in sys.stdin.buffer:
        print(json.dumps(_answer(json.loads(line), user)), flush=True)


def _answer(request: dict, user: int | None) -> dict:
    """Run a probe in a process of its own, and say what came of it."""
    answer, write = os.pipe()
    with tempfile.TemporaryFile() as printed:
        process = os.fork()
        if not process:
            _be_the_child(request, user, write, printed.fileno())
        os.close(write)
        text, status, late = _wait(process, answer, request["seconds"])
        os.close(answer)
        _end(process)
        printed.seek(0)
        said = printed.read(4 * PRINTED).decode(errors="replace")[:PRINTED]
    return {"text": text.decode(errors="replace"), "status": status, "late": late, "printed": said}


def _wait(process: int, answer: int, seconds: float) -> tuple[bytes, int, bool]:
    """What comes from the pipe, the status with which the process ends, and whether its time was up.

    A process that the clock ends is told so first, and may say where it was.
    """
    deadline, parts, size, status, used, told = time.monotonic() + PATIENCE * seconds, [], 0, None, 0.0, False
    while size <= ANSWER and time.monotonic() < deadline + GRACE:
        if not told and status is None and time.monotonic() > deadline:
            os.kill(process, signal.SIGXCPU)
            told = True
        ended = status is not None
        if not ended:
            done, code, usage = os.wait4(process, os.WNOHANG)
            if done:
                status, used = code, usage.ru_utime + usage.ru_stime
        ready = select.select([answer], [], [], 0 if ended else 0.05)[0]
        parts.append(os.read(answer, 1 << 20) if ready else b"")
        size += len(parts[-1])
        if ended and not parts[-1]:
            break
        if ready and not parts[-1]:  # closed: nothing more will come
            time.sleep(0.001)
    return b"".join(parts), status or 0, told or used >= cpu_limit(seconds)


def _end(process: int) -> None:
    """Kill what is left of a probe: its process group, and whatever else it started, which we have adopted."""
    doomed, until = [process], time.monotonic() + 5
    while time.monotonic() < until:
        for one, kill in itertools.product(doomed, (os.killpg, os.kill)):
            try:
                kill(one, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # none is left
            return
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        doomed = [*map(int, children.read_text().split())] if children.exists() else doomed
        time.sleep(0.001)


# ---------------------------------------------------------------- in the probe's process


def _be_the_child(request: dict, user: int | None, write: int, printed: int) -> NoReturn:
    """Answer through `write`, and never return."""
    tree = Path(request["tree"])
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(printed, 1), os.dup2(printed, 2)
        os.dup2(write, 3)
        os.closerange(4, 1 << 16)
        probe = vars(load(Path(request["probes"])))[request["name"]] if "name" in request else None
        _enter(tree)
        _limit(request["seconds"], user)
        if not request["trust"]:
            confine.confine(tree, user)
        signal.signal(signal.SIGXCPU, _time_up)
        if probe:
            values = [plain(probe(_generator(seed, size), size)) for seed, size in request["cases"]]
        else:
            values = [path for path in request["secrets"] if _readable(path)]
        _tell(values=values)
    except TimeUp as error:
        frames = _frames(error, tree)
        _tell(error=_where(frames, tree), endless=any(f.name == "<module>" for f in frames))
    except BaseException as error:
        _tell(error=_explained(error, tree))
    finally:
        sys.stdout.flush()
        os._exit(0)


def _time_up(*_: Any) -> NoReturn:
    raise TimeUp


def _generator(seed: int, size: int) -> Any:
    return sys.modules["numpy"].random.default_rng([seed, size])


def _readable(path: str) -> bool:
    try:
        open(path).close()
        return True
    except OSError:
        return False


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


def _tell(**facts: Any) -> None:
    text = json.dumps(facts).encode() + b"\n"
    while text:
        text = text[os.write(3, text) :]


def _limit(seconds: float, user: int | None) -> None:
    limits = {resource.RLIMIT_CPU: cpu_limit(seconds), resource.RLIMIT_DATA: MEMORY,
              resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 1 << 28}  # fmt: skip
    if user is not None:  # processes are counted per user
        limits[resource.RLIMIT_NPROC] = 200
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value + GRACE if limit == resource.RLIMIT_CPU else value))


def _enter(tree: Path) -> None:
    """Let imports come from the tree, and let programs keep their files in it."""
    sys.modules["torch"].set_num_threads(1)  # a pool of threads does not survive the fork
    os.chdir(tree)
    home = str(tree / ".cache")
    os.makedirs(home, exist_ok=True)
    os.environ |= {"HOME": home, "XDG_CACHE_HOME": home, "TMPDIR": home, "USER": "student"}
    tempfile.tempdir = None
    others = [path for path in sys.path if Path(path).resolve() not in (COURSE, COURSE.parent)]
    sys.path[:] = [str(tree), str(tree / "course"), *others]


def _frames(error: BaseException, tree: Path) -> list[traceback.FrameSummary]:
    """Where in the submission an exception happened."""
    return [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(tree)]


def _where(frames: Sequence[traceback.FrameSummary], tree: Path) -> str:
    return "".join(f"\n  {Path(f.filename).relative_to(tree)}, line {f.lineno}, in {f.name}: {f.line}"
                   for f in frames[-6:])  # fmt: skip


def _explained(error: BaseException, tree: Path) -> str:
    """An exception, and where in the submission it happened."""
    frames = _frames(error, tree)
    where = _where(frames, tree)
    if isinstance(error, NotImplementedError) and frames:
        return f"{Path(frames[-1].filename).name}: {frames[-1].name} is not written yet{where}"
    return f"{type(error).__name__}: {error}"[:1000] + where


if __name__ == "__main__":
    _serve()
