"""An annotated example for the eye: its plan, and where its text was cut. In a terminal in colours."""

from collections.abc import Iterator

from data.instruct.forms import one_line
from tags import Example

PLAIN, BOLD, FAINT, INKS = "0", "1", "2", ("36", "33", "32", "35", "34")


def shown(example: Example, decision: str, colours: bool) -> Iterator[str]:
    """Lines: the prompt, what decided, then each round with its spans."""

    def ink(code: str, text: str) -> str:
        text = "\n".join(map(one_line, text.split("\n")))
        return f"\x1b[{code}m{text}\x1b[0m" if colours else text

    yield ink(BOLD, example.prompt) + ink(FAINT, f"   [{decision}]")
    for number, round_ in enumerate(example.rounds):
        if number:
            yield ink(FAINT, "── sync ──")
        if round_.text:
            yield ink(PLAIN, round_.text)
        for span, code in zip(round_.spans, INKS * len(round_.spans)):
            yield f"{ink('7;' + code, f' {span.topic} ')} {ink(code, span.text)}"
    yield ""
