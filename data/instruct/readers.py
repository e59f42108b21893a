"""Files of records, read piece by piece: JSON (one array of any size), JSONL, CSV and TSV, Parquet with pyarrow."""

import codecs
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

CHUNK = 1 << 20  # characters read at once
LONGEST = 1 << 26  # characters of a record: beyond, a quote or bracket is missing


class Row(NamedTuple):
    """What a file holds at one place: the fields of a record, or a str that says why there are none."""

    place: str
    fields: Any
    share: float


def rows(path: Path) -> Iterator[Row]:
    """What a file holds, piece by piece. Raises ValueError for a file of no known kind."""
    if not path.is_file():
        raise ValueError(f"{path} is no file: name a .json, .jsonl, .csv, .tsv or .parquet file")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return parquet_rows(path)
    if suffix in (".csv", ".tsv"):
        return csv_rows(path, "\t" if suffix == ".tsv" else ",")
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    return array_rows(path) if start == b"[" else line_rows(path)


def line_rows(path: Path) -> Iterator[Row]:
    """JSON Lines: an object per line; empty lines do not count."""
    size, done = max(path.stat().st_size, 1), 0
    with path.open("rb") as file:  # bytes: a text may hold other line breaks
        for number, line in enumerate(file, 1):
            done += len(line)
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield Row(f"{path}, line {number}", parsed(line), done / size)


def parsed(source: str | bytes) -> Any:
    """The value of JSON, or a str that says why there is none."""
    try:
        value = json.loads(source)
    except RecursionError:
        return "JSON nested too deeply"
    except UnicodeDecodeError:
        return "bytes that are no UTF-8"
    except ValueError as error:
        return f"no JSON: {error}"
    return [value] if isinstance(value, str) else value  # a str would be a reason


def array_rows(path: Path) -> Iterator[Row]:
    """A JSON array, record by record: no more of the file is held than a record needs, and CHUNK."""
    size, eof, block = max(path.stat().st_size, 1), False, CHUNK
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        held = file.read(4096)  # the bracket is in it: `rows` has looked
        at = held.index("[") + 1
        line = 1 + held.count("\n", 0, at)
        while True:
            begin = BETWEEN.match(held, at).end()
            line, at = line + held.count("\n", at, begin), begin
            end = record_end(held, at) if at < len(held) else None
            if end is None and not eof and len(held) - at < LONGEST:
                more = file.read(block)
                held, at, eof, block = held[at:] + more, 0, not more, block * 2  # twice: few scans of a long record
                continue
            where, share = f"{path}, line {line}", file.buffer.tell() / size
            if end is None:
                yield Row(where, "the array does not end: a quote, a bracket or the file's end is missing here", 1.0)
                return
            if held[at] == "]":
                break
            yield Row(where, parsed(held[at:end]), share)
            line, at, block = line + held.count("\n", at, end), end, CHUNK
        if held[end:].strip() or file.read(CHUNK).strip():
            yield Row(where, "something follows the end of the array", 1.0)


BETWEEN = re.compile(r"[\s,]*")  # what may be between records
TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]|"', re.DOTALL)  # the last: a quote that is not closed yet
PLAIN = re.compile(r"[^,\]\s]+(?=[,\]\s])")


def record_end(held: str, at: int) -> int | None:
    """Where the value that begins at `at` ends, found by its brackets, well-formed within or not; None: not yet.

    >>> record_end('{"a": "}"}, {}', 0)
    10
    """
    if held[at] not in '{["':
        plain = PLAIN.match(held, at)
        return at + 1 if held[at] == "]" else plain and plain.end()
    depth = 0
    for token in TOKEN.finditer(held, at):
        if token[0] == '"':
            return None
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token[0], 0)
        if depth <= 0:
            return token.end()
    return None


def csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    """A table with a line of names."""
    csv.field_size_limit(LONGEST)
    size = max(path.stat().st_size, 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        table = csv.reader(file, delimiter=delimiter, strict=True)
        names = None
        while True:
            where = f"{path}, line {table.line_num + 1}"  # a row may take several lines
            try:
                cells = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                cells = str(error)
            share = file.buffer.tell() / size
            if not cells:
                continue
            if names is None:
                names = cells
            elif isinstance(cells, list) and len(cells) == len(names):
                yield Row(where, dict(zip(names, cells)), share)
            else:
                yield Row(where, cells if isinstance(cells, str) else f"{len(cells)} cells, not {len(names)}", share)


def parquet_rows(path: Path) -> Iterator[Row]:
    """A Parquet file, a few rows in memory at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: needs pyarrow, so `pip install pyarrow`, or write the table as JSONL") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from None
    total, number = max(table.metadata.num_rows, 1), 0
    for batch in table.iter_batches(batch_size=256):
        for fields in batch.to_pylist():
            number += 1
            yield Row(f"{path}, row {number}", fields, number / total)
