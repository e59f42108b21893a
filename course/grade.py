"""Grade submissions of an assignment: here, or on Gradescope, where run_autograder calls this file.

    python course/grade.py                                       in an assignment's student folder: the public tests
    python course/grade.py one two --kit hw3/autograder.zip      the hidden tests too, of several submissions

A submission is a folder with the files that were to be built; whatever is missing is taken as it was handed out.
Each probe runs in a process of its own (child.py), and expected values are read when all of them are gone.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import stat
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

COURSE = Path(__file__).resolve().parent
sys.path.insert(0, str(COURSE.parent))

import child
from checks import FILES, Check, difference, message, probes_of

from plumbing.settings import command

LARGEST = 1 << 20  # bytes of a file that a submission may add or build
MOST = 50  # files that it may add
SECRET = " (hidden)"  # ends the name of a test that students do not see before the grades


@dataclass
class Result:
    """A test of a submission, as Gradescope wants it."""

    name: str
    score: float
    max_score: float
    output: str
    visibility: str = "visible"


@dataclass
class Kit:
    """An assignment as it was handed out, and the hidden tests where they are at hand."""

    root: Path  # the student tree
    hidden: Path | None  # folder of the hidden tests

    @property
    def sets(self) -> dict[str, Path]:
        """The folders with cases.json and values.json, by the end of their tests' names."""
        return {"": self.root / "course" / "public"} | ({SECRET: self.hidden} if self.hidden else {})

    @cached_property
    def module(self) -> ModuleType:
        """The assignment as far as students see it."""
        return load(self.root / "course" / "probes.py")

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of each file that was handed out."""
        return json.loads((self.root / "course" / "public" / "files.json").read_text())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(path: Path) -> ModuleType:
    """Import a file of an assignment. Raises ValueError if it does not exist."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: run this in an assignment's student folder, or name an assignment, "
                         "such as --kit hw3/autograder.zip")  # fmt: skip
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def opened(kit: str) -> Iterator[Kit]:
    """The kit in an autograder.zip, or the student tree that this file is in."""
    if not kit:
        hidden = COURSE.parents[1] / "hidden"  # beside the student tree in the zip, which Gradescope has unpacked
        yield Kit(COURSE.parent, hidden if (hidden / "cases.json").exists() else None)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(kit) as archive:
                archive.extractall(folder)
        except zipfile.BadZipFile:
            raise ValueError(f"--kit {kit}: expected the autograder.zip of an assignment") from None
        yield Kit(Path(folder) / "project", Path(folder) / "hidden")


# ---------------------------------------------------------------- the submission


def home_of(submission: Path, files: list[str]) -> Path:
    """Where the files of a submission are: in its folder or, as in some archives, in the only folder within it."""
    if not submission.is_dir():
        raise ValueError(f"{submission} is not a folder: expected a submission, with {' and '.join(files)}")
    inside = [path for path in submission.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))]
    for folder in [submission, *(inside if len(inside) == 1 else [])]:
        if any((folder / file).exists() for file in files):
            return folder
    return submission


def handed_in(folder: Path) -> dict[str, Path]:
    """The regular files of a submission by their path in it; links are not followed, and hidden folders left out."""
    found = {}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in ("__pycache__", "runs"))
        for name in sorted(names):
            path = Path(place, name)
            if stat.S_ISREG(path.lstat().st_mode):
                found[path.relative_to(folder).as_posix()] = path
    return found


def assemble(kit: Kit, submission: Path, files: list[str], tree: Path) -> tuple[list[str], list[str]]:
    """Make the project that is tested: as it was handed out, but with the files that were to be built, and new ones.

    Returns what is said of the files: notes, and test files that were changed.
    """
    shutil.copytree(kit.root, tree, ignore=shutil.ignore_patterns("public", "__pycache__", "runs", ".*"))
    folder = home_of(submission, files)
    found, notes, changed, added = handed_in(folder), [], [], 0
    for name, path in found.items():
        small = path.stat().st_size <= LARGEST
        new = name not in kit.digests and name.endswith(".py") and not name.startswith(("course/", "tests/"))
        if name in files or new and added < MOST:
            added += new
            if small:
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, tree / name)
            else:
                notes.append(f"{name} is larger than {LARGEST >> 20} MiB, and was left out")
        elif name in kit.digests and kit.digests[name] != digest(path):
            of_tests = name.startswith(("course/", "tests/"))
            (changed if of_tests else notes).append(f"{name} differs from what was handed out, and is not handed in")
    notes += [f"{file} is missing (or a link): taken as it was handed out" for file in files if file not in found]
    return notes, changed


# ---------------------------------------------------------------- grading


