"""Plans by rules: the text can always be recovered, spans are where the text shows them, what refers back waits."""

import doctest
import importlib
import json
import random
from dataclasses import replace

import pytest
from conftest import NASTY, ODD_SPACE, SENTENCES, each

from data import read_split, write_dataset
from data.instruct.annotate import COSTS, annotate, as_text, named, objection
from data.instruct.plans import Annotations, Cut, build, cuts_of, quoted, restore
from data.instruct.structure import RULES
from data.instruct.topics import NUMBER, name
from tags import Example, Round, Span, format_answer, parse_answer, pieces
from tokenizer import MAX_LENGTH

MARKS = ["- ", "* ", "1. ", "2) ", "# ", "## ", "**Food:** ", "Pros: ", "x : int\n    ", "```\n", "| a | b |\n", "|---|\n",
         "Overall, ", "It also ", "Step 3: ", ":param x: ", "\n", "\n\n", "\n  ", " ", "===\n", "> ", "Notes:\n"]  # fmt: skip


def long(words):
    """A sentence that begins with these words and pays for a plan."""
    return f"{words} in all of the rivers and lakes of the coast, and marshes, and rest in the kitchen."


def random_answer(rng):
    parts = rng.choices([*MARKS, *MARKS, *SENTENCES, *NASTY, *ODD_SPACE], k=rng.randint(1, 30))
    return "".join(parts) + rng.choice(["x", ".", "\n\nIn short, x.\n"])


def outline(rounds):
    """Rounds as [text, [topics]]."""
    return [[round_.text, [span.topic for span in round_.spans]] for round_ in rounds]


# ---------------------------------------------------------------- nothing is lost


def test_the_examples_of_the_docstrings_are_so():
    for module in each(["annotate", "dependence", "forms", "judge", "plans", "readers", "structure", "topics"]):
        result = doctest.testmod(importlib.import_module(f"data.instruct.{module}"))
        assert not result.failed
        assert result.attempted or module == "dependence"


def test_the_text_can_be_recovered_exactly_through_the_files(tokenizer):
    for seed in each(range(150)):
        text = random_answer(random.Random(seed))
        annotation = annotate("Compare the otter, the bear and the fox.", text, tokenizer)
        rounds = [replace(r, spans=tuple(replace(s, length=1) for s in r.spans)) for r in annotation.rounds]
        back = parse_answer(format_answer(rounds))
        assert restore(back, annotation.gaps) == text
        assert not "".join(annotation.gaps).strip()


def test_cuts_and_rounds_are_two_ways_to_write_the_same():
    for seed in each(range(50)):
        rng = random.Random(seed)
        words = [rng.choice(["otter", "<eos>", "水獺", "a\\"]) for _ in range(rng.randint(1, 8))]
        text, cuts = rng.choice(["", "\n"]), []
        for word in words:
            topic = rng.choice([None, "food", "top 5"])
            cuts.append(Cut(len(text), topic, bool(cuts) and (rng.random() < 0.3 or topic is None)))
            text += word + rng.choice(["", " ", "\n\n\t"]) if word is words[-1] else word + rng.choice([" ", "\n\n\t"])
        rounds, gaps = build(text, cuts)
        assert restore(rounds, gaps) == text
        assert cuts_of(rounds, gaps) == cuts
        assert pieces(rounds) == words
        assert len(rounds) == 1 + sum(cut.sync for cut in cuts)


def test_cuts_that_leave_something_out_or_empty_are_errors():
    for cuts in each(
        [[], [Cut(2)], [Cut(0), Cut(0)], [Cut(4), Cut(0)], [Cut(0), Cut(3, "a"), Cut(4, "b")], [Cut(0, " ")]]
    ):
        with pytest.raises(ValueError):
            build("one two", cuts)


def test_rules_cover_a_text_from_its_beginning_in_order(tokenizer):
    for seed in range(200):
        text = random_answer(random.Random(seed))
        for rule in RULES:
            begins = [part.begin for part in RULES[rule](text)]
            assert begins == sorted(set(begins)) and all(text[begin:].strip() for begin in begins)
            assert not begins or not text[: begins[0]].strip(), (rule, text)


