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
    ('{"q": "a"}', "the fields q are those of no form"),
    ('{"prompt": 3, "completion": "a"}', "expected text in 'prompt', found 3"),
    ('{"prompt": " ", "completion": "a"}', "empty 'prompt'"),
    ('{"prompt": "a", "completion": "\\n"}', "empty 'completion'"),
    ('{"prompt": "a", "completion": "\\ud800"}', "no UTF-8"),
    ('{"messages": {}}', "expected a list of objects in 'messages'"),
    ('{"messages": []}', "without a reply"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "turn 1: expected the user"),
    ('{"messages": [{"role": "tool", "content": "a"}]}', "turn 1: 'role' is 'tool'"),
    ('{"messages": [{"role": "user", "content": null}]}', "turn 1: expected text in 'content'"),
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
    assert [row.place for row in readers.rows(path)] == [f"{path}, line {n}" for n in (3, 5, 5)]


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
        path = write(tmp_path / name, [{"prompt": f"p{i}", "completion": "word " * 100} for i in range(8000)])
        assert path.stat().st_size > 4e6
        tracemalloc.start()
        assert sum(1 for _ in read(path)) == 8000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1e6
