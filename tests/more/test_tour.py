"""The notebook runs from top to bottom, as a service that hosts notebooks would run it, but with fewer updates."""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "course/tour.ipynb"


def cells(kind):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


@pytest.fixture
def shown(monkeypatch, tmp_path):
    """What the notebook displays beside what it prints; it begins in its own folder, and writes into another."""
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("UPDATES", "3")
    displayed = []
    fake = types.SimpleNamespace(HTML=lambda text: text, Image=lambda path: Path(path), display=displayed.append)
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    threads = torch.get_num_threads()
    yield displayed
    torch.set_num_threads(threads)


def run(sources, namespace):
    for number, source in enumerate(sources):
        exec(compile(source, f"code cell {number} of tour.ipynb", "exec"), namespace)
    return namespace


def files():
    skipped = {".git", ".venv", "__pycache__", ".pytest_cache", "runs"}
    return {path for path in ROOT.rglob("*") if not skipped & {*path.relative_to(ROOT).parts}}


def test_every_cell_runs_and_shows_what_its_text_says(capsys, shown):
    pytest.importorskip("matplotlib")
    before = files()
    names = run(cells("code"), {"__name__": "__main__"})
    assert files() == before, "it leaves nothing behind in the clone"
    said = capsys.readouterr().out
    assert "matplotlib is missing" not in said
    assert "rows see columns" in said and re.search(r"span 0: .*____", said)
    first = next(frame for frame in names["recipe"] if frame.denoise_passes)
    assert said.count("  kept") == sum(draw.outcome == "new" for draw in first.draws if draw.part[2] == 0)
    player, picture = shown
    assert "srcdoc=" in player and "&lt;!DOCTYPE html&gt;" in player and picture.exists()
    assert "step 3/3" in " ".join(said.split()) and said.count("<topic>") + said.count("<eos>") > 1
    assert len(names["frontier"]) == len(names["WAYS"])
    for way, (passes, exact) in names["frontier"].items():
        assert exact == 1 and (passes > 100) == (way == "autoregressive"), "the text says: fewer passes, same quality"


def test_without_matplotlib_it_says_so_and_prints_the_losses(monkeypatch, capsys, shown, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.csv").write_text("step,tokens,plan,span,val_plan,val_span\n1,900,2.5,3.25,,\n")
    sources = cells("code")
    (losses,) = (source for source in sources if "measure.plot" in source)
    run([sources[0], losses], {"folder": tmp_path})
    said = capsys.readouterr().out
    assert "matplotlib is missing" in said and "plan     2.50\nspan     3.25" in said


# ---------------------------------------------------------------- the first cell


def test_outside_a_clone_it_asks_for_the_repository_or_clones_it(monkeypatch, shown, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="write the address of its repository into REPOSITORY"):
        run(cells("code")[:1], {})
    git = ["git", "-C", str(tmp_path / "origin"), "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "origin/show").mkdir(parents=True)
    (tmp_path / "origin/show/record.py").touch()
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setenv("REPOSITORY", (tmp_path / "origin").as_uri())
    for _ in range(2):  # the second time it finds the clone
        monkeypatch.chdir(tmp_path)
        run(cells("code")[:1], {})
        assert Path.cwd() == tmp_path / "planned-diffusion" and sys.path[0] == str(Path.cwd())


def test_it_installs_what_is_missing(monkeypatch, shown):
    find, calls = importlib.util.find_spec, []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "regex" else find(name))
    monkeypatch.setattr(subprocess, "run", lambda command, **options: calls.append(command))
    run(cells("code")[:1], {})
    assert calls == [[sys.executable, "-m", "pip", "install", "--quiet", "-r", "requirements.txt"]]


def test_it_is_short_and_has_no_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert len(notebook["cells"]) <= 20
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])
