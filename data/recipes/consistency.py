"""What can be checked within a recipe: that its parts agree with one another. measure/eval.py runs `count`.

The first line of an answer lists the ingredients, one begins with "The dish has", the last with "Ready in". All
others are steps. Nothing is compared with a reference, so a recipe may differ from it and be consistent.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data import read_split
from tags import Example, plain_text

HERE = Path(__file__).resolve().parent
AMOUNT = r"(\d+(?:\.\d+)?) (g|ml|tsp)"
LISTED = re.compile(rf"(?:{AMOUNT} of |(\d+(?:\.\d+)?) )([^\d(]+)")  # "10 g of vegetable oil", "2 eggs"
BEFORE = re.compile(rf"{AMOUNT} of ((?:[^\W\d]+[ -]?){{1,4}})")  # "10 g of diced onion": up to four words
AFTER = re.compile(rf"((?:[^\W\d]+[ -]){{1,3}})\({AMOUNT}\)")  # "fresh herbs (10 g)": up to three
AT_HAND = {"water"}  # needs no place in a list
LINKS = {"and", "for", "from", "or", "the", "with"}  # name nothing
OFTEN, SURE = 10, 0.9  # see `ingredient_words`


@dataclass
class Recipe:
    """An answer taken apart."""

    listed: list[tuple[tuple[str, str], set[str]]]  # of each ingredient: amount and unit, and the words of its name
    steps: str
    facts: str
    closing: str

    @classmethod
    def read(cls, text: str) -> "Recipe":
        first, *lines = text.split("\n")
        parts = {start: [line for line in lines if line.startswith(start)] for start in ("The dish has", "Ready in")}
        facts, closing = (" ".join(found) for found in parts.values())
        steps = " ".join(line for line in lines if not line.startswith(tuple(parts)))
        listed = [((m[1] or m[3], m[2] or ""), words(m[4])) for m in LISTED.finditer(first)]
        return cls(listed, steps, facts, closing)

    def amounts(self) -> list[tuple[tuple[str, str], set[str]]]:
        """Amounts that the steps give, each with the words beside it."""
        found = [((m[1], m[2]), words(m[3])) for m in BEFORE.finditer(self.steps)]
        found += [((m[2], m[3]), words(m[1])) for m in AFTER.finditer(self.steps)]
        return [(amount, names) for amount, names in found if not names & AT_HAND]


def words(text: str) -> set[str]:
    """Words in the singular: {'boiled', 'egg'} of '2 boiled eggs and'."""
    found = set(re.findall(r"[^\W\d]+", text.lower())) - LINKS
    return {re.sub(r"(?<=o)es$|(?<![sui])s$", "", re.sub(r"ies$", "y", w)) if len(w) > 3 else w for w in found}


@cache
def ingredient_words() -> set[str]:
    """Words that name an ingredient wherever they occur in steps, learnt from the training recipes.

    These are words of ingredient lists that OFTEN recipes or more have in their steps, of which at least the share
    SURE lists them too: 'honey' is one; 'fresh', 'wrap' and 'water' are none.
    """
    in_steps, in_both = Counter(), Counter()
    for example in read_split(HERE / "train.jsonl"):
        recipe = Recipe.read(plain_text(example.rounds))
        named = words(recipe.steps)
        in_steps.update(named)
        in_both.update(named & set().union(*(names for _, names in recipe.listed)))
    return {word for word, n in in_both.items() if in_steps[word] >= OFTEN and n >= SURE * in_steps[word]} - AT_HAND


def count(example: Example, text: str) -> dict[str, list[int]]:
    """Name of a check -> how often the answer passes it, and how often it is made."""
    recipe = Recipe.read(text)
    listed, named = set().union(*(names for _, names in recipe.listed)), words(recipe.steps)
    used = [names for _, names in recipe.listed if names & named]
    ingredients, amounts = named & ingredient_words(), recipe.amounts()
    agreeing = [a for a, names in amounts if any(a == b and names & others for b, others in recipe.listed)]
    return {
        "ingredients in the steps that are listed": [len(ingredients & listed), len(ingredients)],
        "listed ingredients that are in the steps": [len(used), len(recipe.listed)],
        "amounts in the steps that agree with the list": [len(agreeing), len(amounts)],
        "time at the end equals that of the facts": [same(r"takes (\S+) minutes", r"in (\S+) minutes", recipe), 1],
        "energy at the end equals that of the facts": [same(r"has (\S+) kcal", r"with (\S+) kcal", recipe), 1],
    }


def same(in_facts: str, in_closing: str, recipe: Recipe) -> int:
    """1 if both lines give a number and the numbers are equal."""
    a, b = re.search(in_facts, recipe.facts), re.search(in_closing, recipe.closing)
    return int(bool(a and b) and a[1] == b[1])
