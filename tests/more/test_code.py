"""Hashes of code: what a result was made of, and what does not matter to it."""

import subprocess
import sys

from conftest import each

from measure import code
from measure.code import TRAINING, bare, fingerprint, sources
from plumbing.settings import ROOT

SCRIPTS = ("train.py", "measure/eval.py")


def test_the_sources_of_a_script_are_all_modules_that_it_loads_and_the_cuda_sources():
    """Python itself says what it has loaded. Settings, files and what shows answers change no result."""
    command = [sys.executable, "-c", LOADED, *SCRIPTS]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for script, paths in each(zip(SCRIPTS, loaded, strict=True)):
        idle = {ROOT / "plumbing/settings.py", ROOT / "plumbing/files.py"}
        wanted = {ROOT / path for path in paths.split()} - idle
        found = sources(ROOT / script)
        assert ROOT / script in found and ROOT / "model.py" in wanted and all(path.exists() for path in found)
        assert {path for path in wanted if path.parent != ROOT / "show"} <= found
        assert {path.name for path in found} >= {"attention.cu", "gpu.h", "tiles.h"}
        assert not {*idle, ROOT / "show" / "terminal.py", ROOT / "tests" / "conftest.py"} & found


LOADED = """
import os, runpy, sys, torch._dynamo
from pathlib import Path
for script in sys.argv[1:]:
    if not os.fork():  # a process for each; torch, which takes seconds, is loaded once
        runpy.run_path(script)
        paths = [Path(m.__file__).resolve() for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
        print(*(path.relative_to(Path.cwd()) for path in paths
                if Path.cwd() in path.parents and path.suffix == ".py" and path.exists() and not ".venv" in path.parts),
              flush=True)
        os._exit(0)
    os.wait()
"""


def test_what_decides_a_training_is_imported_by_train_py():
    assert {*TRAINING} <= sources(ROOT / "train.py") and {ROOT / f"{n}.py" for n in ("noise", "loss")} <= {*TRAINING}


PYTHON = 'def f(a, b):\n    """Says."""\n    x = "# no comment"  # why\n    return a + b, x\n'
CUDA = 'int x = 1;  // why\n/* and\nhow */ const char *s = "// no comment";\n'
TEXTS = [
    ("a.py", PYTHON, ('"""Says."""', '"""Says\n\n    more."""'), ("a + b", "a - b")),
    ("a.py", PYTHON, ('    """Says."""\n', ""), ("no comment", "a comment")),
    ("a.py", PYTHON, ("# why", "# why not"), ("b):", "b=0):")),
    ("a.py", PYTHON, ("    return a + b, x", "\n    return (\n        a + b, x,\n    )"), ("a + b, x", "a + b")),
    ("a.py", 'x: int = setting(0, "how many", at_least=0)\n', ("how many", "how few"), ("at_least=0", "at_least=1")),
    ("a.cu", CUDA, ("// why", "// why not"), ("x = 1", "x = 2")),
    ("a.cu", CUDA, ("how */ ", "why */\n\n  "), ("// no comment", "// a comment")),
    ("a.h", CUDA, (";  // why", ";"), ("int x", "long x")),
]  # fmt: skip


def test_comments_docstrings_help_and_layout_change_no_hash_and_everything_else_does(fresh):
    for name, text, same, other in each(TEXTS):
        path, found = fresh() / name, []
        for old, new in (("", ""), same, other):
            assert old in text
            path.write_text(text.replace(old, new))
            found.append(bare(path))
        assert found[0] == found[1] != found[2]


def test_the_hash_of_a_script_changes_with_what_it_imports(tmp_path, monkeypatch):
    """`import b` inside a function, `from d import c` of a package, and not what nobody imports."""
    monkeypatch.setattr(code, "ROOT", tmp_path)
    (tmp_path / "d").mkdir()
    texts = {"a.py": "def f():\n    import b\n", "b.py": "from d import c\n", "d/__init__.py": "", "d/c.py": "1\n",
             "d/k.cu": "int x;\n", "e.py": ""}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    now = lambda: fingerprint(sources(tmp_path / "a.py"))
    before, changed = now(), {}
    for name, text in texts.items():
        (tmp_path / name).write_text(text + "int y;" if name == "d/k.cu" else text + "y = 2\n")
        changed[name] = now() != before
        (tmp_path / name).write_text(text)
    assert changed == {name: name != "e.py" for name in texts} and now() == before
