"""Instruction files: each form and kind of file gives the same records; what is broken is named and the rest is read."""

import csv
import json
import random
import tracemalloc

import pytest
from conftest import NASTY, each

from data.instruct import readers
from data.instruct.forms import Bad, Record, read

RECORDS = [("Say hi.", "Hi!"), ("Add.\n\n1 and 2", '3, "three"\nin words'), ("Otter?", '水獺, {["]} \\ end')]
ROWS = {
    "alpaca": [
        {"instruction": p.split("\n\n")[0], "input": "\n\n".join(p.split("\n\n")[1:]), "output": a} for p, a in RECORDS
    ],
    "dolly": [{"instruction": p, "context": "", "response": a, "category": "qa"} for p, a in RECORDS],
    "completion": [{"prompt": p, "completion": a} for p, a in RECORDS],
    "answer": [{"prompt": p, "answer": a, "family": "f"} for p, a in RECORDS],
    "qa": [{"question": p, "answer": a} for p, a in RECORDS],
    "messages": [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}]} for p, a in RECORDS
    ],
    "sharegpt": [{"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": a}]} for p, a in RECORDS],
}


def write(path, rows):
    """A file of the kind that its name says."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
        pq = pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


def pairs(path, form=""):
    found = list(read(path, form))
    assert all(isinstance(record, Record) for record in found), found
    return [(record.prompt, record.answer) for record in found]


def reasons(path, form=""):
    return [(bad.place.removeprefix(str(path) + ", "), bad.reason) for bad in read(path, form) if isinstance(bad, Bad)]


# ---------------------------------------------------------------- forms and files


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "csv", "tsv"])
def test_every_form_in_every_kind_of_file_gives_the_same_records(fresh, suffix):
    for form in each(ROWS):
        tmp_path = fresh()
        if suffix in ("csv", "tsv") and form in ("messages", "sharegpt"):
            pytest.skip("a table has no lists")
        path = write(tmp_path / f"a.{suffix}", ROWS[form])
        assert pairs(path) == pairs(path, form) == RECORDS
        if form == "dolly":
            assert {record.family for record in read(path)} == {"qa"}


def test_a_form_that_is_named_is_the_only_one(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS["alpaca"])
    assert reasons(path, "dolly") == [(f"line {n}", "expected text in 'response', found None") for n in (1, 2, 3)]


def test_a_conversation_is_a_record_per_reply_and_all_of_them_are_of_one_group(tmp_path):
    turns = [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "Yes?"),
        ("user", "Bye"),
        ("assistant", "Bye."),
        ("user", "?"),
    ]
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    first, second = read(path)
    assert (first.prompt, first.answer) == ("Be kind.\n\nHi", "Yes?")
    assert (second.prompt, second.answer) == ("Be kind.\n\nUser: Hi\n\nAssistant: Yes?\n\nUser: Bye", "Bye.")
    assert first.group == second.group


HI, YES = {"role": "user", "content": "Hi"}, {"from": "gpt", "value": "Yes?"}
SAID = "User: Hi\n\nAssistant: Yes?\n\nUser: And?"
READINGS = [  # fields of a record, prompt and answer of its records
    ({"prompt": "And?", "completion": "a", "history": [["Hi", "Yes?"]]}, [(SAID, "a")]),
    ({"prompt": "And?", "answer": "a", "history": [HI, YES], "system": "S"}, [("S\n\n" + SAID, "a")]),
    ({"instruction": "And?", "output": "a", "history": '[["Hi", "Yes?"]]'}, [(SAID, "a")]),
    ({"instruction": "Hi", "response": "a", "context": "c", "system_prompt": "S"}, [("S\n\nHi\n\nc", "a")]),
    ({"conversation": [HI, YES], "system": "S"}, [("S\n\nHi", "Yes?")]),
    ({"messages": [HI, YES], "history": [["Hi", "Yes?"]]}, [(SAID.replace("And", "Hi")[:-1], "Yes?")]),
    ({"messages": [{"role": "system", "content": ""}, HI, YES]}, [("Hi", "Yes?")]),
    ({"conversations": [{"from": "system", "value": None}, HI, YES]}, [("Hi", "Yes?")]),
    ({"messages": [HI, HI, YES, YES]}, [("Hi\n\nHi", "Yes?\n\nYes?")]),
    ({"messages": [YES, HI, YES]}, [("Assistant: Yes?\n\nUser: Hi", "Yes?")]),
    ({"messages": [HI, YES | {"weight": 0}, HI, YES]}, [(SAID.replace("And", "Hi")[:-1], "Yes?")]),
    ({"instruction": "Hi", "input": float("nan"), "output": "a"}, [("Hi", "a")]),
    ({"instruction": None, "output": None, "prompt": "Hi", "completion": "a", "system": ""}, [("Hi", "a")]),
]


def test_what_was_said_before_is_in_the_prompt_in_every_form_and_a_null_is_no_field(tmp_path):
    for fields, expected in each(READINGS):
        assert pairs(write(tmp_path / "a.jsonl", [fields])) == expected


def test_a_field_that_is_not_read_is_told_and_a_family_is_a_cell_of_a_table(tmp_path):
    rows = [{"prompt": "p", "completion": "c", "id": 1, "category": "a|b\nc"}, {"messages": [HI | {"name": "n"}, YES]}]
    first, second = read(write(tmp_path / "a.jsonl", [*rows]))
    assert (first.ignored, second.ignored, first.family) == (("id",), ("messages: name",), "a/b c")
    (alone,) = read(write(tmp_path / "a.jsonl", [{"prompt": "p", "answer": "a", "family": "all"}]))
    assert alone.family != "all", "which is the row of all families"


def test_an_answer_with_tags_is_parsed_and_one_that_only_mentions_a_tag_is_text(tmp_path):
    tagged = "<topic> a 1</topic><topic> b 1</topic><async> a: x</async><async> b: y</async><eos>"
    answers = [
        tagged,
        tagged.removesuffix("<eos>"),
        "Use <topic> in XML.",
        "<topic> a</topic><async> a: x</async><eos>",
    ]
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": answer} for answer in answers])
    good, cut, text, broken = read(path)
    assert [span.text for span in good.rounds[0].spans] == ["x", "y"]
    assert "expected" in cut.reason and "line 1, column" in cut.reason
    assert text.rounds == () and text.answer == answers[2]
    assert "its length in units" in broken.reason


# ---------------------------------------------------------------- what is broken


BROKEN = [
    ("{", "no JSON"),
    ("5", "expected an object"),
    ('"text"', "expected an object"),
    ("null", "expected an object"),
    ('{"q": "a"}', "found fields of no form: q (expected instruction and output; "),
    ('{"question": "a", "reply": "b"}', "question, reply (expected"),
    ('{"prompt": 3, "completion": "a"}', "expected text in 'prompt', found 3"),
    ('{"prompt": " ", "completion": "a"}', "empty 'prompt'"),
    ('{"prompt": "a", "completion": "\\n"}', "empty 'completion'"),
    ('{"prompt": "a", "completion": "\\ud800"}', "no UTF-8"),
    ('{"messages": {}}', "expected a list of objects in 'messages'"),
    ('{"messages": []}', "without a reply"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "without a reply to learn"),
    ('{"messages": [{"role": "tool", "content": "a"}]}', "turn 1: 'role' is 'tool'"),
    ('{"messages": [{"role": "user", "content": null}]}', "turn 1: expected text in 'content'"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}', "before all others"),
    ('{"conversation": "a"}', "expected a list of objects in 'conversation'"),
    ('{"prompt": "a", "completion": "<eos>"}', "empty answer"),
    ('{"prompt": "a", "completion": "b", "images": ["c.png"]}', "'images' cannot be read"),
    ('{"prompt": "a", "completion": "b", "history": "c"}', "in 'history', found 'no JSON"),
    ('{"prompt": "a", "completion": "b", "history": [["c", ""]]}', "in 'history', found ['c', '']"),
    ('{"prompt": "a", "completion": "b", "history": [{"role": "tool"}]}', "history, turn 1: 'role' is 'tool'"),
    ('{"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}', "turn 1: 'tool_calls' cannot be"),
    ("[" * 100_000, "JSON"),
]


def test_a_broken_record_is_named_by_line_and_the_rest_is_read(fresh):
    for line, said in each(BROKEN):
        tmp_path = fresh()
        path, good = tmp_path / "a.jsonl", json.dumps(ROWS["alpaca"][0])
        path.write_text(f"{good}\n\n{line}\n{good}\n")
        first, bad, last = read(path)
        assert isinstance(first, Record) and isinstance(last, Record) and last.place == f"{path}, line 4"
        assert bad.place == f"{path}, line 3" and said in bad.reason


def test_bytes_that_are_no_text_are_named_in_every_kind_of_file(tmp_path):
    for name, start, end in [("a.jsonl", b"", b""), ("a.json", b"[\n", b"]"), ("a.csv", b"prompt,completion\n", b"")]:
        bad, good = (
            (b"x,\xff\n", b"x,y\n")
            if ".csv" in name
            else (b'{"prompt":"x","completion":"\xff"}\n', b'{"prompt":"x","completion":"y"}\n')
        )
        comma = b"," if name == "a.json" else b""
        (tmp_path / name).write_bytes(start + bad + comma + good + end)
        found = list(read(tmp_path / name))
        assert [type(record) for record in found] == [Bad, Record] and "UTF-8" in found[0].reason


def test_a_file_has_one_encoding_which_its_mark_tells(fresh):
    marks = {
        "utf-8": b"",
        "utf-8-sig": b"",
        "utf-16": b"",
        "utf-16-le": b"\xff\xfe",
        "utf-16-be": b"\xfe\xff",
        "utf-32": b"",
    }
    for name in each(["a.json", "a.jsonl", "a.csv"]):
        records = [("\u0a0d \u0d0a \u0a0a", "水獺"), ("b", "\U0001f9a6")]
        source = write(fresh() / name, [{"prompt": p, "completion": a} for p, a in records]).read_bytes().decode()
        for encoding, mark in each(marks.items()):
            path = fresh() / name
            path.write_bytes(mark + source.encode(encoding))
            assert pairs(path) == records
        path.write_bytes('{"prompt": "a", "completion": "水"}'.encode("utf-16-le"))  # which json would guess
        with pytest.raises(ValueError, match="a.json.? is no text|a.csv is no text"):
            list(read(path))


def test_what_is_no_table_and_no_text_is_refused_by_name(tmp_path):
    for name, content in [
        ("a.jsonl.gz", b"{}"),
        ("a.xlsx", b"PK"),
        ("a.jsonl", b"\x1f\x8b\x08\0\0"),
        ("a.csv", b"a,a\nb,c\n"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*(expected a .json|no text|a line of names, each once)"):
            list(read(tmp_path / name))


GOOD, OPEN = '{"a": "1", "b": "2"}', '{"a": "1, "b": "2"}'
LOST = [  # a file with broken records, good ones, records that are lost
    ("a.csv", "prompt,completion\n" + "a,b\n" * 5 + 'a,"b\n' + "a,b\n" * 9, 5, 10),
    ("a.csv", 'prompt,completion\na,"b "c" d"\na,b\n', 1, 1),
    ("a.csv", 'prompt,completion\na,"b "c"\n d, e"\na,b\n', 1, 2),
    ("a.csv", 'prompt,completion\na,"b\na,b"\n', 1, 0),
    ("a.json", "[" + ", ".join([GOOD] * 3 + [OPEN] + [GOOD] * 4) + "]", 7, 1),
    ("a.json", "[" + ",\n".join([GOOD, GOOD[:-1], GOOD, GOOD]) + "]", 3, 1),
    ("a.json", "[" + ",\n".join([GOOD[:-2], GOOD, GOOD]) + "]", 2, 1),
    ("a.json", "[" + ", ".join([GOOD, GOOD[:5] + ", " + GOOD]) + "]", 2, 1),
    ("a.json", f"[{GOOD}, {GOOD}] [{GOOD}]", 3, 1),
    ("a.json", f'[{GOOD}, {{"b": "1}}, {{"c": 1}}, {{"d": 1}}]', 1, 3),
    ("a.jsonl", f"{GOOD}\n{GOOD}{GOOD}{GOOD}\n{GOOD}\n", 2, 3),
]


def test_what_a_broken_record_swallows_is_read_or_counted(tmp_path):
    for name, content, good, lost in each(LOST):
        (tmp_path / name).write_text(content)
        found = [*readers.rows(tmp_path / name)]
        assert sum(isinstance(row.fields, dict) for row in found) == good
        assert sum(row.lost for row in found if isinstance(row.fields, str)) == lost


def test_a_parquet_file_loses_what_is_broken_and_no_more(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path, texts = tmp_path / "a.parquet", [f"{i} {'x' * 50}".encode() for i in range(100)]
    texts[7] = b"\xff\xfe"
    column = pa.array(texts, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": column, "completion": column}), path, row_group_size=20, use_dictionary=False,
                   compression="zstd", write_page_checksum=True)  # fmt: skip
    assert [record.place for record in read(path) if isinstance(record, Bad)] == [f"{path}, row 8"]
    content, begin = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    content[begin + 40 : begin + 90] = bytes(50)
    path.write_bytes(content)
    bad = [record for record in read(path) if isinstance(record, Bad)]
    assert [(record.place, record.lost) for record in bad] == [(f"{path}, row 8", 1), (f"{path}, row 41", 20)]
    assert sum(isinstance(record, Record) for record in read(path)) == 79
    path.write_bytes(content[:-30])
    with pytest.raises(ValueError, match="a.parquet is no Parquet file"):
        list(read(path))


def test_a_row_of_a_table_with_too_many_cells_is_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"a\nb",c\nd,e,f\ng,h\n')
    assert reasons(path) == [("line 4", "3 cells, not 2")]
    assert [record.place for record in read(path) if isinstance(record, Record)] == [
        f"{path}, line 2",
        f"{path}, line 5",
    ]


def test_a_file_that_cannot_be_read_is_one_error(tmp_path):
    with pytest.raises(ValueError, match="none.jsonl is no file"):
        list(read(tmp_path / "none.jsonl"))


# ---------------------------------------------------------------- arrays of any size


def nasty_value(rng, depth=0):
    if depth > 2 or rng.random() < 0.5:
        return rng.choice(["".join(rng.choices([*NASTY, '"', "{", "]", "\\", "\n"], k=4)), 5, None, True, -1.5e3])
    if rng.random() < 0.5:
        return [nasty_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return {f"k{i}{rng.choice(NASTY)}": nasty_value(rng, depth + 1) for i in range(rng.randint(0, 3))}


def test_an_array_is_cut_into_the_values_that_json_finds_wherever_its_chunks_end(fresh, monkeypatch):
    for seed in each(range(25)):
        tmp_path = fresh()
        rng = random.Random(seed)
        monkeypatch.setattr(readers, "CHUNK", rng.choice([1, 2, 3, 7, 50]))
        values = [nasty_value(rng) for _ in range(rng.randint(0, 6))]
        indent, escaped = rng.choice([None, 1]), rng.random() < 0.5
        path = tmp_path / "a.json"
        path.write_text(
            "\n " * rng.randint(0, 2) + json.dumps(values, indent=indent, ensure_ascii=escaped) + "\n", encoding="utf-8"
        )
        found = [row.fields for row in readers.rows(path)]
        assert found == [[value] if isinstance(value, str) else value for value in values]  # a str would be a reason


def test_records_of_an_array_have_the_line_where_they_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK", 5)
    path = tmp_path / "a.json"
    path.write_text('[\n\n{"a":\n"\\n"},\n {"b": 1}, {"c": 2}\n]\n')
    assert [row.place for row in readers.rows(path)] == [
        f"{path}, line {n}, record {i}" for i, n in enumerate((3, 5, 5), 1)
    ]


BROKEN_ARRAYS = [
    ('[{"a": 1}, {"b": nan}, {"c": 3}]', 2, "no JSON"),
    ('[{"a": 1}, {"b": 2', 1, "does not end"),
    ('[{"a": 1}, {"b": "2}, {"c": 3}]', 1, "does not end"),
    ('[{"a": 1},', 1, "does not end"),
    ('[{"a": 1}', 1, "does not end"),
    ("[", 0, "does not end"),
    ('[{"a": 1}] []', 1, "follows the end"),
]


def test_a_broken_array_is_named_and_gives_what_can_be_read(fresh):
    for text, good, said in each(BROKEN_ARRAYS):
        tmp_path = fresh()
        path = tmp_path / "a.json"
        path.write_text(text)
        found = [row.fields for row in readers.rows(path)]
        assert sum(isinstance(value, dict) for value in found) == good
        assert sum(isinstance(value, str) and said in value for value in found) == 1 and len(found) == good + 1


def test_memory_does_not_grow_with_the_file(fresh, monkeypatch):
    for name in each(["a.json", "a.jsonl", "a.csv"]):
        tmp_path = fresh()
        monkeypatch.setattr(readers, "CHUNK", 1 << 14)
        path = write(tmp_path / name, [{"prompt": f"p{i}", "completion": "word " * 200} for i in range(4000)])
        assert path.stat().st_size > 4e6
        tracemalloc.start()
        assert sum(1 for _ in read(path)) == 4000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1e6
