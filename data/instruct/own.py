"""Instruction data without a download: prompts made of templates and word lists, answered by a pretrained model itself.

    python data/instruct/own.py --model models/SmolLM2 --out models/own.jsonl
    python data/instruct/prepare.py models/own.jsonl --tokenizer models/SmolLM2 --out data/mine

Answers are greedy, token by token and under the model's own chat template, so what is learnt from them is planning and
not another way to write; and they need no licence but the model's. Answers that are cut, repeat themselves, have an
item twice or no list where one is asked for are left out. An interrupted call goes on where it was.
"""

import argparse
import itertools
import json
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import SampleConfig
from plumbing.device import CHOICES, find
from plumbing.settings import Help, add_settings, check, command, locate, pick, setting
from sample import Sampler

NUMBERS, PROSE = ("three", "four", "five"), "two sentences"  # what asks for no list
TEMPLATES = {  # a list of words, and what is asked of each
    "do": (
        "Give me {n} tips for {x}, one sentence each.", "Give {n} reasons for {x}. Keep each to one sentence.",
        "Name {n} mistakes that people make when {x}, one sentence each.",
        "What do I need for {x}? List {n} things with a short explanation each.",
        "List {n} benefits of {x} and explain each in one sentence.", "What should I know about {x}? Three short points.",
        "How do I begin with {x}? Answer in two sentences.",
    ),
    "kind": (
        "List {n} {x} and describe each in one sentence.", "Name {n} {x} and say what each is known for, in one sentence.",
        "Which {n} {x} would you recommend to a beginner? One sentence each.",
        "Write a list of {n} {x}, each with a short explanation.", "Can you name {n} {x}? Say a few words about each.",
        "Compare {n} {x} in a short list.",
    ),
    "thing": (
        "Name {n} advantages of {x}, each in one sentence.", "Name {n} parts of {x} and what each is for, one sentence each.",
        "List {n} interesting facts about {x}, one sentence each.", "Give me {n} uses of {x}, with a sentence for each.",
        "What are {n} problems with {x}? Explain each in one sentence.", "Explain in two sentences what {x} is good for.",
        "Tell me about {x} in a short list of {n} points.",
    ),
    "place": (
        "Name {n} things to see in {x} and describe each in one sentence.", "List {n} dishes from {x}, with a sentence for each.",
        "Give {n} reasons to visit {x}, one sentence each.", "Plan {n} days in {x}, a sentence for each day.",
        "Describe the food, the weather and the people of {x}, one sentence each.",
    ),
}  # fmt: skip
WORDS = {
    "do": "learning to swim, saving money, sleeping better, cooking rice, training a dog, writing a letter, planting a "
    "tree, moving to a new city, studying for an exam, giving a speech, riding a bicycle, packing for a trip, "
    "growing tomatoes, learning a language, running a marathon, keeping a diary, reading more books, cleaning a "
    "kitchen, buying a used car, hiking in the mountains, playing chess, painting a room, raising chickens, "
    "baking bread, starting a small shop, taking photographs, working from home, caring for an old cat, choosing "
    "a school, making new friends, drinking enough water, hosting a dinner, learning the guitar, sewing a button, "
    "camping in winter, watching birds, keeping bees, writing a story, leading a team, preparing for an "
    "interview, repairing a bicycle, learning to draw, keeping plants alive, eating less sugar, walking every "
    "day, singing in a choir, building a table, teaching children, travelling alone, cooking for two, using less "
    "plastic, fishing in a lake, learning to dance, saving water, tidying a desk, waking up early, writing a "
    "poem, running a small farm, learning to type, staying calm",
    "kind": "fruits, vegetables, trees, birds, rivers, planets, tools of a carpenter, musical instruments, board games, "
    "kinds of cheese, famous painters, famous scientists, herbs, dances, sports, inventions, metals, spices, "
    "insects, big cats, soups, kinds of bread, desserts, breakfast dishes, card games, flowers, garden tools, "
    "kitchen tools, kinds of tea, dog breeds, ways to travel, jobs in a hospital, school subjects, hobbies, kinds "
    "of weather, oceans, famous novels, materials for clothes, sources of energy, programming languages, kinds of "
    "fish, shoes, drinks without alcohol, animals of the forest, famous buildings, kinds of dances, languages of "
    "Europe, vehicles, kinds of rock, salads, toys, holidays, wild flowers, fabrics, kinds of boats, sea animals, "
    "jobs in a school, nuts, sandwiches, ways to save energy",
    "thing": "a bicycle, the sun, a public library, a garden, email, a wooden house, solar power, a train, a mobile phone, "
    "a dictionary, coffee, the moon, a sailing boat, a school uniform, olive oil, a smartphone, rain, a "
    "dishwasher, wool, a compass, a map, salt, a microscope, electric cars, honey, a farm, glass, plastic bags, a "
    "museum, a camera, vinegar, a hammer, online courses, a theatre, a backpack, the internet, a piano, paper, a "
    "greenhouse, a refrigerator, a bridge, a clock, bamboo, a candle, chocolate, a lighthouse, a newspaper, wind "
    "power, a robot, silk, a telescope, a bakery, a canal, a football, a violin, soap, a tent, a lake, an "
    "umbrella, a windmill",
    "place": "Japan, Italy, Mexico, Egypt, France, India, Brazil, Greece, Norway, Kenya, Canada, Spain, China, Turkey, "
    "Peru, Morocco, Thailand, Ireland, Portugal, Vietnam, Iceland, Cuba, Poland, Australia, Argentina, Scotland, "
    "Austria, Hungary, Chile, Nepal, Finland, Croatia, Jordan, Sweden, Indonesia, Belgium, Ghana, Malta, Denmark, "
    "New Zealand",
}


