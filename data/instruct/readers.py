"""Files of records, read piece by piece: JSON (one array of any size), JSONL, CSV and TSV, Parquet with pyarrow."""

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

CHUNK = 1 << 20  # characters read at once
LONGEST = 1 << 26  # characters of a record: beyond, a quote or bracket is missing
KINDS = ".json, .jsonl, .csv, .tsv or .parquet"
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
codecs.register_error("no character", lambda error: ("\udcff", error.end))  # which no text may hold


class Row(NamedTuple):
    """What a file holds at one place: the fields of a record, or a str that says why there are none."""

    place: str
    fields: Any
    share: float
    lost: int = 1  # records that cannot be used, as far as can be told, if there are no fields


def rows(path: Path) -> Iterator[Row]:
    """What a file holds, piece by piece. Raises ValueError for a file of no known kind."""
    if not path.is_file():
        raise ValueError(f"{path} is no file: name a {KINDS} file")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return parquet_rows(path)
    if suffix in (".csv", ".tsv"):
        return csv_rows(path, "\t" if suffix == ".tsv" else ",")
    if suffix not in (".json", ".jsonl", ".ndjson", ".txt", ""):
        raise ValueError(f"{path}: expected a {KINDS} file, not {suffix}: unpack it, or save it as one of these")
    with opened(path) as file:
        start = file.read(4096).lstrip()[:1]
    return array_rows(path) if start == "[" else line_rows(path)


def opened(path: Path, newline: str = "") -> TextIO:
    """A file as text: UTF-8, if no byte-order mark says otherwise; bytes that are no text make a record unusable.

    Raises ValueError for a file that is no text.
    """
    with path.open("rb") as file:
        start = file.read(4096)
    encoding = next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")
    if b"\0" in start and encoding.startswith("utf-8"):
        raise ValueError(f"{path} is no text: unpack it, or save it as a {KINDS} file in UTF-8")
    return path.open(encoding=encoding, errors="no character", newline=newline)


def line_rows(path: Path) -> Iterator[Row]:
    """JSON Lines: an object per line; empty lines do not count."""
    size = max(path.stat().st_size, 1)
    with opened(path, "\n") as file:  # a text may hold other line breaks
        for number, line in enumerate(file, 1):
            if source := line.strip():
                fields, lost = parsed(source), 1
                if isinstance(fields, str) and (begins := beginning(source, 0)):
                    lost = len(begins.findall(source))
                yield Row(f"{path}, line {number}", fields, file.buffer.tell() / size, lost)


def parsed(source: str) -> Any:
    """The value of JSON, or a str that says why there is none."""
    try:
        value = json.loads(source)
    except RecursionError:
        return "JSON nested too deeply"
    except ValueError as error:
        return f"no JSON: {error}"
    return [value] if isinstance(value, str) else value  # a str would be a reason


def array_rows(path: Path) -> Iterator[Row]:
    """A JSON array, record by record: no more of the file is held than a record needs, and CHUNK.

    After a broken record it goes on where another begins with the same name as this or the last good one.
    """
    size, number, like, ended = max(path.stat().st_size, 1), 0, None, False
    with opened(path) as file:
        window = Window(file)
        window.go_to(window.held.index("[") + 1)  # it is there: `rows` has looked
        while True:
            end = window.end()
            held, at, number = window.held, window.at, number + 1
            place, share = f"{path}, line {window.line}, record {number}", file.buffer.tell() / size
            if ended and at == len(held):
                return
            if ended:
                yield Row(place, "something follows the end of the array", share)
                ended, end = False, at + (held[at] == "[")  # two arrays in one file
            elif held.startswith("]", at):
                ended, number = True, number - 1
            else:
                fields, like = MISSING if end is None else parsed(held[at:end]), beginning(held, at) or like
                if isinstance(fields, str):
                    again = like and like.search(held, at + 1, len(held) if end is None else end)
                    if end is None and not again:
                        yield Row(place, fields, 1.0, 1 + window.left())
                        return
                    end = again.start() if again else end
                yield Row(place, fields, share)
            window.go_to(end)


