"""Files that appear whole or not at all, whatever interrupts the write: an error, Ctrl-C, a full disk, a power cut."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# what a file that is something else, cut or made up may raise; RuntimeError: also JSON nested too deeply
UNREADABLE = (SafetensorError, OSError, KeyError, TypeError, ValueError, OverflowError, RuntimeError)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it replaces `path` once all of it is on the disk.

    If the block or the write fails, `path` stays as it was and the temporary file is removed. Missing folders are
    made. The file gets the mode of any new file, even if a library writes it for its owner alone.
    Raises ValueError if `path` is something other than a file, OSError if it cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file: remove it or write elsewhere")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.unlink(missing_ok=True)  # a killed process may have left it
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        _to_disk(temporary)
        os.replace(temporary, path)
    except SafetensorError as error:  # a full disk, say; it carries no error number
        raise OSError(f"{path} cannot be written ({error}): free some space, or write elsewhere") from None
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _to_disk(path.parent)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8, line breaks as given) so that it is never seen half-written."""
    with atomic(path) as temporary:
        temporary.write_bytes(text.encode())


def refuse_overwriting(read: Iterable[str | Path], **write: str | Path) -> None:
    """Raise ValueError where a file or folder to write is one that is read, or holds one that is.

    `write`: paths by the name of their setting; "" is none.
    """
    for name, path in write.items():
        for source in read:
            if path and Path(path).resolve() in (Path(source).resolve(), Path(source).resolve().parent):
                raise ValueError(f"--{name} {path}: holds {source}, which is read: name another place")


def _to_disk(path: Path) -> None:
    """Return once a file or folder is on the disk: until then a power cut may lose it."""
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
