"""Make an assignment of the course from the project's own sources.

    python course/make.py 2 --out hw2    writes hw2/student, hw2/solution, hw2/wrong and hw2/autograder.zip
    python course/make.py --all          all assignments, as hw1, hw2, ...
    python course/make.py --list

The student tree is the project without the bodies of some functions: an assignment (assignments/hw2_mask.py) names
them, and checks.py says what else it declares. What the solution returns is recorded here, as the expected values.
"""

import argparse
import ast
import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

COURSE = Path(__file__).resolve().parent
ROOT = COURSE.parent
sys.path.insert(0, str(ROOT))

import child
import grade
from checks import CASES, FILES, HIDDEN, PUBLIC, Wrong, difference, probes_of

from plumbing.settings import command

TEACHERS = ("course/assignments/", "course/make.py", "course/for-assistants.md", "tests/more/test_course.py",
            "tests/more/test_grader.py", "tests/more/courses.py", ".github/", ".ci/")  # fmt: skip
SETUP = """#!/usr/bin/env bash
# Gradescope runs this once, as root, when it builds the image.
set -euo pipefail
apt-get update && apt-get install -y python3 python3-pip g++
cd /autograder/source/project
pip install torch --index-url https://download.pytorch.org/whl/cpu || pip install --break-system-packages torch \\
  --index-url https://download.pytorch.org/whl/cpu
pip install -r requirements.txt || pip install --break-system-packages -r requirements.txt
"""
RUN = """#!/usr/bin/env bash
# Gradescope runs this for each submission, as root; submissions run as another user, who cannot look in here.
mkdir -p /autograder/results
chmod 700 /autograder/source /autograder/results
cd /autograder/source/project
python3 course/grade.py /autograder/submission --results /autograder/results/results.json
"""


def assignments() -> dict[int, Path]:
    """The files of the assignments, `hw1_name.py` and so on, by number. Others are left alone."""
    numbered = ((re.match(r"hw(\d+)", path.name), path) for path in sorted(COURSE.glob("assignments/hw*.py")))
    return {int(match[1]): path for match, path in numbered if match}


def checked(path: Path) -> ModuleType:
    """The assignment in a file. Raises ValueError if it contradicts itself."""
    module = child.load(path)
    probes = probes_of(module)
    points = FILES + getattr(module, "WRITTEN", 0) + sum(probe.check.points for probe in probes.values())
    if points != 100:
        raise ValueError(f"{path.name}: expected 100 points, {FILES} for the files among them, not {points}")
    for wrong in module.WRONG:
        if wrong.file not in module.FUNCTIONS:
            raise ValueError(f"{path.name}, wrong solution {wrong.name!r}: {wrong.file} is not in FUNCTIONS")
        if unknown := set(lost_by(wrong)) - set(probes):
            raise ValueError(f"{path.name}, wrong solution {wrong.name!r}: there is no probe {', '.join(unknown)}")
    return module


def lost_by(wrong: Wrong) -> tuple[str, ...]:
    """The names of the probes that a wrong solution has to fail."""
    return (wrong.loses,) if isinstance(wrong.loses, str) else wrong.loses


# ---------------------------------------------------------------- sources without bodies


def blanked(file: str, source: str, names: Sequence[str]) -> str:
    """The source with the bodies of these functions left out; docstrings and comments with shapes stay.

    Raises ValueError, naming file and function, if a function does not exist or has no docstring.
    """
    find = body_in_python if file.endswith(".py") else body_in_cpp
    for name in names:
        start, end, replacement = find(file, source, name)
        source = source[:start] + replacement + source[end:]
    return source


def body_in_python(file: str, source: str, name: str) -> tuple[int, int, str]:
    """Where a function's body, without its docstring, begins and ends, and what replaces it."""
    node = ast.parse(source)
    for part in name.split("."):
        kinds, outer = (ast.FunctionDef, ast.ClassDef), node
        node = next((n for n in node.body if isinstance(n, kinds) and n.name == part), None)
        if node is None:
            raise ValueError(f"{file} has no function {name} any more: name its new name in the assignment")
    documented = ast.get_docstring(node) or part == "__init__" and ast.get_docstring(outer)
    if not documented:
        raise ValueError(f"{file}: {name} has no docstring, which would be its specification")
    lines = source.splitlines(keepends=True)
    first = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
    last = node.end_lineno
    indent = " " * node.body[0].col_offset
    body = "".join(f"{indent}# {shape}\n" for line in lines[first:last] if (shape := shape_in(line)))
    body += f"{indent}raise NotImplementedError\n"
    return len("".join(lines[:first])), len("".join(lines[:last])), body