MISSING = "the record does not end: a quote, a bracket or the end of the file is missing here"
BETWEEN = re.compile(r"[\s,]*")  # what may be between records
NEXT = re.compile(r"\}\s*,\s*\{")
FIRST = re.compile(r'\{\s*("(?:[^"\\]|\\.)*")\s*:')
TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]|"', re.DOTALL)  # the last: a quote that is not closed yet
PLAIN = re.compile(r"[^,\]\s]+(?=[,\]\s])")


class Window:
    """The part of a file that is being read."""

    def __init__(self, file: TextIO):
        self.file, self.held, self.at, self.line, self.eof = file, file.read(4096), 0, 1, False

    def go_to(self, at: int) -> None:
        self.line, self.at = self.line + self.held.count("\n", self.at, at), at

    def end(self) -> int | None:
        """Go to the next value, and find where it ends; None if it does not."""
        block = CHUNK
        while True:
            self.go_to(BETWEEN.match(self.held, self.at).end())
            end = record_end(self.held, self.at) if self.at < len(self.held) else None
            if end is not None or self.eof or len(self.held) - self.at >= LONGEST:
                return end
            more = self.file.read(block)
            self.held, self.at, self.eof = self.held[self.at :] + more, 0, not more
            block *= 2  # few scans of a long record

    def left(self) -> int:
        """How many records, about, begin in the rest of the file, after the one that is next."""
        count, part = 0, self.held[self.at :]
        while part:
            count, part = count + len(NEXT.findall(part)), self.file.read(CHUNK)
        return count


def beginning(held: str, at: int) -> re.Pattern | None:
    """How an object that begins at `at` begins, up to its first name."""
    first = FIRST.match(held, at)
    return first and re.compile(r"\{\s*" + re.escape(first[1]) + r"\s*:")


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
    """A table with a line of names. A row that cannot be read ends with the first line that leaves no quote open."""
    csv.field_size_limit(LONGEST)
    size, number, taken, names = max(path.stat().st_size, 1), 0, Counter(), None
    with opened(path) as file:

        def taking() -> Iterator[str]:
            for line in file:
                taken.update(all=1, filled=bool(line.strip()), quotes=line.count('"'))
                yield line

        lines = taking()
        table = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            number += taken["all"]  # a row may take several lines
            place, what = f"{path}, line {number + 1}", taken.clear()
            try:
                cells = next(table)
                if names is not None and cells and len(cells) != len(names):
                    what = f"{len(cells)} cells, not {len(names)}"
            except StopIteration:
                return
            except csv.Error as error:
                what = str(error)
                while taken["quotes"] % 2 and next(lines, None) is not None:
                    pass
            lost = max(1, taken["filled"])
            if lost > 1 and what:
                what += f": it takes {lost} lines; is a quote missing?"
            if names is None and (what or len(set(filter(None, cells))) < len([*filter(None, cells)])):
                raise ValueError(f"{place}: expected a line of names, each once: {what or ', '.join(cells)}")
            if what:
                yield Row(place, what, file.buffer.tell() / size, lost)
            elif cells and names is None:
                names = cells
            elif cells:
                yield Row(place, dict(zip(names, cells)), file.buffer.tell() / size)


def parquet_rows(path: Path) -> Iterator[Row]:
    """A Parquet file, a few rows in memory at a time; what is broken in a group of rows ends that group."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: needs pyarrow, so `pip install pyarrow`, or write the table as JSONL") from None
    broken = (pyarrow.ArrowException, OSError, ValueError)
    try:
        table = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    except broken as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from None
    begin, total = 0, max(sum(sizes), 1)
    for group, rows_in in enumerate(sizes):
        number = begin
        begin += rows_in
        try:
            for batch in table.iter_batches(batch_size=256, row_groups=[group]):
                for fields in fields_of(batch, broken):
                    number += 1
                    yield Row(f"{path}, row {number}", fields, number / total)
        except broken as error:
            lost = begin - number
            what = f"it and the {lost - 1} rows after it cannot be read: {error}"
            yield Row(f"{path}, row {number + 1}", what, begin / total, lost)


def fields_of(batch: Any, broken: tuple[type[Exception], ...]) -> list[Any]:
    """The records of a batch of rows; for one with a cell that cannot be read why not."""
    try:
        return batch.to_pylist()
    except broken as error:  # such as a text that is no UTF-8
        if len(batch) == 1:
            return [f"a cell cannot be read: {error}"]
        return [fields for i in range(len(batch)) for fields in fields_of(batch.slice(i, 1), broken)]