def test_gaps_are_in_the_files_of_a_data_set(tmp_path, tokenizer):
    text = f"Two:\n\n1. {long('Otters')}\n2.  {long('Bears')}\n\n\nOverall, both."
    annotation = annotate("p", text, tokenizer)
    example = Example("p", annotation.rounds, "f", annotation.gaps)
    write_dataset(tmp_path, {"train": [example]}, 400, 4)
    (back,) = read_split(tmp_path / "train.jsonl")
    assert restore(back.rounds, back.gaps) == text


# ---------------------------------------------------------------- what becomes a span

A, B, C = long("Otters swim"), long("Bears sleep"), long("Foxes hunt")


STRUCTURES = [
    (f"Three:\n- {A}\n- {B}\n- {C}", [["Three:", ["otters swim rivers", "bears sleep rivers", "foxes hunt rivers"]]]),
    (
        f"1. **Home**: {A}\n   - more\n2. **Food:** {B}\n\nOverall, fine.",
        [["", ["1 home", "2 food"]], ["Overall, fine.", []]],
    ),
    (f"# All\n## Home\n{A}\n\n## Food\n{B}", [["# All", ["home", "food"]]]),
    (f"**Home**\n\n{A}\n\n**Food**\n\n{B}\n\nIn short: {C}", [["", ["home", "food"]], [f"In short: {C}", []]]),
    (f"Home\n----\n{A}\n\nFood\n----\n{B}", [["", ["home", "food"]]]),
    (f"Pros:\n- {A}\n- {B}\n\nCons:\n- {C}\n- {A}", [["", ["pros", "cons"]]]),
    (
        f"| who | what |\n|---|---|\n| otter | {A} |\n| bear | {B} |",
        [["| who | what |\n|---|---|", ["otter", "bear"]]],
    ),
    (f"x : int\n    {A}\ny, z : float\n    {B}", [["", ["x", "y, z"]]]),
    (f":param x: {A}\n:param y: {B}", [["", ["x", "y"]]]),
    (f"Home: {A}\nFood: {B}", [["", ["home", "food"]]]),
    (f"{A}\n\n{B}\n\nThey also eat. {C}", [["", ["otters swim", "bears sleep"]]]),
    (f"{A}\n\n{B}\n\nIn simpler terms: {C}", [["", ["otters swim", "bears sleep"]], [f"In simpler terms: {C}", []]]),
    (f"Here is all:\n\n{A}\n\n{B}", [["Here is all:", ["otters swim", "bears sleep"]]]),
    (f"1. {A}\n\n```\n1. x\n2. y\n```\n2. {B}", [["", ["1 otters swim rivers", "2 bears sleep rivers"]]]),
    (f"1. {A}\n- {C}\n2. {B}\n- {C}", [["", ["1 otters swim rivers", "2 bears sleep rivers"]]]),
    (
        f"- {A}\n- {B}\n\nThen:\n\n- {C}\n- {A}",
        [["", ["otters swim rivers", "bears sleep rivers"]], ["Then:", ["foxes hunt rivers", "otters swim rivers"]]],
    ),
    (
        f"- {A}\n- {B}\n- All of these: {C}\n- {A}",
        [["", ["otters swim rivers", "bears sleep rivers"]], ["", ["all of these", "otters swim rivers"]]],
    ),
]


def test_structure_becomes_spans_and_what_refers_back_a_later_round(tokenizer):
    for text, expected in each(STRUCTURES):
        found = outline(annotate("What do otters, bears and foxes do?", text, tokenizer).rounds)
        assert [[said, len(topics)] for said, topics in found] == [[said, len(topics)] for said, topics in expected]
        assert [topics for _, topics in found] == [topics for _, topics in expected]


def test_a_text_without_structure_that_pays_is_left_alone(tokenizer):
    for text, why in each([
        (SENTENCES[0] + " " + SENTENCES[1], "no parallel structure"),
        ("Red.\nBlue.", COSTS),
        ("- a\n- b\n- c", COSTS),
        (f"- {A}\n- These follow. {B}", "its parts lean on each other"),
        ("The otter is a playful animal which lives in all of\nthe rivers of the north, and it eats all the fish\nthat it finds.", "no parallel structure"),
    ]):  # fmt: skip
        annotation = annotate("p", text, tokenizer)
        assert annotation.decision == f"text: {why}" and not annotation.planned
        assert annotation == as_text(text, annotation.decision)


