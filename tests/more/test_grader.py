"""Grading: whatever a submission does costs its own points alone, and leads to nothing that is secret."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import each

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "course"))

import checks
import child
import grade
from courses import by_name, command, made, plain_text, submission

from show import record

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an assignment is made from what git tracks")


@pytest.fixture(scope="module")
def tags(tmp_path_factory):
    """Assignment 1, which is quick to grade."""
    yield from made(1, tmp_path_factory.mktemp("tags"))


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
