"""Instruction data as people have it: one prompt and answer after another, whatever the file and the form.

The forms, told apart by the fields of each record:

    alpaca       instruction, input, output
    dolly        instruction, context, response, category
    completion   prompt, completion
    answer       prompt, answer (this project's own), family
    qa           question, context, answer
    messages     messages: [{role, content}, ...]         OpenAI
    sharegpt     conversations: [{from, value}, ...]

In any form `system` and `history` (pairs of texts, or turns) are what was said before. A field that is null is none.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from data.instruct.readers import parsed, rows
from plumbing.settings import one_line
from tags import ASYNC, EOS, TOPIC, Round, parse_answer, pieces

FIELDS = {  # form -> fields of the prompt, of what belongs to it, of the answer
    "alpaca": ("instruction", "input", "output"),
    "dolly": ("instruction", "context", "response"),
    "completion": ("prompt", "", "completion"),
    "answer": ("prompt", "", "answer"),
    "qa": ("question", "context", "answer"),
}
TURNS = {"messages": ("messages",), "sharegpt": ("conversations", "conversation")}  # form -> names of the field
FORMS = (*FIELDS, *TURNS)
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant"}  # fmt: skip
TURN = ("role", "from", "content", "value")
SYSTEM, FAMILY = ("system", "system_prompt"), ("category", "family")
TRAINED = ("weight", "train", "loss")  # 0 or false beside a reply: it is context alone
UNREADABLE = ("tools", "functions", "tool_calls", "function_call", "documents", "image", "images", "audio", "audios",
              "video", "videos")  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One prompt and the answer to it."""

    place: str  # file and line, for messages
    prompt: str
    answer: str
    group: str  # records of one conversation or prompt: they belong in one split
    family: str = ""
    rounds: tuple[Round, ...] = ()  # of an answer that carries control tags
    share: float = 0.0  # how much of its file has been read with it
    ignored: tuple[str, ...] = ()  # fields that are not read


@dataclass(frozen=True)
class Bad:
    """A record that cannot be used, and why."""

    place: str
    reason: str
    share: float = 0.0
    lost: int = 1  # how many records it stands for


def read(path: str | Path, form: str = "") -> Iterator[Record | Bad]:
    """The records of a file, in order; `form` is one of FORMS, or "" to tell by the fields of each record.

    Raises ValueError if the file cannot be read at all.
    """
    for row in rows(Path(path)):
        if isinstance(row.fields, str):
            yield Bad(row.place, row.fields, row.share, row.lost)
            continue
        try:
            for record in records(row.fields, form):
                record.prompt.encode(), record.answer.encode()  # or: half a character
                rounds = tuple(parse_answer(record.answer)) if tagged(record.answer) else ()
                if rounds and not pieces(rounds):
                    raise ValueError("an empty answer")
                yield replace(record, rounds=rounds, place=row.place, share=row.share)
        except UnicodeEncodeError:
            yield Bad(row.place, "bytes or escapes that are no UTF-8", row.share)
        except ValueError as error:
            yield Bad(row.place, str(error), row.share)


def tagged(answer: str) -> bool:
    """Whether an answer carries control tags: it ends in <eos>, or has topics and spans. Else a tag in it is text."""
    return answer.rstrip().endswith(EOS) or (TOPIC in answer and ASYNC in answer)


# ---------------------------------------------------------------- forms


class Turn(NamedTuple):
    """What one side says."""

    role: str  # system, user or assistant
    words: str
    learnt: bool = True


def records(fields: Any, form: str = "") -> Iterator[Record]:
    """The prompts and answers of one record. Raises ValueError if it has not the form.

    >>> [(r.prompt, r.answer) for r in records({"instruction": "Add.", "input": "1 2", "output": "3"})]
    [('Add.\\n\\n1 2', '3')]
    >>> [(r.prompt, r.ignored) for r in records({"system": "Count.", "prompt": "1", "completion": "2", "id": 7})]
    [('Count.\\n\\n1', ('id',))]
    """
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object with named fields, found {fields!r:.40}")
    fields = readable(fields)
    form = form or form_of(fields)
    before = [Turn("system", text(fields, name).strip()) for name in SYSTEM if name in fields] + [*history(fields)]
    said, read = turns(fields, TURNS[form]) if form in TURNS else single(fields, *FIELDS[form])
    ignored = [name for name in fields if name not in (*read, *SYSTEM, *FAMILY, "history")]
    if form in TURNS:
        own = [name for turn in fields[read[0]] for name in readable(turn) if name not in (*TURN, *TRAINED)]
        ignored += [f"{read[0]}: {name}" for name in dict.fromkeys(own)]
    family = next((fields[name] for name in FAMILY if isinstance(fields.get(name), str)), "")
    family = one_line(family).replace("|", "/")  # it is a cell of eval.py's table, whose last row is called "all"
    for record in replies([*before, *said]):
        yield replace(record, family="(all)" if family == "all" else family, ignored=tuple(ignored))


