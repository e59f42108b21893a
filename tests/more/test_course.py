"""The course: each assignment is made from the sources, and its tests tell the solution from plausible wrong ones."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from conftest import each

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "course"))

import checks
import grade
import make

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an assignment is made from what git tracks")


@dataclass
class Made:
    """An assignment that was made."""

    number: int
    out: Path
    kit: grade.Kit
    module: ModuleType

    def public(self, submission, only=(), **more):
        """The results of the public tests alone, by name."""
        return by_name(grade.grade(grade.Kit(self.kit.root, None), submission, only=only, **more))


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


@pytest.fixture(scope="module", params=make.assignments(), ids="hw{}".format)
def assignment(request, tmp_path_factory):
    if request.param == 1:
        yield request.getfixturevalue("tags")
        return
    if request.param == 6 and not shutil.which("g++"):
        pytest.skip("needs g++, which emulates the kernel")
    yield from made(request.param, tmp_path_factory.mktemp("course"))


@pytest.fixture(scope="module")
def tags(tmp_path_factory):
    """Assignment 1, which is quick to grade."""
    yield from made(1, tmp_path_factory.mktemp("tags"))


# ---------------------------------------------------------------- every assignment


def test_the_blank_tree_loses_all_its_own_tests_and_keeps_its_files(assignment):
    results = assignment.public(assignment.out / "student")
    assert results.pop("files").score == checks.FILES
    assert results.keys() == checks.probes_of(assignment.module).keys()
    assert all(result.score == 0 and result.output for result in results.values())


def test_the_solution_gets_full_points(assignment):
    long = assignment.number > 3  # their hidden cases are left out here
    results = [*assignment.public(assignment.out / "solution").values()] if long else grade.grade(
        assignment.kit, assignment.out / "solution")  # fmt: skip
    lost = {result.name: result.output for result in results if result.score < result.max_score}
    assert not lost
    points = checks.FILES + sum(result.score for result in results if result.name != "files") * (1 + long)
    assert points + getattr(assignment.module, "WRITTEN", 0) == 100


def test_each_wrong_solution_loses_points_and_is_told_the_idea_that_it_missed(assignment):
    assert assignment.module.WRONG
    for wrong in assignment.module.WRONG:
        results = assignment.public(make.wrong_folder(assignment.out, wrong), make.lost_by(wrong))
        for name in make.lost_by(wrong):
            assert results[name].score == 0, f"{wrong.name} passes {name}"
            assert checks.probes_of(assignment.module)[name].check.idea in results[name].output
            assert "expected" in results[name].output, f"{wrong.name}: {results[name].output}"


def test_students_get_neither_solution_nor_wrong_solutions_nor_hidden_tests(assignment):
    student = assignment.out / "student"
    probes = (student / "course" / "probes.py").read_text()
    assert "HANDOUT" not in probes and not any(wrong.name in probes for wrong in assignment.module.WRONG)
    assert not (student / "course" / "assignments").exists() and not (student / "course" / "make.py").exists()
    assert "explain" in (student / "AGENTS.md").read_text()
    for file, names in assignment.module.FUNCTIONS.items():
        blank = (student / file).read_text()
        assert all(name in (student / "HANDOUT.md").read_text() for name in names)
        assert blank != (ROOT / file).read_text()
        if file.endswith(".py"):
            left_out = blank.count("raise NotImplementedError") - (ROOT / file).read_text().count("NotImplementedError")
            assert left_out == len(names)
            compile(blank, file, "exec")


# ---------------------------------------------------------------- bodies


SOURCE = '''
class Layer:
    """A layer."""

    def forward(self, x):
        """x (B, T, D) to (B, T)."""
        # how it is done
        y, z = self.both(x).split(2)  # (B, T) each
        return y + z  # (B, T)

    def after(self):
        return 1
'''


def test_a_body_is_left_out_but_its_docstring_and_shapes_stay():
    blank = make.blanked("layer.py", SOURCE, ["Layer.forward"])
    expected = ['"""x (B, T, D) to (B, T)."""', "# y, z: (B, T) each", "# (B, T)", "raise NotImplementedError"]
    before, after = SOURCE.split("        # how it is done\n")[0], SOURCE.split("# (B, T)\n")[1]
    assert blank == before + "".join(f"        {line}\n" for line in expected[1:]) + after


def test_a_function_that_was_renamed_or_lost_its_docstring_cannot_be_left_out():
    for name, said in each([
    ("Layer.backward", "layer.py has no function Layer.backward any more"),
    ("forward", "layer.py has no function forward any more"),
    ("Layer.after", "layer.py: Layer.after has no docstring"),
]):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            make.blanked("layer.py", SOURCE, [name])


CUDA = """
// Adds b to a.
template <class E>
__device__ void add(E *a, const E *b) {
  if (a) {
    *a += *b;
  }
}
"""


def test_a_body_in_cuda_is_left_out_too():
    blank = make.blanked("add.cu", CUDA, ["add"])
    assert "+=" not in blank and blank.count("}") == 1 and "void add(E *a, const E *b) {" in blank
    with pytest.raises(ValueError, match="add.cu has no function sub"):
        make.blanked("add.cu", CUDA, ["sub"])
    with pytest.raises(ValueError, match="add.cu: add has no comment above it"):
        make.blanked("add.cu", CUDA.replace("// Adds b to a.", ""), ["add"])


def test_a_wrong_solution_whose_text_has_gone_cannot_be_made(tags):
    tags.module.WRONG = (checks.Wrong("gone", "tags.py", "no such text", "", loses="plain"),)
    with pytest.raises(ValueError, match="'gone': its old text occurs 0 times in tags.py, not once"):
        make.wrong_sources(tags.module, {"tags.py": "x = 1"})


# ---------------------------------------------------------------- submissions that do not play along


def submission(tags, folder, tail="", file="tags.py"):
    """The solution of assignment 1 with some lines at the end of a file."""
    shutil.copytree(tags.out / "solution", folder)
    with (folder / file).open("a") as source:
        source.write(tail)
    return folder


def plain_text(body):
    """A function of the assignment with another body."""
    return f"\n\nimport os, signal, subprocess, sys, time\ndef plain_text(rounds):\n    {body}\n"


CRASHES = [
    ("raise RuntimeError('no')", "RuntimeError: no"),
    ("os.kill(os.getpid(), signal.SIGSEGV)", "ended with SIGSEGV"),
    ("os._exit(3)", "ended with status 3"),
    ("sys.exit('bye')", "SystemExit: bye"),
    ("while True: pass", "no end after 2 seconds: is there an endless loop?"),
    ("time.sleep(1000)", "no end after 2 seconds"),
    ("return plain_text(rounds)", "RecursionError"),
    ("return object()", "a object came where a number"),
    ("return bytearray(1 << 40)", "MemoryError"),
    ("os.write(3, b'{\\n'); os._exit(0)", "is not what probes return"),
    ("os.write(3, b'{\"values\": [[]]}\\n'); os._exit(0)", "expected the results of 2 cases"),
    ("subprocess.Popen(['sleep', '1000']); return 'x'", "expected"),
    ("os.fork() or time.sleep(1000); return 'x'", "expected"),
]  # fmt: skip


def test_a_crash_or_endless_loop_costs_points_but_not_the_run(tags, fresh):
    for body, said in each(CRASHES):
        tmp_path = fresh()
        folder = submission(tags, tmp_path / "one", plain_text(body))
        results = tags.public(folder, ["plain", "forced"], seconds=2)
        assert results["plain"].score == 0 and said in results["plain"].output
        assert results["forced"].score == results["forced"].max_score and results["files"].score == checks.FILES


def test_what_does_not_compile_or_is_missing_costs_the_tests_that_need_it(tags, tmp_path):
    broken = tags.public(submission(tags, tmp_path / "broken", "\ndef ("), ["plain"])
    assert broken["plain"].score == 0 and "SyntaxError" in broken["plain"].output
    folder = submission(tags, tmp_path / "missing")
    (folder / "tags.py").unlink()
    missing = tags.public(folder, ["plain", "budget"])
    assert "tags.py is missing" in missing["files"].output
    assert "plain_text is not written yet" in missing["plain"].output
    assert missing["budget"].score == missing["budget"].max_score
    (tmp_path / "empty").mkdir()
    assert tags.public(tmp_path / "empty", ["plain"])["plain"].score == 0


def test_changed_tests_cost_points_and_are_not_used(tags, tmp_path):
    folder = submission(tags, tmp_path / "changed", plain_text("return ''"))
    for name in ("course/probes.py", "course/public/values.json", "tests/test_tags.py", "masks.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    results = tags.public(folder, ["plain"])
    assert results["files"].score == results["plain"].score == 0
    for name in ("course/probes.py", "tests/test_tags.py", "masks.py"):
        assert f"{name} differs from what was handed out" in results["files"].output
    shutil.rmtree(folder / "course"), shutil.rmtree(folder / "tests")
    assert tags.public(folder, ["plain"])["files"].score == checks.FILES  # masks.py alone costs nothing


def test_a_folder_in_the_folder_and_new_files_are_found_and_links_are_not_followed(tags, tmp_path):
    inner = submission(tags, tmp_path / "one" / "two", "\nimport helper\nassert helper.X == 1\n")
    (inner / "helper.py").write_text("X = 1")
    assert tags.public(tmp_path / "one", ["plain"])["plain"].score > 0
    secret = tmp_path / "secret.py"
    (inner / "helper.py").rename(secret)
    (inner / "helper.py").symlink_to(secret)
    assert "ModuleNotFoundError" in tags.public(tmp_path / "one", ["plain"])["plain"].output


def test_who_opens_a_file_of_the_grader_is_noticed(tags, fresh):
    reads, appends, opens = "open({!r}).read()", "open({!r}, 'a').write('[]')", "os.open({!r}, os.O_RDONLY)"
    for how, place in each(
        [(reads, "hidden"), (reads, "public"), (reads, "results"), (appends, "results"), (opens, "hidden")]
    ):
        tmp_path = fresh()
        results = tmp_path / "results" / "results.json"
        results.parent.mkdir()
        path = {"hidden": tags.kit.hidden / "values.json", "public": "course/public/values.json", "results": results}[
            place
        ]
        body = f"try: {how.format(str(path))}\n    except OSError: pass\n    return ''"
        folder = submission(tags, tmp_path / "curious", plain_text(body))
        found = by_name(grade.grade(tags.kit, folder, results, ["plain"]))
        assert found["files"].score == found["plain"].score == 0
        assert "which belongs to the grader" in found["plain"].output
        assert "tried to open" in found["files"].output and not results.exists()


def test_who_writes_the_results_by_another_program_is_noticed(tags, tmp_path):
    results = tmp_path / "results.json"
    body = f"subprocess.run(['sh', '-c', 'echo 100 > {results}']); return ''"
    found = by_name(grade.grade(tags.kit, submission(tags, tmp_path / "sly", plain_text(body)), results, ["plain"]))
    assert found["files"].score == 0 or os.geteuid() == 0  # as another user it could not
    assert not results.exists()


# ---------------------------------------------------------------- the zip, and the command


def test_the_zip_runs_as_gradescope_runs_it(tags, tmp_path):
    source = tmp_path / "source"
    with zipfile.ZipFile(tags.out / "autograder.zip") as archive:
        archive.extractall(source)
        assert all(archive.getinfo(name).external_attr >> 16 & 0o111 for name in ("setup.sh", "run_autograder"))
    folder = submission(tags, tmp_path / "submission", plain_text("return ''"))
    script = (source / "run_autograder").read_text()
    script = script.replace("/autograder", str(tmp_path)).replace("python3", sys.executable)
    subprocess.run(["bash", "-c", script], check=True, capture_output=True)
    report = json.loads((tmp_path / "results" / "results.json").read_text())
    assert report["execution_time"] >= 0 and folder.exists()
    tests = {test["name"]: test for test in report["tests"]}
    assert tests["plain"]["score"] == 0 and "expected" in tests["plain"]["output"]
    assert {test["visibility"] for test in report["tests"]} == {"visible", "after_published"}
    assert sum(test["max_score"] for test in report["tests"]) == 100
    assert sum(test["score"] for test in report["tests"]) == 100 - checks.probes_of(tags.module)["plain"].check.points


def command(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["grade.py", *map(str, options)])
    grade.main()


def test_several_submissions_are_graded_into_a_table_and_junit_xml(tags, tmp_path, monkeypatch, capsys):
    submissions = [tags.out / "student", tags.out / "solution"]
    kit, report = tags.out / "autograder.zip", tmp_path / "report.xml"
    command(monkeypatch, *submissions, "--kit", kit, "--only", "plain", "--junit", report)
    said = capsys.readouterr().out
    assert "plain_text is not written yet" in said and all(f"== {path}" in said for path in submissions)
    blank, solution = ElementTree.parse(report).getroot()
    assert blank.get("tests") == solution.get("tests") == "3"
    assert blank.get("failures") == "2" and solution.get("failures") == "0"
    assert "is not written yet" in blank[1][0].text


def test_an_assignment_is_made_in_a_folder_named_from_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(make.CASES, make.PUBLIC, 1)
    make.make(1, Path("hw"), hidden_seeds=[101])
    assert (tmp_path / "hw" / "autograder.zip").exists()


def test_what_cannot_be_graded_is_an_error_of_one_line(tags, tmp_path, monkeypatch):
    for options, said in (
        (["nowhere", "--kit", tags.out / "autograder.zip"], "nowhere is not a folder: expected a submission"),
        ([tmp_path, "--kit", ROOT / "README.md"], "expected the autograder.zip of an assignment"),
        ([tmp_path, "--kit", tags.out / "autograder.zip", "--only", "no"], "--only no: expected one of written"),
        ([tmp_path], "run this in an assignment's student folder"),
    ):
        with pytest.raises(ValueError, match=said):
            command(monkeypatch, *options)
    with pytest.raises(ValueError, match="exists already"):
        make.make(1, tags.out)
