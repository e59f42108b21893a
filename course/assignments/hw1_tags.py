"""Assignment 1: answers as tagged text, and the automaton that lets a model write plans that parse."""

import small
from checks import Wrong, check, draw_rows

TITLE = "Tags and grammar"
HOURS = "6 to 8"
TESTS_TAKE = 0.2
FUNCTIONS = {
    "tags.py": ("format_answer", "parse_answer", "pieces", "plain_text"),
    "grammar.py": ("Grammar.forced", "Grammar.advance", "Grammar._fits", "Grammar._slots_left", "_scaffold"),
}
HANDOUT = """
Planned diffusion lets a model cut its answer into spans that are written at the same time. All that holds this
together is a little language: the model writes a plan in it, a program reads the plan and lays out the spans. A plan
that does not parse is an answer lost, so the model is kept from writing one: an automaton says after each token which
tokens may come next.

## Read

1. README.md, "The method", with its example of a tagged answer. Run `python minimal.py` meanwhile: the whole method in
   one file, in a minute or two. What it prints are such plans and spans.
2. Section 3 of [the paper](https://arxiv.org/abs/2510.18087) up to the control tags.
3. tags.py from the top. What is left there is yours to use: `_escape`, `_TOPIC`, and `_Reader`, which cuts tagged
   text into texts and tags in turn and raises errors that name line and column.
4. tokenizer.py: `span_slots`, the docstring of `Tokenizer`, `length_id` and `length_of`.
5. grammar.py: the docstrings and `_mask`. Draw the automaton on paper: five states, and a token on each arrow.

## Build

**Writing and reading** (tags.py). `format_answer` writes what the module's docstring shows: the text of a round, its
whole plan, then its spans in the order of the plan, each with its topic and a colon at the head. `parse_answer` reads
it back. Where the tagged text is wrong, `reader.fail(message, piece)` says where: `piece` is the number of the text
or tag that is wrong. (`reader.next` is the number of the piece to be read next.)

**The automaton** (grammar.py). `_mask` is given and asks for four facts: `state`, `length`, `name` and `blank`
of the open topic, and how many `positions_left` there are. `advance` keeps them up to date, and the `names` of the
plan so far, for `repeats`. Each token takes a position. When a topic closes its whole scaffold is paid for: the tags, name and colon of its span (`_scaffold`), and
its slots. `_fits` and `_slots_left` look ahead: what would be left for slots if the open topic got a name of so many
tokens, were closed, and the answer ended with `<eos>`?

## Hints, in steps

1. Writing: build three lists per round, and join them. Which white space does the example have, and where not?
2. Reading: one loop over rounds, in it one over topics and one over spans. `reader.tag(...)` takes a tag that must
   come. `reader.tag_alone(...)` is for places where no text may be.
3. "top 5 tips 3" plans three units. What does `_TOPIC` make of it?
4. `advance` begins with a token that is not allowed: raise ValueError. Then it is one branch per state, but two where
   a name may go on or end.
5. `_still_blank` gives the new `blank` after one more token of a name.
6. `_slots_left`: write down a topic with a name of three tokens and one slot, token by token, with its span and
   `<eos>`, and count.
"""

TEXTS = ("rivers and lakes", "fish", "", "a <eos> typed", "top 5", "ends in \\", "<topic> a 1</topic>", "\\<sync/>")
NAMES = ("habitat", "food", "top 5 tips", "7", "2 or 3: which", "the kitchen")


def answer(rng, size, texts=TEXTS):
    """Random rounds, at most `size` + 2."""
    from tags import Round, Span

    pick = lambda choices: choices[rng.integers(len(choices))]
    spans = lambda: [Span(pick(NAMES), pick(texts), int(rng.integers(1, 65))) for _ in range(rng.integers(0, 4))]
    return [Round(pick(texts), tuple(spans())) for _ in range(rng.integers(1, size + 3))]


def as_data(rounds):
    return [[r.text, [[s.topic, s.text, s.length] for s in r.spans]] for r in rounds]


def outcome(tagged):
    """What parsing gives: the rounds, or where the error is."""
    from tags import TagError, parse_answer

    try:
        return as_data(parse_answer(tagged))
    except TagError as error:
        return "TagError, " + str(error).split(": ")[0]


@check(points=15, idea="a round is its text, then its whole plan, then one span per topic, each headed by its topic")
def written(rng, size):
    from tags import Round, Span, format_answer

    otter = [
        Round("", (Span("habitat", "Rivers.", 1), Span("food", "Fish and crabs.", 2))),
        Round("In short: a playful river animal."),
    ]
    plain = ("rivers and lakes", "fish", "", "crabs, frogs")
    return [format_answer(rounds) for rounds in (otter, *(answer(rng, size, plain) for _ in range(4 * size)))]


@check(points=15, idea="what is written reads back exactly: a tag typed in a text stays text")
def round_trip(rng, size):
    from tags import format_answer

    answers = [answer(rng, size) for _ in range(10 * size)]
    return [{"written": as_data(rounds), "read": outcome(format_answer(rounds))} for rounds in answers]


@check(points=15, idea="the last number of a topic is its length, whatever numbers its name has")
def last_number(rng, size):
    found = {}
    for name in (*NAMES, "5 6", "3rd of 4 rivers"):
        length = int(rng.integers(1, 120))
        plan = f"{name} {length}"
        found[plan] = outcome(f"<topic> {plan}</topic><async> {name}: text</async><eos>")
    return found


