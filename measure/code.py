"""Hashes of code, under which results are stored: what gave a result has not changed while its hash is the same."""

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from plumbing.settings import ROOT

# Reading options, writing files and showing answers changes no result; what options mean is said where they are used.
IGNORED = {ROOT / "plumbing/settings.py", ROOT / "plumbing/files.py", ROOT / "show"}
CUDA = (".cu", ".h")  # sources that a package compiles
# What decides the losses of a training, besides its settings and its data. The rest of what train.py imports picks a
# device, keeps the run's folder, or decodes.
TRAINING = [ROOT / f"{name}.py" for name in (
    "tags", "tokenizer", "masks", "noise", "model", "loss", "methods", "train", "drafting/training", "training/batches",
    "training/optim")]  # fmt: skip


def fingerprint(files: Iterable[Path]) -> str:
    """A hash of the code in some files of the project; comments, docstrings, help texts and layout do not count."""
    texts = [(path.relative_to(ROOT).as_posix(), bare(path)) for path in sorted(files)]
    return hashlib.sha256(repr(texts).encode()).hexdigest()[:16]


def sources(script: Path) -> set[Path]:
    """The script and the files of the project that it imports, that these import, and so on."""
    found, ahead = set(), [script]
    while ahead:
        path = ahead.pop()
        if path in found or IGNORED & {path, *path.parents}:
            continue
        found.add(path)
        if path.suffix == ".py":
            ahead += imported(path)
        if path.name == "__init__.py":
            ahead += [beside for beside in path.parent.iterdir() if beside.suffix in CUDA]
    return found


def imported(path: Path) -> Iterator[Path]:
    """Files of the project that a Python file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # `from a import b`: b may be a name in a, or a module
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            for n in range(1, len(parts) + 1):
                module = ROOT.joinpath(*parts[:n])
                yield from filter(Path.exists, (module.with_suffix(".py"), module / "__init__.py"))


def bare(path: Path) -> str:
    """A source file without what does not matter to the machine."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in CUDA:
        comment_or_string = r'//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\])*")'
        text = re.sub(comment_or_string, lambda match: match[1] or " ", text, flags=re.DOTALL)
        return " ".join(text.split())
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setting" and len(node.args) > 1:
            del node.args[1]  # what --help says of it
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)