def test_paragraphs_that_open_nothing_of_their_own_are_one_tale(tokenizer):
    tale = f"{A}\n\n{long('The door')}\n\n{long('A stone')}\n\n{B}"
    assert annotate("Tell me about otters and bears.", tale, tokenizer).decision == "text: its parts lean on each other"
    assert annotate("Tell me about otters, doors, stones and bears.", tale, tokenizer).decision == "paragraphs"
    counted = tale.replace("The door", "Another door").replace("A stone", "Finally, a stone")
    assert annotate("Bears?", counted, tokenizer).decision == "paragraphs"


def test_a_section_too_long_for_a_span_is_cut_by_a_finer_rule(tokenizer):
    items = "\n".join(f"- {long(f'Item {n} of many')}" for n in range(MAX_LENGTH // 2))
    text = f"## One\n{items}\n## Two\n{items}"
    assert len(tokenizer.encode(items)) > MAX_LENGTH * tokenizer.unit
    annotation = annotate("p", text, tokenizer)
    assert annotation.decision == "items"
    assert max(tokenizer.units(span.text) for round_ in annotation.rounds for span in round_.spans) <= MAX_LENGTH


TALK = (
    "{0}: Where did you go in all of the days of the summer?\n{1}: To the cinema in the old town, and to the river.\n"
)
TALES = [
    TALK.format("Alice", "Bob") * 2,
    (TALK.format("Alice", "Bob") + "\nThey laugh.\n\n") * 2,
    TALK.format("**Q**", "**A**") * 2,
    f"## Question\n{A}\n## Answer\n{B}\n## Question\n{C}\n## Answer\n{A}",
    f"**Question:** {A}\n\n**Answer:** {B}",
    f"Q: {A}\nA: {B}",
    f"- Alice: {A}\n- Bob: {B}\n- Alice: {C}",
    f"Alice: {A}\n\nBob: {B}\n\nAlice: {C}",
]


def test_labels_that_recur_are_those_of_speakers_and_of_pairs_and_stay_text(tokenizer):
    for text in each(TALES):
        assert annotate("Write a dialogue of Alice and Bob.", text, tokenizer) == as_text(
            text, "text: its parts lean on each other"
        )
    assert annotate("p", TALK.format("Home", "Food") + f"Play: {A}", tokenizer).planned


TWO = f"An {A[:-1]}, as ever.\n\nThe {B}"
STORIES = {  # a prompt and an answer of two paragraphs, the second of which begins with a word of the prompt
    "work": ("Write a short story with bears.", TWO),
    "persons": ("Bears?", f"{TWO} He was old. She loved him."),
    "moments": ("Bears?", f"One day, all was well. {TWO} The next morning it rained. {B}"),
    "more moments": ("Bears?", f"Once upon a time, all was well. {TWO} Suddenly it rained. {B}"),
    "speech": ("Bears?", f'{TWO} {B} {C} {A} "Who are you?" asked the fox.'),
    "opening": ("Bears?", f"{A}\n\nBears she had seen came back. {B} {C} {A}"),
    "steps": ("Bears?", f"1. Otters are two, as {A}\n2. Bears = 3 * 2, as {B}"),
}


def test_what_is_told_in_order_stays_text(tokenizer):
    assert annotate("Bears?", TWO, tokenizer).decision == "paragraphs"
    for prompt, text in each(STORIES.values()):
        assert annotate(prompt, text, tokenizer) == as_text(text, "text: its parts lean on each other")
    for prompt in each(["Tell me about the story of bears.", "Bears?", "Write a list of bears and songs."]):
        assert annotate(prompt, TWO, tokenizer).planned
    assert annotate("Bears?", f"{TWO} She sleeps in her den. He hunts.", tokenizer).planned


def test_a_plan_pays_from_the_first_token_that_it_saves(tokenizer):
    def why(topics, *texts):
        return objection((Round("", tuple(map(Span, topics, texts))),), tokenizer)

    size = lambda text: len(tokenizer.encode(text))
    for a, b in each([("x", "y"), ("top five", "z")]):
        plan = 2 * 3 + size(a) + size(b)  # <topic>, length, </topic>; what is saved is the shorter span
        short = {n: "".join(["."] * n) for n in range(200)}
        short = {size(text): text for text in short.values()}
        assert why((a, b), A, short[plan]) == COSTS and why((a, b), A, short[plan + 1]) == ""
        assert why((a, b), short[plan], A) == COSTS and why((a, b), short[plan + 1], A) == ""


TOPICS = [
    ("1. Preheat the oven to 200 degrees.", "1 preheat oven degrees"),
    ("**2. Food:** fish", "2 food"),
    ("### Step 3: Bake\nIt takes an hour.", "3 bake"),
    ("b) **Fish**", "b fish"),
    ("**Day 4:** See the castle.", "day 4"),
    ("- 4 eggs from the farm", "eggs farm"),
    ("Remove the plant from its old pot.", "remove plant"),
    ("- Relax the long type error which is thrown.", "relax long type"),
    ("- **Practise the good habits of sleep** every night", "practise good habits"),
    ("The clothes I've washed, and the update of the router's software", "clothes washed"),
    ("Furthermore, the old castle is on a hill.", "old castle hill"),
    ("The sensational " + "philosophical" * 2 + " implications", "sensational " + "philosophical" * 2),
    ("It is.", "it is"),
]


def test_a_topic_is_the_number_and_the_label_or_first_phrases_of_a_span(tokenizer):
    for text, topic in each(TOPICS):
        assert name(text) == topic
    steps = annotate("p", f"1. {A}\n2. {B}\n3. {C}", tokenizer).rounds[0].spans
    assert [span.topic.split()[0] for span in steps] == ["1", "2", "3"]


def test_a_topic_has_three_words_at_most_beside_its_number_none_of_them_cut():
    for seed in each(range(100)):
        text = random_answer(random.Random(seed))
        words = name(text).split()
        assert 1 <= len(words) <= 4 and (len(words) < 4 or NUMBER.match(text))
        assert len(words) == 1 or all(word.strip(".,:;-–—()") in text.lower() + text for word in words)


def test_topics_of_a_plan_differ(tokenizer):
    (round_,) = annotate("p", f"- {A}\n- {A}\n- {A}", tokenizer).rounds
    assert len({span.topic for span in round_.spans}) == 3
    assert named(["Otter.", "Otter!", "The otter?"]) == ["otter", "otter 2", "otter 3"]


# ---------------------------------------------------------------- plans made elsewhere


def test_quotes_become_cuts_and_those_not_in_the_text_are_errors():
    text = "All: an otter, a bear. In short, two."
    said = [
        {"begins": "All:"},
        {"topic": "otter", "begins": "an otter"},
        {"topic": "bear", "begins": "a bear"},
        {"begins": "In short"},
    ]
    assert outline(build(text, quoted(text, said))[0]) == [["All:", ["otter", "bear"]], ["In short, two.", []]]
    for broken in (
        "x",
        [3],
        [{"topic": "a"}],
        [{"begins": "All", "topic": 3}],
        [{"begins": "All", "sync": "yes"}],
        said[::-1],
    ):
        with pytest.raises(ValueError):
            build(text, quoted(text, broken))
    again = [{"topic": topic, "begins": "An otter"} for topic in "ab"]
    assert [cut.begin for cut in quoted("An otter. An otter.", again)] == [0, 10]
    with pytest.raises(ValueError, match="piece 2: 'An otter' is not in the text after piece 1"):
        quoted("An otter.", again)


def test_annotations_are_read_along_with_the_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"record": 2, "pieces": [{"begins": "b"}]}\n\n{"record": 5, "pieces": []}\n{"record": 9, "pieces": []}\n'
    )
    annotations = Annotations(path)
    assert [annotations.of(number, "a b") for number in (1, 2, 3)] == [None, [Cut(2)], None]
    assert annotations.unused() == 5


def test_a_broken_line_of_annotations_is_named(fresh):
    for line, said in each([("{", "line 2"), ("[]", "'record' and 'pieces'"), ('{"record": 1}', "'pieces'"),
                                        ('{"record": 3, "pieces": []}', "record 3 after record 3"),
                       ("[" * 100_000, "JSON")]):  # fmt: skip
        tmp_path = fresh()
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps({"record": 3, "pieces": []}) + f"\n{line}\n")
        with pytest.raises(ValueError, match="a.jsonl, line 2: ") as error:
            Annotations(path).of(3, "x")
        assert said in str(error.value)
