"""The course: each assignment is made from the sources, and its tests tell the solution from plausible wrong ones."""

import functools
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
import child
import grade
import make

from show import record

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


@pytest.fixture(scope="module", params=make.assignments(), ids="hw{}".format)
def assignment(request, tmp_path_factory):
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


REACHES = [
    "open({kit!r}, 'rb').read(1)",
    "os.link({kit!r}, 'mine') or open('mine', 'rb').read(1)",
    "os.symlink({kit!r}, 'other') or open('other', 'rb').read(1)",
    "not subprocess.run(['cat', {kit!r}]).returncode",
    "os.listdir(os.path.dirname({kit!r}))",
    "open({earlier!r}, 'a')",
    "os.replace('masks.py', {earlier!r}) or 1",
    "not subprocess.run(['sh', '-c', 'echo 100 > {earlier}']).returncode",
    "os.unlink({earlier!r}) or 1",
    "open({solution!r}).read()",
    "open('/proc/%d/cmdline' % os.getppid()).read()",
    "open('/proc/%d/mem' % os.getppid(), 'rb')",
    "open(os.path.expanduser('~root/.bashrc')).read()",
    "os.environ.get('SECRET')",
    "[1 for o in gc.get_objects() if isinstance(o, dict) and {{'cases', 'values'}} <= o.keys()]",
    "[1 for o in gc.get_objects() if type(o).__name__ in ('Kit', 'Result')]",
]  # fmt: skip
UNTRUSTED = """
    import gc
    reached = []
    for how in {}:
        try:
            reached += [how] if eval(how) else []
        except Exception:
            pass
    raise RuntimeError(f"reached {{reached}}")"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Landlock")
def test_no_way_leads_to_values_results_other_submissions_or_the_grader(tags, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "a token")
    monkeypatch.setattr(child, "_server", functools.cache(child._server.__wrapped__))  # begun after that
    (earlier := tmp_path / "results.json").write_text("{}")
    paths = dict(kit=str(tags.out / "autograder.zip"), earlier=str(earlier), solution=str(ROOT / "tags.py"))
    ways = [way.format(**paths) for way in REACHES]
    folder = submission(tags, tmp_path / "curious", plain_text(UNTRUSTED.format(ways)))
    found = by_name(grade.grade(tags.kit, folder, only=["plain"]))
    assert "reached []" in found["plain"].output and found["plain"].score == 0
    assert earlier.read_text() == "{}"
    trusted = by_name(grade.grade(tags.kit, folder, only=["plain"], trust=True))
    assert "autograder.zip" in trusted["plain"].output, "the ways do lead there"


def test_nothing_hidden_is_graded_where_a_submission_could_read_it(tags, tmp_path, monkeypatch):
    kit = tags.out / "autograder.zip"
    assert child.reachable([kit, Path(os.__file__)]) == [os.__file__]
    monkeypatch.setattr(child, "reachable", lambda paths: [str(path) for path in paths])
    with pytest.raises(ValueError, match=f"submissions could read {kit}.*or grade people whom you trust, with --trust"):
        command(monkeypatch, tags.out / "solution", "--kit", kit)
    command(monkeypatch, tags.out / "solution", "--kit", kit, "--only", "plain", "--trust")


def test_processes_that_a_submission_leaves_behind_are_ended(tags, tmp_path):
    body = "subprocess.Popen(['sleep', '4321.5'], start_new_session=True); return ''"
    tags.public(submission(tags, tmp_path / "many", plain_text(body)), ["plain"])
    assert "4321.5" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


VALUES = ["10**400", "-10**4000", "10**5000", "float('nan')", "float('inf')", "{1: 2}", "[[]]", "None", "True", "b''",
          "'\\x1b[2J\\ud800'", "[0] * 10**6", "deep(900)", "deep(10**5)", "cyclic()"]  # fmt: skip
MAKERS = """
def deep(n):
    x = []
    for _ in range(n):
        x = [x]
    return x
