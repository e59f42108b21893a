"""What the tests of the course share: assignments that were made, and submissions."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "course"))

import grade
import make


@dataclass
class Made:
    """An assignment that was made."""

    number: int
    out: Path
    kit: grade.Kit
    module: ModuleType

    def public(self, submission, only=(), **more):
        """The results of the public tests alone, by name."""
        return by_name(grade.grade(grade.Kit(self.kit.root), submission, only=only, **more))


def by_name(results):
    return {result.name: result for result in results}


def made(number, folder):
    """With fewer cases than students get where these take long: what is wrong shows in the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(make.CASES, make.PUBLIC, 1 if number in (3, 5, 6) else 2)
        make.make(number, folder / "hw", hidden_seeds=[101])
    with grade.opened(str(folder / "hw" / "autograder.zip")) as kit:
        yield Made(number, folder / "hw", kit, make.checked(make.assignments()[number]))
    shutil.rmtree(folder / "hw")  # tens of megabytes


def submission(tags, folder, tail="", file="tags.py"):
    """The solution of assignment 1 with some lines at the end of a file."""
    shutil.copytree(tags.out / "solution", folder)
    with (folder / file).open("a") as source:
        source.write(tail)
    return folder


def plain_text(body):
    """A function of the assignment with another body."""
    return f"\n\nimport os, signal, subprocess, sys, time\ndef plain_text(rounds):\n    {body}\n"


def command(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["grade.py", *map(str, options)])
    grade.main()
