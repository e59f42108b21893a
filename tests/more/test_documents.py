"""The commands that the documents show: each is one that its script takes, and no setting of it changes nothing."""

import argparse
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from config import MethodConfig, SampleConfig, TrainConfig
from model import ModelConfig
from plumbing.settings import pick, refuse_idle

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path for path in ROOT.glob("**/*.md") if not {".venv", "runs"} & {*path.relative_to(ROOT).parts})
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python|torchrun) [^-]|[A-Z]+=\"")  # or a variable for the ones below
STUBS = r"""
python() { printf '%s\x1f' "$@"; printf '\n'; }
torchrun() { shift 2; python "$@"; }
"""


class Parsed(BaseException):
    """Ends a script once it has parsed its options."""


def commands(page):
    """The commands of a page as lists of arguments, the script first, as a shell hands them over."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.split("\n") if line.startswith("    ")]
    script = STUBS + "\n".join(line for line in lines if COMMAND.match(line))
    done = subprocess.run(["bash", "-u", "-c", script], capture_output=True, text=True, check=True, env={})
    return [line.split("\x1f")[:-1] for line in done.stdout.splitlines()]


def options_of(script, arguments, monkeypatch):
    """What the script itself makes of its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, arguments=None):
        raise Parsed(parse(parser, arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    with pytest.raises(Parsed) as parsed:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    monkeypatch.undo()
    return parsed.value.args[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_command_of_a_page_is_taken_by_its_script(page, monkeypatch):
    for script, *arguments in commands(page):
        if script in ("-m", "-c") or script.startswith("runs/") or "--help" in arguments:
            continue
        if script == "minimal.py":  # it takes no options, and begins at once
            assert not arguments
            continue
        options = options_of(script, arguments, monkeypatch)
        if script == "train.py":
            method = pick(MethodConfig, options)
            refuse_idle(method, method)
            refuse_idle(pick(TrainConfig, options), method)
            pick(ModelConfig, options)
        if script in ("sample.py", "measure/eval.py"):
            pick(SampleConfig, options)


def test_commands_are_found():
    assert len(commands(ROOT / "README.md")) > 3 and sum(len(commands(page)) for page in PAGES) > 60