def shape_in(line: str) -> str:
    """The comment with a shape at the end of a line of code, after the names that the line assigns; or ""."""
    found = re.match(r"\s*(?:([\w., ]+) = )?.*  # (\([^()]*\).*)$", line)
    return (f"{found[1]}: " if found[1] else "") + found[2] if found else ""


def body_in_cpp(file: str, source: str, name: str) -> tuple[int, int, str]:
    """The same for a function in CUDA C++, specified by the comment above it."""
    found = re.search(rf"^[^\n/#]*\b{name}\([^;{{]*\)\s*\{{", source, re.MULTILINE)
    if not found:
        raise ValueError(f"{file} has no function {name} any more: name its new name in the assignment")
    above = re.sub(r"(template[^\n]*\n)+\Z", "", source[: found.start()]).splitlines()
    if not above or not above[-1].lstrip().startswith("//"):
        raise ValueError(f"{file}: {name} has no comment above it, which would be its specification")
    end, depth = found.end(), 1
    while depth:
        depth += {"{": 1, "}": -1}.get(source[end], 0)
        end += 1
    return found.end(), end - 1, "\n  __builtin_trap();  // not written yet\n"


# ---------------------------------------------------------------- what is written


def project_files() -> list[str]:
    """What git tracks and students get. Raises ValueError outside a clone."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        raise ValueError(f"{ROOT} is no clone of the project: {listed.stderr.strip()}")
    return [name for name in listed.stdout.split("\0") if name and not name.startswith(TEACHERS)]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def for_students(path: Path) -> str:
    """The source of an assignment without what only teachers read: HANDOUT, which is a file of its own, and WRONG."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("HANDOUT", "WRONG"):
            del lines[node.lineno - 1 : node.end_lineno]
    return "".join(lines)


def handout(number: int, module: ModuleType) -> str:
    """HANDOUT.md: the assignment's own text, and what is the same in each."""
    written = getattr(module, "WRITTEN", 0)
    rows = [f"| `{name}` | {probe.check.points} | {probe.check.idea} |" for name, probe in probes_of(module).items()]
    rows += [f"| written answers | {written} | |"] if written else []
    built = "\n".join(f"- `{file}`: {', '.join(f'`{name}`' for name in names)}"
                      for file, names in module.FUNCTIONS.items())  # fmt: skip
    return f"""# Assignment {number}: {module.TITLE}

About {module.HOURS} hours. The tests take about {module.TESTS_TAKE:g} minutes on one core of a laptop.

{module.HANDOUT.strip()}

## Functions to write

{built}

Signatures, docstrings and the comments with shapes are their specification. Everything else is there and works.

## Tests and points

One environment serves all assignments. PyTorch's CPU build, from its own index, saves 5 GB of CUDA libraries:

    export VENV=$HOME/planned-diffusion-venv
    python3 -m venv $VENV
    $VENV/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
    make $VENV/ready      # the rest; `make demo` and `make test` fail until your functions are written

Then, in this folder:

    source $VENV/bin/activate
    python course/grade.py               # all public tests, with points
    python course/grade.py --only {next(iter(probes_of(module)))}   # one of them

| test | points | what it tests |
|---|---|---|
| `files` | {FILES} | files in course/ and tests/ are as they were handed out |
{chr(10).join(rows)}

Half of a test's points is for its public inputs, half for hidden ones: other draws, and larger. For the first case that
fails a test prints what was expected and what came. Tests of the project itself (tests/) may help too, but give no
points.

## What to hand in

{" and ".join(f"`{file}`" for file in module.FUNCTIONS)}{", and your written answers" if written else ""}.
Keep them in their folders. New Python files of your own are allowed; changes of other files are not handed in.
AGENTS.md asks coding assistants to explain rather than to solve: you are on your honour.
"""


def record(module: ModuleType, tree: Path, seeds: dict[int, list[int]], folders: dict[int, Path]) -> None:
    """Write cases and expected values of each size into its folder: what the probes return on the solution in `tree`.

    Raises ValueError if a probe fails there, or returns something else when it runs again.
    """
    for size, folder in folders.items():
        cases, values = [(seed, size) for seed in seeds[size]], {}
        for name, probe in probes_of(module).items():
            outcome = child.run(tree / "course" / "probes.py", name, tree, [*cases, cases[0]], 2 * probe.check.seconds,
                                trust=True)  # fmt: skip
            if outcome.values is None:
                raise ValueError(f"probe {name} fails on the solution: {outcome.error}\n{outcome.printed}")
            *values[name], again = outcome.values
            if found := difference(values[name][0], again, probe.check.tolerance):
                raise ValueError(f"probe {name} returns something else when it runs again: {found}")
        write(folder, {"cases.json": json.dumps(dict.fromkeys(values, cases)), "values.json": json.dumps(values)})