def outcomes(kit: Kit, tree: Path, guarded: list[Path], only: Sequence[str] = (), seconds: float = 0) -> dict:
    """Run the probes, public and hidden: {(probe's name, end of the test's name): Outcome}."""
    child.preload()
    user, found = child.other_user(), {}
    if user is None and os.geteuid() == 0:
        print("submissions run as root: other users cannot read Python's own files", file=sys.stderr)
    if user is not None:
        for path in [tree, *tree.rglob("*")]:
            os.chown(path, user, user, follow_symlinks=False)
    guarded = [*guarded, *kit.sets.values(), tree / "course" / "public"]
    for name, probe in probes_of(kit.module).items():
        for end, folder in kit.sets.items():
            if not only or name in only:
                cases = json.loads((folder / "cases.json").read_text())[name]
                limit = seconds or probe.check.seconds
                found[name, end] = child.run(tree, probe, cases, limit, guarded, user)
    return found


def judge(check: Check, outcome: child.Outcome, cases: list, values: list) -> tuple[bool, str]:
    """Whether a probe passes, and what is said of it: of the first case that fails, if one does."""
    if outcome.tried:
        return False, f"tried to open {outcome.tried[0]}, which belongs to the grader: the teacher is told"
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
    kit: Kit, submission: Path, results: Path | None = None, only: Sequence[str] = (), seconds: float = 0
) -> list[Result]:
    """The tests of a submission. `results`: the file of the results, which only the grader may write."""
    probes, files = probes_of(kit.module), [*kit.module.FUNCTIONS]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "project"
        notes, changed = assemble(kit, submission, files, tree)
        os.chmod(folder, 0o755)  # another user has to reach the tree
        found = outcomes(kit, tree, [results] if results else [], only, seconds)
    tried = sorted({path for outcome in found.values() for path in outcome.tried})
    changed += [f"tried to open {path}, which belongs to the grader" for path in tried]
    if results and results.exists():
        changed.append(f"wrote {results}, which belongs to the grader")
        results.unlink()
    lost = [line + ": points lost" for line in changed]
    tests = [Result("files", 0 if lost else FILES, FILES, "\n".join([*lost, *notes]))]
    for (name, end), outcome in found.items():
        check, points = probes[name].check, probes[name].check.points / 2
        cases, values = (json.loads((kit.sets[end] / f"{file}.json").read_text())[name] for file in ("cases", "values"))
        passes, output = judge(check, outcome, cases, values)
        if output and outcome.printed and not end:
            output += f"\nprinted:\n{outcome.printed}"
        visibility = "after_published" if end else "visible"
        tests.append(Result(name + end, points if passes else 0, points, output, visibility))
    return tests


# ---------------------------------------------------------------- reports


def table(tests: list[Result]) -> str:
    """The tests with their points, and below what is said of each."""
    lines = ["points    of  test", *(f"{t.score:6g}{t.max_score:6g}  {t.name}" for t in tests)]
    lines.append(f"{sum(t.score for t in tests):6g}{sum(t.max_score for t in tests):6g}")
    lines += [f"\n---- {t.name}\n{t.output}" for t in tests if t.output]
    return "\n".join(lines)


def junit(graded: dict[str, list[Result]]) -> ElementTree.ElementTree:
    """The tests as JUnit XML, a suite per submission."""
    suites = ElementTree.Element("testsuites")
    for name, tests in graded.items():
        failed = sum(t.score < t.max_score for t in tests)
        suite = ElementTree.SubElement(suites, "testsuite", name=name, tests=str(len(tests)), failures=str(failed))
        for t in tests:
            case = ElementTree.SubElement(suite, "testcase", classname=name, name=t.name)
            text = "".join(c if c.isprintable() or c == "\n" else "?" for c in t.output)  # XML knows no others
            if t.score < t.max_score:
                points = f"{t.score:g} of {t.max_score:g} points"
                ElementTree.SubElement(case, "failure", message=points).text = text
    return ElementTree.ElementTree(suites)


def main() -> None:
    parser = argparse.ArgumentParser(description="Grade submissions of an assignment.")
    parser.add_argument("submission", nargs="*", default=["."], help="folders (default: this one)")
    parser.add_argument("--kit", default="", help="autograder.zip of the assignment (default: the folder of this file)")
    parser.add_argument("--only", nargs="+", default=[], metavar="PROBE", help="run these alone")
    parser.add_argument("--seconds", type=float, default=0, help="CPU limit of each probe (default: its own)")
    parser.add_argument("--junit", help="write JUnit XML to this file")
    parser.add_argument("--results", help="write Gradescope's results.json to this file")
    args = parser.parse_args()
    graded, begun = {}, time.monotonic()
    with opened(args.kit) as kit:
        for name in set(args.only) - set(probes_of(kit.module)):
            raise ValueError(f"--only {name}: expected one of {', '.join(probes_of(kit.module))}")
        results = Path(args.results).resolve() if args.results else None
        if results:
            results.unlink(missing_ok=True)
        for submission in args.submission:
            graded[submission] = grade(kit, Path(submission), results, args.only, args.seconds)
            print((f"== {submission}\n" if len(args.submission) > 1 else "") + table(graded[submission]), flush=True)
    if results:
        tests = [asdict(test) for test in graded[args.submission[-1]]]
        results.write_text(json.dumps({"tests": tests, "execution_time": round(time.monotonic() - begun)}, indent=1))
    if args.junit:
        junit(graded).write(args.junit, encoding="utf-8", xml_declaration=True)


if __name__ == "__main__":
    command(main)
