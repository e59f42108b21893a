"""Grade submissions of an assignment: here, or on Gradescope, where run_autograder calls this file.

    python course/grade.py                                       in an assignment's student folder: the public tests
    python course/grade.py one two --kit hw3/autograder.zip      the hidden tests too, of several submissions

A submission is a folder with the files that were to be built; whatever is missing is taken as it was handed out.
Each probe runs in a process of its own (child.py), which gets inputs and returns values; they are compared here.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

COURSE = Path(__file__).resolve().parent
sys.path.insert(0, str(COURSE.parent))

import child
from checks import FILES, Check, difference, message, probes_of

from plumbing.files import refuse_overwriting
from plumbing.settings import command

LARGEST = 1 << 20  # bytes of a file that a submission may add or build
MOST = 50  # files that it may add
KNOWN = ("cases", "values")  # files of a set of tests
SECRET = " (hidden)"  # ends the name of a test that students do not see before the grades


@dataclass
class Result:
    """A test of a submission, as Gradescope wants it."""

    name: str
    score: float
    max_score: float
    output: str
    visibility: str = "visible"

    def __post_init__(self) -> None:
        self.output = printable(self.output)


@dataclass
class Kit:
    """An assignment as it was handed out, and the hidden tests where they are at hand."""

    root: Path  # the student tree
    hidden: dict | None = None  # "cases" and "values" of the hidden tests, by the names of probes
    secrets: list[Path] = field(default_factory=list)  # files that submissions must not read

    @cached_property
    def sets(self) -> dict[str, dict]:
        """Cases and values by the end of their tests' names."""
        public = {name: json.loads((self.root / "course/public" / f"{name}.json").read_text()) for name in KNOWN}
        return {"": public} | ({SECRET: self.hidden} if self.hidden else {})

    @property
    def probes(self) -> Path:
        return self.root / "course" / "probes.py"

    @cached_property
    def module(self) -> ModuleType:
        """The assignment as far as students see it. Raises ValueError if it is not there."""
        if not self.probes.exists():
            raise ValueError(f"{self.probes} does not exist: run this in an assignment's student folder, or name an "
                             "assignment, such as --kit hw3/autograder.zip")  # fmt: skip
        return child.load(self.probes)

    def tests(self) -> Iterator[tuple[str, str, Check]]:
        """Each test: the probe's name, the end of the test's name, and what is known of the probe."""
        for name, probe in probes_of(self.module).items():
            yield from ((name, end, probe.check) for end in self.sets)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of each file that was handed out."""
        return json.loads((self.root / "course" / "public" / "files.json").read_text())


def printable(text: str) -> str:
    """Text without control codes, as in show/record.py, which imports what students have yet to write."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


@contextmanager
def opened(kit: str) -> Iterator[Kit]:
    """The kit in an autograder.zip, or the student tree that this file is in. Hidden tests stay in memory."""
    if not kit:
        hidden = COURSE.parents[1] / "hidden"  # beside the student tree in the zip, which Gradescope has unpacked
        files = [hidden / f"{name}.json" for name in KNOWN]
        there = files[0].exists()
        known = {name: json.loads(file.read_text()) for name, file in zip(KNOWN, files)} if there else None
        yield Kit(COURSE.parent, known, files if there else [])
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(kit) as archive:
                known = {name: json.loads(archive.read(f"hidden/{name}.json")) for name in KNOWN}
                archive.extractall(folder, [name for name in archive.namelist() if name.startswith("project/")])
        except (zipfile.BadZipFile, KeyError):
            raise ValueError(f"--kit {kit}: expected the autograder.zip of an assignment") from None
        yield Kit(Path(folder) / "project", known, [Path(kit), COURSE / "grade.py"])


# ---------------------------------------------------------------- the submission


def handed_in(folder: Path) -> dict[str, Path]:
    """The regular files of a submission by their path in it; links are not followed, and hidden folders left out."""
    found = {}
    for place, folders, names in os.walk(folder) if not folder.is_symlink() else ():
        if "pyvenv.cfg" in names:
            folders[:], names = [], []  # Python, with packages
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in ("__pycache__", "runs"))
        for name in sorted(names):
            path = Path(place, name)
            if path.is_file() and not path.is_symlink():
                found[path.relative_to(folder).as_posix()] = path
    return found