@dataclass
class OwnConfig:
    """A model's own answers."""

    model: str = setting("models/SmolLM2", "folder of the pretrained model that answers")
    out: str = setting("models/own.jsonl", "file of its answers")
    prompts: int = setting(0, "how many prompts are answered, drawn at random (0: all)", at_least=0)
    batch: int = setting(32, "prompts answered together", at_least=1)
    max_tokens: int = setting(200, "longest answer that is kept", at_least=16)
    device: str = setting("auto", f"where to compute: {', '.join(CHOICES)}")
    seed: int = setting(0, "order of the prompts")

    def __post_init__(self) -> None:
        check(self)


def prompts(seed: int) -> list[str]:
    """All prompts, in an order that the seed decides."""
    made = [template.format(n=n, x=x) for kind, templates in TEMPLATES.items()
            for template, x, n in itertools.product(templates, WORDS[kind].split(", "), NUMBERS)]  # fmt: skip
    made = list(dict.fromkeys(made))  # a template without a number comes once
    random.Random(seed).shuffle(made)
    return made


def good(prompt: str, text: str) -> bool:
    """Whether an answer has more than one line if a list is asked for, and none that begins as another one does.

    That is with the same three words, or with the same name before a colon; numbers do not count.
    """
    lines = [re.sub(r"^[\W\d]+", "", line).lower() for line in text.splitlines()]
    heads = [line.split(":")[0] if ":" in line else " ".join(line.split()[:3]) for line in filter(None, lines)]
    return len({*heads}) == len(heads) and (len(heads) > 1 or PROSE in prompt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add_settings(parser, OwnConfig)
    config = pick(OwnConfig, parser.parse_args())
    out, asked = Path(config.out), prompts(config.seed)[: config.prompts or None]
    written = out.read_text(encoding="utf-8").split("\n")[:-1] if out.exists() else []
    try:
        first = asked.index(json.loads(written[-1])["instruction"]) + 1 if written else 0
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"--out {out}: holds something else than answers to these prompts: name another file"
        ) from None
    sampler = Sampler.load(locate(config.model), SampleConfig(max_tokens=config.max_tokens), find(config.device))
    start, kept = time.perf_counter(), 0
    with out.open("a", encoding="utf-8") as file:
        for n in range(first, len(asked), config.batch):
            answers = sampler.answer(asked[n : n + config.batch])
            texts = {a.prompt: a.result()["text"] for a in answers if not (a.cut or a.looping)}
            texts = {prompt: text for prompt, text in texts.items() if good(prompt, text)}
            kept += len(texts)
            file.writelines(
                json.dumps({"instruction": prompt, "output": text}) + "\n" for prompt, text in texts.items()
            )
            file.flush()
            passed, left = time.perf_counter() - start, len(asked) - n - len(answers)
            print(f"{n + len(answers)} of {len(asked)} prompts, {kept / (n + len(answers) - first):.0%} of the answers kept, "
                  f"{passed / (n + len(answers) - first) * left / 60:.0f} min left", flush=True)  # fmt: skip


if __name__ == "__main__":
    command(main)
