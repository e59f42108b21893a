"""Instruction data as people have it: one prompt and answer after another, whatever the file and the form.

The forms, told apart by the fields of each record:

    alpaca       instruction, input, output
    dolly        instruction, context, response, category
    completion   prompt, completion
    answer       prompt, answer (this project's own), family
    messages     messages: [{role, content}, ...]         OpenAI
    sharegpt     conversations: [{from, value}, ...]
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.instruct.readers import rows
from tags import ASYNC, EOS, TOPIC, Round, parse_answer

FIELDS = {  # form -> fields of the prompt, of what belongs to it, of the answer
    "alpaca": ("instruction", "input", "output"),
    "dolly": ("instruction", "context", "response"),
    "completion": ("prompt", "", "completion"),
    "answer": ("prompt", "", "answer"),
}
TURNS = {"messages": ("messages", "role", "content"), "sharegpt": ("conversations", "from", "value")}
FORMS = (*FIELDS, *TURNS)
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant"}  # fmt: skip


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


@dataclass(frozen=True)
class Bad:
    """A record that cannot be used, and why."""

    place: str
    reason: str
    share: float = 0.0


def read(path: str | Path, form: str = "") -> Iterator[Record | Bad]:
    """The records of a file, in order; `form` is one of FORMS, or "" to tell by the fields of each record.

    Raises ValueError if the file cannot be read at all.
    """
    for row in rows(Path(path)):
        if isinstance(row.fields, str):
            yield Bad(row.place, row.fields, row.share)
            continue
        try:
            for record in records(row.fields, form):
                record.prompt.encode(), record.answer.encode(), record.family.encode()  # or: half a character
                rounds = tuple(parse_answer(record.answer)) if tagged(record.answer) else ()
                yield replace(record, rounds=rounds, place=row.place, share=row.share)
        except UnicodeEncodeError:
            yield Bad(row.place, "bytes or escapes that are no UTF-8", row.share)
        except ValueError as error:
            yield Bad(row.place, str(error), row.share)


def tagged(answer: str) -> bool:
    """Whether an answer carries control tags: it ends in <eos>, or has topics and spans. Else a tag in it is text."""
    return answer.rstrip().endswith(EOS) or (TOPIC in answer and ASYNC in answer)


# ---------------------------------------------------------------- forms


def records(fields: Any, form: str = "") -> Iterator[Record]:
    """The prompts and answers of one record. Raises ValueError if it has not the form.

    >>> [(r.prompt, r.answer) for r in records({"instruction": "Add.", "input": "1 2", "output": "3"})]
    [('Add.\\n\\n1 2', '3')]
    """
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object with named fields, found {fields!r:.40}")
    form = form or form_of(fields)
    if form in TURNS:
        yield from conversation(fields, *TURNS[form])
        return
    prompt, more, answer = FIELDS[form]
    instruction, reply = text(fields, prompt), text(fields, answer)
    context = text(fields, more) if fields.get(more) else ""
    asked = "\n\n".join(part for part in (instruction.strip(), context.strip()) if part)
    if not asked or not reply.strip():
        raise ValueError(f"empty {prompt if not asked else answer!r}")
    family = fields.get("category") or fields.get("family")
    yield Record("", asked, reply, asked, family if isinstance(family, str) else "")


def form_of(fields: dict) -> str:
    """The form whose fields are all there. Raises ValueError if there is none."""
    for form in FORMS:
        needed = (TURNS[form][0],) if form in TURNS else FIELDS[form][::2]
        if all(name in fields for name in needed):
            return form
    raise ValueError(f"the fields {', '.join(map(str, fields)):.80} are those of no form ({', '.join(FORMS)})")


def text(fields: dict, name: str) -> str:
    """A field that has to be text; a list of text parts, as OpenAI has them, counts."""
    value = fields.get(name)
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        value = "\n".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise ValueError(f"expected text in {name!r}, found {value!r:.40}")
    return value


def conversation(fields: dict, name: str, role: str, content: str) -> Iterator[Record]:
    """One record per reply, its prompt all turns before it; a question at the end without reply has no record.

    The first prompt is the system's text and the user's. Later ones show who said what.

    >>> turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"},
    ...          {"from": "human", "value": "Bye"}, {"from": "gpt", "value": "Bye."}]
    >>> [(r.prompt, r.answer) for r in records({"conversations": turns})]
    [('Hi', 'Yes?'), ('User: Hi\\n\\nAssistant: Yes?\\n\\nUser: Bye', 'Bye.')]
    """
    turns = fields.get(name)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"expected a list of objects in {name!r}, found {turns!r:.40}")
    said, system, replies = [], "", 0
    for number, turn in enumerate(turns, 1):
        try:
            kind, words = ROLES.get(str(turn.get(role)).lower()), text(turn, content).strip()
            if not words or kind is None:
                raise ValueError(
                    "it is empty" if kind else f"{role!r} is {turn.get(role)!r:.40}, not one of {', '.join(ROLES)}"
                )
            if kind == "system" and not said:
                system += words + "\n\n"
                continue
            if kind != ("assistant" if len(said) % 2 else "user"):
                raise ValueError(f"expected {'the assistant' if len(said) % 2 else 'the user'}, found {kind!r}")
        except ValueError as error:
            raise ValueError(f"turn {number}: {error}") from None
        if kind == "assistant":
            asked = (
                said[0]
                if len(said) == 1
                else "\n\n".join(map("{}: {}".format, ("User", "Assistant") * len(said), said))
            )
            replies += 1
            yield Record("", system + asked, words, system + said[0])
        said.append(words)
    if not replies:
        raise ValueError("a conversation without a reply")


def answers(paths: Iterable[str | Path], form: str = "") -> Iterator[Record | Bad]:
    """The records of several files, one file after another."""
    for path in paths:
        yield from read(path, form)