def home_of(found: Iterable[str], files: Sequence[str]) -> tuple[str, str]:
    """The folder of a submission that has the files, as what their paths begin with, and what is said if none does.

    It is the submission itself or, as in some archives, the only folder within it that has most of them.
    """
    tails = [(path, file) for path in found for file in files if f"/{path}".endswith(f"/{file}")]
    homes = Counter(path.removesuffix(file) for path, file in tails)
    if not homes or "" in homes:
        return "", "" if homes else f"looked in all folders for {' and '.join(files)}: none has one"
    best = [home for home, n in homes.items() if n == max(homes.values())]
    if len(best) == 1:
        return best[0], f"taken from {best[0]}"
    return "", f"found in {' and in '.join(sorted(best))}, and none was taken: hand in one of them"


def assemble(kit: Kit, submission: Path, files: Sequence[str], tree: Path) -> tuple[list[str], list[str]]:
    """Make the project that is tested: as it was handed out, but with the files that were to be built, and new ones.

    Returns what is said of the files: notes, and test files that were changed.
    """
    for name in kit.digests:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        if (kit.root / name).is_file():
            shutil.copyfile(kit.root / name, tree / name)
    paths = handed_in(submission)
    home, note = home_of(paths, files)
    found = {path.removeprefix(home): file for path, file in paths.items() if path.startswith(home)}
    notes, changed, added = [note] if note else [], [], 0
    for name, path in found.items():
        new = name not in kit.digests and name.endswith(".py") and not name.startswith(("course/", "tests/"))
        if name in files or new and added < MOST:
            added += new
            if path.stat().st_size <= LARGEST:
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, tree / name)
            else:
                notes.append(f"{name} is larger than {LARGEST >> 20} MiB, and was left out")
        elif name in kit.digests and differs(path, kit, name):
            of_tests = name.startswith(("course/", "tests/"))
            (changed if of_tests else notes).append(f"{name} differs from what was handed out, and is not handed in")
    notes += [f"{file} is missing (or a link): taken as it was handed out" for file in files if file not in found]
    return notes, changed


def differs(path: Path, kit: Kit, name: str) -> bool:
    """Whether a file is another one than was handed out. Only one of the same size is read."""
    return path.stat().st_size != (kit.root / name).stat().st_size or digest(path) != kit.digests[name]


# ---------------------------------------------------------------- grading


def outcomes(kit: Kit, tree: Path, only: Sequence[str] = (), seconds: float = 0, trust: bool = False) -> dict:
    """Run the probes, public and hidden: {(probe's name, end of the test's name): Outcome}.

    If the submission does not end when it is imported, the other probes are not run: they would not end either.
    """
    found, endless = {}, None
    for name, end, check in kit.tests():
        if endless:
            found[name, end] = child.Outcome(error=f"not run after an import that does not end\n{endless.error}")
        elif not only or name in only:
            cases = kit.sets[end]["cases"][name]
            found[name, end] = outcome = child.run(kit.probes, name, tree, cases, seconds or check.seconds, trust)
            endless = outcome if outcome.endless else None
    return found


def judge(check: Check, outcome: child.Outcome, cases: list, values: list) -> tuple[bool, str]:
    """Whether a probe passes, and what is said of it: of the first case that fails, if one does."""
    if outcome.values is None:
        return False, f"idea: {check.idea}\n{outcome.error}"
    if len(outcome.values) != len(values):
        return False, f"expected the results of {len(values)} cases, {len(outcome.values)} came"
    for n, ((seed, size), expected, came) in enumerate(zip(cases, values, outcome.values), 1):
        if found := difference(expected, came, check.tolerance):
            where = f"case {n} of {len(cases)} (seed {seed}, size {size})"
            return False, f"{where}\n{message(check, expected, came, found)}"
    return True, ""


def grade(
    kit: Kit, submission: Path, only: Sequence[str] = (), seconds: float = 0, trust: bool = False
) -> list[Result]:
    """The tests of a submission. What cannot be graded fails them all."""
    try:
        return graded(kit, submission, only, seconds, trust)
    except Exception as error:  # submissions have any shape, and others are to be graded, too
        said = f"could not be graded: {type(error).__name__}: {error}"
        tests = [Result(name + end, 0, check.points / 2, "") for name, end, check in kit.tests()]
        return [Result("files", 0, FILES, said), *tests]


def graded(kit: Kit, submission: Path, only: Sequence[str], seconds: float, trust: bool) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "project"
        notes, changed = assemble(kit, submission, [*kit.module.FUNCTIONS], tree)
        os.chmod(folder, 0o755)  # another user has to reach the tree
        found = outcomes(kit, tree, only, seconds, trust)
    lost = [line + ": points lost" for line in changed]
    tests = [Result("files", 0 if lost else FILES, FILES, "\n".join([*lost, *notes]))]
    for (name, end), outcome in found.items():
        check = probes_of(kit.module)[name].check
        points, known = check.points / 2, kit.sets[end]
        try:
            passes, output = judge(check, outcome, known["cases"][name], known["values"][name])
        except Exception as error:  # what came may be of any kind
            passes, output = False, f"what came cannot be compared: {type(error).__name__}: {error}"
        if output and outcome.printed and not end:
            output += f"\nprinted:\n{outcome.printed}"
        visibility = "after_published" if end else "visible"
        tests.append(Result(name + end, points if passes else 0, points, output, visibility))
    return tests