def pack(path: Path, student: Path, hidden: Path) -> None:
    """autograder.zip; setup.sh and run_autograder are executable."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, text in (("setup.sh", SETUP), ("run_autograder", RUN)):
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o100755 << 16
            archive.writestr(entry, text)
        for root, folder in (("project", student), ("hidden", hidden)):
            for file in sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix != ".pyc"):
                kind = zipfile.ZIP_STORED if file.suffix == ".safetensors" else zipfile.ZIP_DEFLATED
                archive.write(file, Path(root) / file.relative_to(folder), kind)


def wrong_sources(module: ModuleType, sources: dict[str, str]) -> dict[str, dict[str, str]]:
    """The files of each wrong solution by its name. Raises ValueError if a text to replace is not there once."""
    found = {}
    for wrong in module.WRONG:
        if (n := sources[wrong.file].count(wrong.old)) != 1:
            raise ValueError(f"wrong solution {wrong.name!r}: its old text occurs {n} times in {wrong.file}, not once")
        found[wrong.name] = sources | {wrong.file: sources[wrong.file].replace(wrong.old, wrong.new)}
    return found


def wrong_folder(out: Path, wrong: Wrong) -> Path:
    """Where an assignment's folder has a wrong solution."""
    return out / "wrong" / re.sub(r"\W+", "-", wrong.name).strip("-")


def make(number: int, out: Path, hidden_seeds: Sequence[int] = ()) -> None:
    """Write an assignment into the folder `out`, which must not exist. `hidden_seeds`: drawn if none are given.

    The folder appears when all of it is there.
    """
    path, files = assignments()[number], project_files()
    module = checked(path)
    if out.exists():
        raise ValueError(f"--out {out} exists already: name another folder, or remove it")
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file in module.FUNCTIONS}
    blanks = {file: blanked(file, sources[file], names) for file, names in module.FUNCTIONS.items()}
    wrongs = wrong_sources(module, sources)
    seeds = {PUBLIC: list(range(CASES[PUBLIC])),
             HIDDEN: list(hidden_seeds) or [secrets.randbits(31) for _ in range(CASES[HIDDEN])]}  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}-unfinished-") as begun:
        made, hidden = Path(begun).resolve() / "made", Path(begun).resolve() / "hidden"
        student, public = made / "student", made / "student" / "course" / "public"
        for file in files:
            (student / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, student / file)
        write(student, {"course/probes.py": for_students(path), "HANDOUT.md": handout(number, module),
                        "AGENTS.md": (COURSE / "for-assistants.md").read_text(encoding="utf-8")})  # fmt: skip
        record(module, student, seeds, {PUBLIC: public, HIDDEN: hidden})  # before the bodies are left out
        shutil.rmtree(student / ".cache", ignore_errors=True)  # of kernels that were compiled
        write(student, blanks)
        handed_out = {f: grade.digest(student / f) for f in [*files, "course/probes.py"]}
        write(public, {"files.json": json.dumps(handed_out, indent=1)})
        pack(made / "autograder.zip", student, hidden)
        write(made / "solution", sources)
        for wrong in module.WRONG:
            write(wrong_folder(made, wrong), wrongs[wrong.name])
        made.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make an assignment of the course from the project's own sources.")
    parser.add_argument("number", type=int, nargs="?", choices=assignments(), help="of the assignment")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write (default: hw and the number)")
    parser.add_argument("--all", action="store_true", help="make all, in folders hw1, hw2, ... within --out")
    parser.add_argument("--list", action="store_true", help="list the assignments")
    args = parser.parse_args()
    if args.number and (args.all or args.list):
        raise ValueError(f"{args.number}: expected the number of an assignment, --all or --list, not two of them")
    if args.list:
        for number, path in assignments().items():
            module = checked(path)
            print(f"{number}  {module.TITLE} ({module.HOURS} hours)")
            print(textwrap.fill(", ".join(module.FUNCTIONS), 80, initial_indent="   ", subsequent_indent="   "))
    elif args.all:
        for number in assignments():
            out = args.out / f"hw{number}"
            print(f"{out} is there already, and stays as it is" if out.exists() else f"{out} ...", flush=True)
            if not out.exists():
                make(number, out)
    elif args.number:
        out = args.out if args.out != Path() else Path(f"hw{args.number}")
        make(args.number, out)
        print(f"wrote {out}: student/, solution/, wrong/ and autograder.zip")
    else:
        raise ValueError("expected the number of an assignment, --all or --list")


if __name__ == "__main__":
    command(main)
