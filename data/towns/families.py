"""Three families of short answers about invented towns, in a few hundred words: learnt in two minutes on one CPU core.

`towns` copies names from the prompt. The second round of `sums` needs what the spans of the first have found. The spans
of `coupled` share a colour that nothing but chance decides: what independent spans cannot know of each other.
"""

import random

from data.tasks.families import COLOURS, NUMBERS, check, listed
from tags import Example, Round, Span

__all__ = ["FAMILIES", "TRAIN_SHARES", "check"]

TOWNS = "Brivok Ostel Marn Tulga Veddo Harrow Quenby Lissen".split()
SUBJECTS = "Dunn Ister Lome Varr Sorn Emmel Pesh Tarrel Omb Kalk Mavo Irena Cass Grell Widow Crow".split()
COLOURS = COLOURS[:4]
WORLD = {  # a kind of subject: what its span says, and which word of that the closing text repeats
    "river": ("The {name} flows past the old walls, and on the {name} barges carry salt and wool down to the sea.",
              "barges"),
    "dish": ("In every house they bake {name} from rye and plums, and serve {name} to each guest.", "plums"),
    "ruler": ("{name} rules with a light hand, and on market days {name} plays chess with anyone who comes.", "chess"),
    "tower": ("Climb the {name} for the view over the roofs.", "view"),
    "feast": ("Each year they keep the feast of {name} with drums and masks, and all through {name} the shops stay "
              "closed.", "drums"),
}  # fmt: skip
CLOSING = "Come for the {}, stay for the {}."
SUM = (
    "In the harbour lie the boats of {name}, {a} at the wall and {b} at the pier, so {name} has {total} of them in all."
)
MOST = "So {name} has the most, with {total} boats."
COUPLED = {
    "flag": "The flag is made of heavy cloth in {colour}, and flies from the tower.",
    "coats": "The coats of the guards are {colour} from collar to hem.",
    "gate": "Whoever comes to the gate sees that it was painted in {colour}.",
    "bridge": "The rails of the bridge have been {colour} since the great flood.",
    "boat": "The boat has a sail in {colour}, which can be seen from far away.",
    "tiles": "On the roof of the town hall lie tiles of {colour}.",
}


def towns(rng: random.Random, world: None) -> Example:
    """Copying: a span finds its name in its topic; the closing text repeats a word of the first and the last span."""
    town, kinds = rng.choice(TOWNS), rng.sample(list(WORLD), rng.randint(2, 4))
    names = rng.sample(SUBJECTS, len(kinds))
    spans = [Span(f"{kind} {name}", WORLD[kind][0].format(name=name)) for kind, name in zip(kinds, names)]
    prompt = f"Tell me about {listed([f'the {kind} {name}' for kind, name in zip(kinds, names)])} of {town}."
    closing = CLOSING.format(WORLD[kinds[0]][1], WORLD[kinds[-1]][1])
    return Example(prompt, (Round(spans=tuple(spans)), Round(text=closing)), "towns")


def sums(rng: random.Random, world: None) -> Example:
    """Two rounds: the sums are independent spans, the comparison needs all of them."""
    names = rng.sample(SUBJECTS, 3)
    while True:
        counts = [(rng.randint(1, 3), rng.randint(1, 3)) for _ in names]
        totals = [a + b for a, b in counts]
        if sorted(totals)[-1] > sorted(totals)[-2]:
            break
    spans = [Span(name, SUM.format(name=name, a=NUMBERS[a], b=NUMBERS[b], total=NUMBERS[a + b]))
             for name, (a, b) in zip(names, counts)]  # fmt: skip
    has = [f"{name} {NUMBERS[a]} and {NUMBERS[b]}" for name, (a, b) in zip(names, counts)]
    most = MOST.format(name=names[totals.index(max(totals))], total=NUMBERS[max(totals)])
    return Example(f"Count the boats: {'; '.join(has)}.", (Round(spans=tuple(spans)), Round(text=most)), "sums")


def coupled(rng: random.Random, world: None) -> Example:
    """Spans that share what the prompt leaves open: one colour, each as likely as the others."""
    town, things, colour = rng.choice(TOWNS), rng.sample(list(COUPLED), rng.randint(2, 4)), rng.choice(COLOURS)
    spans = [Span(thing, COUPLED[thing].format(colour=colour)) for thing in things]
    prompt = f"Choose one colour for {listed([f'the {thing}' for thing in things])} of {town}."
    return Example(prompt, (Round(spans=tuple(spans)),), "coupled")


FAMILIES = {"towns": towns, "sums": sums, "coupled": coupled}
TRAIN_SHARES = {"towns": 2, "sums": 2, "coupled": 1}  # of `coupled` there are only 4,080 prompts