# ---------------------------------------------------------------- reports


def table(tests: list[Result], of: float = 0) -> str:
    """The tests with their points, and below what is said of each. `of`: all points that there are, 0 for these."""
    lines = ["points    of  test", *(f"{t.score:6g}{t.max_score:6g}  {t.name}" for t in tests)]
    most = sum(t.max_score for t in tests)
    more = f"  the other {of - most:g} of {of:g} points are not tested here" if of > most else ""
    lines.append(f"{sum(t.score for t in tests):6g}{most:6g}{more}")
    lines += [f"\n---- {t.name}\n{t.output}" for t in tests if t.output]
    return "\n".join(lines)


def junit(graded: dict[str, list[Result]]) -> ElementTree.ElementTree:
    """The tests as JUnit XML, a suite per submission."""
    suites = ElementTree.Element("testsuites")
    for name, tests in graded.items():
        failed = sum(t.score < t.max_score for t in tests)
        suite = ElementTree.SubElement(
            suites, "testsuite", name=printable(name), tests=str(len(tests)), failures=str(failed)
        )
        for t in tests:
            case = ElementTree.SubElement(suite, "testcase", classname=printable(name), name=t.name)
            if t.score < t.max_score:
                points = f"{t.score:g} of {t.max_score:g} points"
                ElementTree.SubElement(case, "failure", message=points).text = t.output
    return ElementTree.ElementTree(suites)


def check_first(args: argparse.Namespace, kit: Kit) -> None:
    """Raise ValueError for what would end the grading later on, or make it worth nothing."""
    for name in set(args.only) - set(probes_of(kit.module)):
        raise ValueError(f"--only {name}: expected one of {', '.join(probes_of(kit.module))}")
    for submission in map(Path, args.submission):
        if not submission.is_dir():
            files = " and ".join(kit.module.FUNCTIONS)
            raise ValueError(f"{submission} is not a folder: expected a submission, with {files}")
    refuse_overwriting([args.kit] if args.kit else [], junit=args.junit, results=args.results)
    refuse_overwriting([args.junit] if args.junit else [], results=args.results)
    for name in ("junit", "results"):
        path = getattr(args, name)
        if path and (Path(path).is_dir() or not os.access(Path(path).parent, os.W_OK)):
            raise ValueError(f"--{name} {path}: expected a file in a folder that exists and can be written to")
    for path in child.reachable(kit.secrets) if kit.secrets and not args.trust else ():
        raise ValueError(
            f"submissions could read {path}: grade on Linux 5.13 or newer (with Landlock), or as root with that "
            "in a folder that others cannot read; or grade people whom you trust, with --trust"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Grade submissions of an assignment.")
    parser.add_argument("submission", nargs="*", default=["."], help="folders (default: this one)")
    parser.add_argument("--kit", default="", help="autograder.zip of the assignment (default: the folder of this file)")
    parser.add_argument("--only", nargs="+", default=[], metavar="PROBE", help="run these alone")
    parser.add_argument("--seconds", type=float, default=0, help="CPU limit of each probe (default: its own)")
    parser.add_argument("--junit", default="", help="write JUnit XML to this file")
    parser.add_argument("--results", default="", help="write Gradescope's results.json to this file")
    parser.add_argument("--trust", action="store_true", help="submissions may read and write whatever you may")
    args = parser.parse_args()
    found, begun = {}, time.monotonic()
    with opened(args.kit) as kit:
        check_first(args, kit)
        for submission in args.submission:
            found[submission] = tests = grade(kit, Path(submission), args.only, args.seconds, args.trust)
            head = f"== {printable(submission)}\n" if len(args.submission) > 1 else ""
            print(head + table(tests, 0 if args.only else 100), flush=True)
    if args.results:
        tests = [asdict(test) for test in found[args.submission[-1]]]
        seconds = round(time.monotonic() - begun)
        Path(args.results).write_text(json.dumps({"tests": tests, "execution_time": seconds}, indent=1))
    if args.junit:
        junit(found).write(args.junit, encoding="utf-8", xml_declaration=True)


if __name__ == "__main__":
    command(main)
