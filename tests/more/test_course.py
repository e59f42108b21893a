"""The course: each assignment is made from the sources, and its tests tell the solution from plausible wrong ones."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import each

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "course"))

import by_hand
import checks
import child
import grade
import make
import small
from courses import command, made, plain_text, submission

import unmask

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an assignment is made from what git tracks")


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
    assert not any("make.make" in path.read_text() for path in student.rglob("tests/more/*.py"))
    assert all(word in (student / "HANDOUT.md").read_text() for word in ("$VENV", "download.pytorch.org/whl/cpu"))
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


def test_probes_follow_a_signature_that_changed(monkeypatch):
    """A rule of one's own may ask for the places of slots, or for more: it can still be left out and tested."""
    module, certainty, fill = make.checked(make.assignments()[4]), unmask.certainty, unmask.fill

    def by_place(entry, generators, config, token, logits, more=None):
        assert entry.shape == token.shape
        slots = dict(entry=entry, generators=generators, config=config, token=token, logits=logits)
        return small.call(certainty, **slots)

    def anew(generators, config, pad, quota, entry, group, logits, more=None):
        return fill(logits, group, entry, quota, pad, config, generators)

    for name, changed, probe in ("certainty", by_place, "certainty_of_slots"), ("fill", anew, "slots_kept"):
        came = lambda: str(getattr(module, probe)(np.random.default_rng(0), 1))
        expected = came()
        with monkeypatch.context() as patch:
            patch.setattr(unmask, name, changed)
            assert came() == expected


def test_what_the_table_of_changes_names_is_there():
    table = (ROOT / "course" / "README.md").read_text().split("### Where to change what")[1].split("\n## ")[0]
    code = "\n".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")])
    names = {part for name in re.findall(r"`([\w.]+)`", table) for part in name.split(".")}
    assert len(names) > 20 and not {n for n in names if not re.search(rf"(def |class |^ *){n}\b", code, re.M)}
    tests = re.findall(r"`(test_\w+\.py) -k (\w+)`", table)
    assert len(tests) > 7
    for file, words in each(tests):
        assert len(re.findall(rf"^def test_\w*{words}", (ROOT / "tests" / file).read_text(), re.M)) == 1


# ---------------------------------------------------------------- the zip, and the command


def test_the_zip_runs_as_gradescope_runs_it(tags, tmp_path):
    if child.reachable([tags.out / "autograder.zip"]):
        pytest.skip("needs Landlock, or a root whose Python others can read")
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


def test_several_submissions_are_graded_into_a_table_and_junit_xml(tags, tmp_path, monkeypatch, capsys):
    submissions = [tags.out / "student", tags.out / "solution"]
    kit, report = tags.out / "autograder.zip", tmp_path / "report.xml"
    command(monkeypatch, *submissions, "--kit", kit, "--only", "plain", "--junit", report, "--trust")
    said = capsys.readouterr().out
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
    assert "5     5  the other 95 of 100 points are not tested here" in grade.table(
        [grade.Result("files", 5, 5, "")], 100
    )
    passes = lambda computes: {"passes": [{"computes": computes, "error": 0, "stage": "plan"}]}
    assert len(by_hand.draw_passes(passes("0-3 70"), passes("0-3 90-999999999999"))) < 200
    endless = checks.Check(1, "idea", lambda *_: "x" * 10**6, 1, 1e-3)
    assert len(checks.message(endless, 1, 2, ("", 1, 2))) <= checks.LONGEST + 100
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
