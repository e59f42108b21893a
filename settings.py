"""Settings as dataclasses: one commented field a setting, from which every `--help` is made."""

import argparse
from dataclasses import field, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def setting(default, help):
    """A dataclass field with the sentence that `--help` shows."""
    return field(default=default, metadata={"help": help})


def add_settings(parser, *classes):
    """Give the parser an option for each `setting` of the dataclasses."""
    for cls in classes:
        group = parser.add_argument_group(cls.__doc__.splitlines()[0].rstrip("."))
        for f in fields(cls):
            if "help" not in f.metadata:
                continue
            kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
            text = f.metadata["help"] + " (default: %(default)s)"
            group.add_argument("--" + f.name, default=f.default, help=text, **kind)


def pick(cls, args, **more):
    """The dataclass filled from parsed arguments (and `more`)."""
    given = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
    return cls(**{**given, **more})


def locate(path):
    """A path as given or, if nothing is there, in the project's folder: commands work from anywhere."""
    return Path(path) if Path(path).exists() else ROOT / path