def cyclic():
    x = []
    x.append(x)
    return x
"""


def test_a_value_of_any_kind_costs_points_of_that_submission_alone(tags, tmp_path):
    expected = [1, 1.5, "a", None, True, [1, 2.5], {"a": [1.0], "names": ["x"]}, float("nan"), 10**400]
    for value in [10**400, -(10**400), float("nan"), float("inf"), "a\x1b", [], {}, [[[]]] * 9, None, False]:
        for one in each(expected):
            check = checks.Check(1, "idea", checks.draw_rows, 1, 1e-3)
            passes, said = grade.judge(check, child.Outcome([value]), [(0, 1)], [one])
            assert passes == (value == one or value != value and one != one) and (passes or "idea" in said)
    bodies = "".join(f"    if n == {n}: return {value}\n" for n, value in enumerate(VALUES))
    for n, value in each(enumerate(VALUES)):
        folder = submission(tags, tmp_path / str(n), f"{MAKERS}\ndef plain_text(rounds, n={n}):\n{bodies}")
        result = tags.public(folder, ["plain"])["plain"]
        assert result.score == 0 and result.output == grade.printable(result.output)


def test_what_comes_from_outside_is_printed_without_control_codes(tags, tmp_path, monkeypatch, capsys):
    for text in ("a\nb", "\x1b[2J\x07", "\ud800", "\x9b1A", "e\u0301", "\u202eabc"):
        assert grade.printable(text) == record.printable(text)
    folder = submission(tags, tmp_path / "red\x1b[31m", plain_text("raise ValueError('\\x1b[2J')"))
    command(monkeypatch, folder, folder, "--kit", tags.out / "autograder.zip", "--only", "plain")
    said = capsys.readouterr().out
    assert "\x1b" not in said and "ValueError: ?[2J" in said


def test_an_import_that_does_not_end_is_waited_for_once(tags, tmp_path):
    results = tags.public(submission(tags, tmp_path / "loop", "\nwhile True: pass\n"), seconds=1)
    outputs = [result.output for name, result in results.items() if name != "files"]
    assert "no end after 1 seconds: is there an endless loop?\n  tags.py, line" in outputs[0]
    assert len(outputs) > 2 and all("not run after an import that does not end" in output for output in outputs[1:])
    in_function = tags.public(submission(tags, tmp_path / "other", plain_text("while True: pass")), ["plain", "forced"],
                              seconds=1)  # fmt: skip
    assert "in plain_text: while True: pass" in in_function["plain"].output and in_function["forced"].score > 0


def test_what_cannot_be_graded_fails_alone(tags, tmp_path):
    folder = submission(tags, tmp_path / "folders")
    (folder / "masks.py").mkdir()
    (folder / "masks.py" / "x.py").write_text("")  # masks.py is a file in the tree
    results = by_name(grade.grade(tags.kit, folder))
    assert sum(result.max_score for result in results.values()) == 100
    assert not any(result.score for result in results.values())
    assert "could not be graded: FileExistsError" in results["files"].output


def test_the_only_folder_that_has_the_files_is_found(tags, tmp_path):
    for home in each(["", "student", "hw1/student"]):
        tmp = tmp_path / f"of-{home.replace('/', '-')}"
        shutil.copytree(tags.out / "solution", tmp / home)
        for beside in ("venv/lib/tags.py", "notes/a.txt", "__pycache__/tags.py"):
            (tmp / beside).parent.mkdir(parents=True, exist_ok=True)
            (tmp / beside).write_text("")
        (tmp / "venv/pyvenv.cfg").write_text("")
        results = tags.public(tmp, ["plain"])
        assert results["plain"].score > 0 and (not home or f"taken from {home}/" in results["files"].output)
    shutil.copytree(tags.out / "solution", tmp / "copy")
    two = tags.public(tmp, ["plain"])
    assert "found in copy/ and in hw1/student/, and none was taken" in two["files"].output
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x").symlink_to(tags.out / "solution")
    (tmp_path / "link").symlink_to(tags.out / "solution")
    for name in each(["empty", "link"]):
        results = tags.public(tmp_path / name, ["plain"])
        assert (
            results["plain"].score == 0
            and "looked in all folders for tags.py and grammar.py" in results["files"].output
        )


def test_a_large_file_is_not_read_where_its_size_says_enough(tags, tmp_path, monkeypatch):
    folder = submission(tags, tmp_path / "large")
    with (folder / "README.md").open("wb") as file:
        file.truncate(3 << 30)
    monkeypatch.setattr(grade, "digest", lambda path: pytest.fail(f"{path} is read"))
    assert "README.md differs" in tags.public(folder, ["plain"])["files"].output


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
    assert "100 points are not tested here" not in said  # of --only
    assert "plain_text is not written yet" in said and all(f"== {path}" in said for path in submissions)
    blank, solution = ElementTree.parse(report).getroot()
    assert blank.get("tests") == solution.get("tests") == "3"
    assert blank.get("failures") == "2" and solution.get("failures") == "0"
    assert "is not written yet" in blank[1][0].text


def test_an_assignment_is_made_in_a_folder_named_from_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make.make(1, Path("hw"), hidden_seeds=[101, 102])
    assert (tmp_path / "hw" / "autograder.zip").exists()


def test_an_assignment_that_fails_can_be_made_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(make, "pack", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make.make(1, tmp_path / "deep" / "hw", hidden_seeds=[101])
    assert not [*(tmp_path / "deep").iterdir()]


def test_pictures_and_tables_fit_a_terminal_and_say_what_is_left_out():
    rows = [[i <= j for i in range(170)] for j in range(170)]
    came = [[i <= j and (i, j) != (100, 120) for i in range(170)] for j in range(170)]
    lines = checks.draw_mask(rows, came).splitlines()
    assert max(map(len, lines)) <= 80 and "keys 63 to 125 of 170" in lines[2]
    assert [line.split()[0] for line in lines if line.endswith("<-")] == ["120"] and "O" in lines[3 + 120][13:]
    table = {key * 9: [*range(100)] for key in "abcdefgh"}
    wrong = table | {"h" * 9: [*range(90), 7]}
    lines = checks.draw_rows(table, wrong).splitlines()
    assert max(map(len, lines)) <= 80 and "hhhhhhhhh" in lines[0] and "90 came 7 X" in "\n".join(lines)
    longer = checks.draw_rows({"a": [1]}, {"a": [1] * 10**6})
    assert len(longer.splitlines()) == 3 and "- came 1 X" in longer


def test_what_cannot_be_graded_is_an_error_of_one_line(tags, tmp_path, monkeypatch):
    for options, said in (
        (["nowhere", "--kit", tags.out / "autograder.zip"], "nowhere is not a folder: expected a submission"),
        ([tmp_path, "--kit", ROOT / "README.md"], "expected the autograder.zip of an assignment"),
        ([tmp_path, "--kit", tags.out / "autograder.zip", "--only", "no"], "--only no: expected one of written"),
        ([tmp_path], "run this in an assignment's student folder"),
        (
            [tmp_path, "--kit", tags.out / "autograder.zip", "--junit", "no/j.xml"],
            "--junit no/j.xml: expected a file in",
        ),
        ([tmp_path, "--kit", tags.out / "autograder.zip", "--results", tmp_path], "--results .*: expected a file in"),
        ([tmp_path, "--kit", tags.out / "autograder.zip", "--junit", tags.out / "autograder.zip"], "which is read"),
        ([tmp_path, "--kit", tags.out / "autograder.zip", "--junit", "a", "--results", "a"], "name another place"),
    ):
        with pytest.raises(ValueError, match=said):
            command(monkeypatch, *options)
    with pytest.raises(ValueError, match="exists already"):
        make.make(1, tags.out)