@check(points=10, idea="malformed text is a TagError that points at the first text or tag that is wrong")
def mistakes(rng, size):
    n = int(rng.integers(1, 9))
    plan, span = f"<topic> food {n}</topic>", "<async> food: fish</async>"
    wrong = ["<topic> food</topic><eos>", "<topic> food 0</topic><async> food: x</async><eos>",
             "<topic> 2</topic><eos>",
             plan + "<eos>", plan + "<async> fodo: x</async><eos>", plan + "<async> food</async><eos>",
             plan + span + " more<eos>", plan + span + span + "<eos>", plan + plan + span + "<eos>",
             "one\n\ntwo</async><eos>", "a<eos> b", "a<eos><eos>", "hello", plan + " and " + plan]  # fmt: skip
    return {text: outcome(text) for text in wrong}


@check(points=5, idea="readers see the texts and the spans that are not empty, in reading order, one per line")
def plain(rng, size):
    from tags import plain_text

    return [plain_text(answer(rng, size)) for _ in range(5 * size)]


def walk(grammar, tok, rng, longest):
    """States and numbers of allowed tokens along a random answer, with a token of each kind as likely as another."""
    import numpy as np

    names, states, allowed = ["begin"], [grammar.state], [int(grammar.allowed().sum())]
    while not grammar.done and len(names) < longest:
        tokens = np.flatnonzero(grammar.allowed())
        parts = [tokens[tokens < tok.pad], tokens[(tokens >= tok.pad) & (tokens <= tok.eos)], tokens[tokens > tok.eos]]
        parts = [part for part in parts if len(part)]
        part = parts[rng.integers(len(parts))]
        token = int(part[rng.integers(len(part))])
        grammar.advance(token)
        names.append(tok.name(token)), states.append(grammar.state)
        allowed.append(int(grammar.allowed().sum()))
    return {"names": names, "state": states, "allowed tokens": allowed}


@check(points=15, idea="each token leads to the state in which the grammar goes on: after a plan no text of its round",
       draw=draw_rows)  # fmt: skip
def states(rng, size):
    from grammar import Grammar

    tok = small.tokenizer()
    return walk(Grammar(tok, 100_000), tok, rng, 60 * size)


@check(points=15, idea="a topic is opened only if its name, its span's tags and slots, and <eos> still fit",
       draw=draw_rows)  # fmt: skip
def budget(rng, size):
    from grammar import Grammar

    tok = small.tokenizer()
    longest = {"names": [], "longest span": [], "left": []}
    for positions in range(10, 10 + 40 * size, 3):
        grammar = Grammar(tok, positions + int(rng.integers(3)))
        longest["names"].append(f"{grammar.positions_left} left")
        name = tok.encode(("food", "the kitchen")[rng.integers(2)])
        tokens, length = [tok.topic, *name], 0
        while tokens and grammar.allowed()[tokens[0]]:
            grammar.advance(tokens.pop(0))
        if not tokens:
            length = int(grammar.allowed()[tok.eos + 1 :].sum())
            if length:
                grammar.advance(tok.length_id(length))
                grammar.advance(tok.topic_end)
        longest["longest span"].append(length)
        longest["left"].append(grammar.positions_left)
    return longest


@check(points=5, idea="a token that is the only one allowed is forced; one that is not allowed is an error")
def forced(rng, size):
    from grammar import Grammar

    tok, grammar = small.tokenizer(), Grammar(small.tokenizer(), 1000)
    found = []
    for token in [tok.topic, *tok.encode("food"), tok.length_id(int(rng.integers(1, 9))), tok.topic_end, tok.eos]:
        found.append([tok.name(token), grammar.forced()])
        grammar.advance(token)
    for token in (tok.mask, tok.topic_end, tok.length_id(1)):
        try:
            Grammar(tok, 1000).advance(token)
            found.append("no error")
        except ValueError:
            found.append("ValueError")
    return found


WRONG = (
    Wrong("the first number is read as the length", "tags.py",
          "match = _TOPIC.fullmatch(reader.text())",
          'match = re.match(r"(.*?\\S)\\s+([0-9]{1,9})", reader.text())', loses="last_number"),
    Wrong("each topic stands before its own span", "tags.py",
          '"".join(topics + spans)', '"".join(t + s for t, s in zip(topics, spans))', loses="written"),
    Wrong("tags typed in a text are not escaped", "tags.py",
          "text = _escape(round_.text)", "text = round_.text.strip()", loses="round_trip"),
    Wrong("a length of zero is accepted", "tags.py",
          "if not match or int(match[2]) == 0:", "if not match:", loses="mistakes"),
    Wrong("empty spans are shown", "tags.py",
          "(r.text, *(s.text for s in r.spans)) if text]", "(r.text, *(s.text for s in r.spans))]", loses="plain"),
    Wrong("text may follow a plan in its round", "grammar.py",
          'self.state, self.names, self.name, self.blank = "planned", (*self.names, self._called()), (), b""',
          'self.state, self.names, self.name, self.blank = "text", (*self.names, self._called()), (), b""', loses="states"),
    Wrong("the tags and name of a span are not paid for", "grammar.py",
          "self.positions_left -= _scaffold(len(self.name)) + self.slots[self.length - 1]",
          "self.positions_left -= self.slots[self.length - 1]", loses="budget"),
    Wrong("no position is left for <eos>", "grammar.py",
          "- plan - _scaffold(name_tokens) - 1  # 1: <eos>", "- plan - _scaffold(name_tokens)", loses="budget"),
)  # fmt: skip