def readable(fields: dict) -> dict:
    """The fields that are not null. Raises ValueError for one on which the answer depends and that cannot be read."""
    fields = {name: value for name, value in fields.items() if value is not None and value == value}  # no NaN
    for name in UNREADABLE:
        if fields.get(name):
            raise ValueError(f"{name!r} cannot be read, and the answer may depend on it")
    return fields


def form_of(fields: dict) -> str:
    """The form whose fields are all there. Raises ValueError if there is none."""
    needed = {form: FIELDS[form][::2] if form in FIELDS else TURNS[form][:1] for form in FORMS}
    for form in FORMS:
        if all(name in fields for name in needed[form]) or any(name in fields for name in TURNS.get(form, ())):
            return form
    known = "; ".join(" and ".join(names) for names in needed.values())
    raise ValueError(f"found fields of no form: {', '.join(map(str, fields)):.80} (expected {known})")


def text(fields: dict, name: str) -> str:
    """A field that has to be text; a list of text parts, as OpenAI has them, counts."""
    value = fields.get(name)
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        value = "\n".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise ValueError(f"expected text in {name!r}, found {value!r:.40}")
    return value


def single(fields: dict, prompt: str, more: str, answer: str) -> tuple[list[Turn], list[str]]:
    """The question and the answer of a record, and the names of the fields read."""
    asked = [text(fields, name).strip() for name in (prompt, more) if name == prompt or name in fields]
    asked, reply = "\n\n".join(filter(None, asked)), text(fields, answer)
    if not asked or not reply.strip():
        raise ValueError(f"empty {prompt if not asked else answer!r}")
    return [Turn("user", asked), Turn("assistant", reply)], [prompt, more, answer]


def turns(fields: dict, names: tuple[str, ...]) -> tuple[list[Turn], list[str]]:
    """The turns of a conversation, and the name of the field read."""
    name = next((name for name in names if name in fields), names[0])
    said = fields.get(name)
    if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
        raise ValueError(f"expected a list of objects in {name!r}, found {said!r:.40}")
    return [turn_of(turn, f"turn {number}") for number, turn in enumerate(said, 1)], [name]


def turn_of(fields: dict, place: str) -> Turn:
    """One turn. Raises ValueError that names its place."""
    try:
        fields = readable(fields)
        role, content = ("role" if "role" in fields else "from"), ("value" if "value" in fields else "content")
        kind = ROLES.get(str(fields.get(role)).lower())
        if kind is None:
            raise ValueError(f"{role!r} is {fields.get(role)!r:.40}, not one of {', '.join(ROLES)}")
        words = text(fields, content).strip() if kind != "system" or content in fields else ""
        if not words and kind != "system":
            raise ValueError("it is empty")
        return Turn(kind, words, all(fields.get(name, True) for name in TRAINED))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def history(fields: dict) -> Iterator[Turn]:
    """What was said before, as pairs of texts or as turns: context, none of it to be learnt."""
    said = fields.get("history") or []
    said = parsed(said) if isinstance(said, str) else said  # a cell of a table
    for number, pair in enumerate(said if isinstance(said, list) else [said], 1):
        texts = isinstance(pair, list) and all(isinstance(words, str) and words.strip() for words in pair)
        if isinstance(pair, dict):
            yield turn_of(pair, f"history, turn {number}")._replace(learnt=False)
        elif texts and len(pair) == 2:
            yield from (Turn(role, words.strip(), False) for role, words in zip(("user", "assistant"), pair))
        else:
            raise ValueError(f"expected pairs of texts, or turns, in 'history', found {pair!r:.40}")


def replies(said: list[Turn]) -> Iterator[Record]:
    """One record per reply, its prompt all that was said before; a question at the end without reply has no record.

    The first prompt is the system's text and the user's. Later ones show who said what. Turns of one side in a row are
    one turn; a greeting of the assistant is no reply.

    >>> said = [Turn("user", "Hi"), Turn("assistant", "Yes?"), Turn("user", "Bye"), Turn("assistant", "Bye.")]
    >>> [(record.prompt, record.answer) for record in replies(said)]
    [('Hi', 'Yes?'), ('User: Hi\\n\\nAssistant: Yes?\\n\\nUser: Bye', 'Bye.')]
    """
    system, sides, found = "", [], 0
    for turn in said:
        if turn.role == "system" and sides:
            raise ValueError("expected the system's turn before all others")
        if turn.role == "system":
            system += turn.words and turn.words + "\n\n"
        elif sides and sides[-1].role == turn.role:
            words, learnt = f"{sides[-1].words}\n\n{turn.words}", sides[-1].learnt and turn.learnt
            sides[-1] = Turn(turn.role, words, learnt)
        else:
            sides.append(turn)
    for number, (role, words, learnt) in enumerate(sides):
        if number and role == "assistant" and learnt:
            asked = "\n\n".join(f"{turn.role.capitalize()}: {turn.words}" for turn in sides[:number])
            yield Record("", system + (asked if number > 1 else sides[0].words), words, system + sides[0].words)
            found += 1
    if not found:
        raise ValueError("a conversation without a reply to learn")


def answers(paths: Iterable[str | Path], form: str = "") -> Iterator[Record | Bad]:
    """The records of several files, one file after another."""
    for path in paths:
        yield from read(path, form)
