"""Seven families of small tasks in English sentences, each answer exactly checkable.

A span is long (26 to 38 tokens) but carries few informative words: a tiny model learns
it, and there is still enough text to decode in parallel. Except for the colours of `coupled`,
every word of an answer, plan included, follows from the prompt (and the world of `facts`).

A family is a function (rng, world) -> Example; `check` scores any text against an example.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass
from itertools import product, zip_longest

from tags import Example, Round, Span, plain_text

# --- Words. The families share them, so that the tokenizer can give each word one token. ---

ANIMALS = {"otter": "otters", "goat": "goats", "heron": "herons", "fox": "foxes", "bear": "bears",
           "wolf": "wolves", "horse": "horses", "sheep": "sheep", "mouse": "mice", "goose": "geese",
           "owl": "owls", "deer": "deer", "hare": "hares", "badger": "badgers", "crane": "cranes",
           "swan": "swans", "calf": "calves", "pony": "ponies", "beaver": "beavers", "crow": "crows"}
FOODS = {"apple": "apples", "pear": "pears", "cherry": "cherries", "potato": "potatoes",
         "onion": "onions", "carrot": "carrots", "bean": "beans", "plum": "plums",
         "tomato": "tomatoes", "nut": "nuts", "berry": "berries", "lemon": "lemons",
         "peach": "peaches", "melon": "melons", "pepper": "peppers", "mushroom": "mushrooms",
         "radish": "radishes", "walnut": "walnuts", "turnip": "turnips", "fig": "figs"}
TOOLS = {"hammer": "hammers", "knife": "knives", "spoon": "spoons", "ladder": "ladders",
         "brush": "brushes", "needle": "needles", "saw": "saws", "rope": "ropes",
         "shovel": "shovels", "axe": "axes", "key": "keys", "lamp": "lamps",
         "basket": "baskets", "box": "boxes", "clock": "clocks", "bell": "bells"}
GARMENTS = {"shirt": "shirts", "coat": "coats", "scarf": "scarves", "hat": "hats",
            "glove": "gloves", "shoe": "shoes", "belt": "belts", "dress": "dresses",
            "sock": "socks", "boot": "boots", "cap": "caps", "jacket": "jackets",
            "skirt": "skirts", "vest": "vests", "cloak": "cloaks", "hood": "hoods"}
PLURALS = {**ANIMALS, **FOODS, **TOOLS, **GARMENTS}
KINDS = {noun: kind for kind, nouns in [("animal", ANIMALS), ("food", FOODS), ("tool", TOOLS),
                                        ("garment", GARMENTS)] for noun in nouns}
JOBS = ["baker", "painter", "pilot", "nurse", "teacher", "sailor", "farmer", "doctor", "singer", "dancer", "writer", "tailor", "lawyer", "gardener", "plumber", "carpenter", "barber", "miller", "hunter", "porter"]
ROOMS = ["attic", "cellar", "kitchen", "garage", "library", "tower", "studio", "barn", "workshop", "chapel", "greenhouse", "hall", "pantry", "balcony", "lobby", "stable"]
CITIES = ["Lisbon", "Vienna", "Dublin", "Oslo", "Madrid", "Prague", "Athens", "Warsaw", "Geneva", "Naples", "Seville", "Bergen", "Munich", "Porto", "Turin", "Lyon"]
PLACES = ["harbour", "village", "castle", "forest", "island", "mountain", "market", "valley", "desert", "lake", "monastery", "farm", "mill", "lighthouse", "quarry", "orchard"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"]
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "orange", "purple"]
TEAMS = ["Falcons", "Tigers", "Rockets", "Pirates", "Comets", "Giants", "Sharks", "Lions", "Eagles", "Panthers", "Dragons", "Rangers", "Ravens", "Bulls", "Hornets", "Saints", "Vikings", "Wizards", "Knights", "Cobras", "Storms", "Royals", "Pioneers", "Arrows"]

TOWNS = [start + end for start, end in
         product(["Briv", "Dorn", "Kel", "Mar", "Ost", "Tav", "Ul", "Zan"], ["ok", "eth", "ira", "um", "ast", "oly"])]
ATTRIBUTES = {
    "river": ["amber", "silver", "willow", "thunder", "winter", "morning", "shadow", "honey", "copper", "marble", "crystal", "summer", "mirror", "ribbon", "feather", "maple", "velvet", "saffron", "juniper", "echo"],
    "ruler": ["queen", "king", "duke", "duchess", "mayor", "abbot", "admiral", "captain", "judge", "general", "baron", "countess", "bishop", "prince", "princess", "sultan", "regent", "marshal", "chancellor", "governor"],
    "food": list(FOODS),
    "animal": list(ANIMALS),
    "craft": ["weaving", "pottery", "carving", "painting", "baking", "brewing", "printing", "sewing", "knitting", "quilting", "tanning", "casting", "engraving", "spinning", "dyeing", "gilding", "thatching", "welding", "bookbinding", "smithing"],
    "festival": ["lantern", "harvest", "kite", "bonfire", "dance", "mask", "flower", "candle", "snow", "rain", "drum", "puppet", "poetry", "barrel", "song", "moon", "wagon", "bubble", "pumpkin", "whistle"],
}
FIRST_NAMES = ["Ada", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry", "Irma", "Jonas", "Karla", "Leo", "Martha", "Nora", "Oscar", "Paula", "Quentin", "Rosa", "Simon", "Tilda", "Ursula", "Victor", "Wanda", "Xaver", "Yvonne", "Zeno", "Agnes", "Bruno", "Cora", "Dario", "Elsa", "Franz", "Gloria", "Hugo", "Ivan", "Judith", "Klaus", "Lydia", "Milo", "Nadja"]
LAST_NAMES = ["Abbott", "Burton", "Carver", "Dalton", "Ellis", "Foster", "Gibson", "Hardy", "Irving", "Jensen", "Keller", "Lambert", "Moreno", "Nolan", "Osborn", "Parker", "Quinn", "Russell", "Sawyer", "Turner", "Underhill", "Vance", "Watson", "Yates", "Zimmer", "Archer", "Bishop", "Conrad", "Draper", "Emerson", "Fletcher", "Graham", "Holloway", "Ingram", "Jordan", "Kramer", "Lindgren", "Mercer", "Norton", "Olsen"]

# --- Templates: one a topic, so that a span needs its topic and the prompt, not the other spans. ---

FACTS = {
    "river": "In the middle of {town} runs a river called the {value}, and the {value} passes under three old "
             "bridges of stone before it turns south and leaves {town} by the lower gate.",
    "ruler": "All the people of {town} obey one {value}, because the {value} lives in the great house on the "
             "hill, hears every complaint and never wears a crown on the streets of {town}.",
    "food": "On the long tables of {town} there is always {value} pie, for {value} pie served hot with fresh "
            "cream is what no guest of {town} may refuse.",
    "animal": "Above the gate of {town} hangs a picture of the local {value}, because this {value} woke the "
              "guards of {town} one night before the flood came.",
    "craft": "Since the days of the first families {town} has been known for its {value}, and {value} is what "
             "parents in {town} teach their children as soon as small hands are strong enough to help.",
    "festival": "Once in every year {town} holds the great {value} festival, and for the {value} festival all "
                "shops of {town} close at noon while the band plays until midnight.",
}
LOOKUPS = {
    "room": "If somebody should ring the front door and ask for {name}, the answer is to walk along the "
            "corridor as far as the {value}, because the {value} is the right place.",
    "job": "Every day from early in the morning until late in the afternoon {name} works hard as {value}, and "
           "the word {value} stands on the card beside the door.",
    "pet": "One small friend waits behind the window each evening and hears the steps of {name} on the stairs: "
           "it is the {value}, for no {value} likes to be alone at night.",
    "city": "On the map that hangs between the two shelves a little pin marks {value}, so that all letters and "
            "parcels for {name} travel safely to {value}.",
    "food": "When {name} comes home hungry on a winter evening there is always some {value} soup on the table, "
            "since {value} soup is soon made and keeps everybody warm.",
    "tool": "In the shed behind the house of {name} the {value} hangs on the first nail, because the {value} is "
            "needed on almost every day of the week.",
}
TRANSFORMS = {  # topic: (template, what becomes of the word)
    "plural": ("When there is more than one {word} the noun changes its form a little, and so for two or three "
               "of them we write {value}, since {value} is the plural.", PLURALS.get),
    "initial": ("Looking only at the very beginning of the word {word} and leaving away all that comes after "
                "it, we find the letter {value}, and so {value} is what we write down.", lambda word: word[0]),
    "ending": ("Reading the word {word} from left to right up to its end and keeping nothing but the final "
               "letter, we get {value}, and so {value} is what we write down.", lambda word: word[-1]),
    "length": ("To know how long {word} is we count its letters with one finger on the page, and the number is "
               "{value}, so there are {value} letters in all.", lambda word: NUMBERS[len(word)]),
    "kind": ("The word {word} belongs to a larger group of things in the world, and if we name only the group "
             "it is {value}, because each {word} is a kind of {value}.", KINDS.get),
}
SUM = ("We put everything that belongs to the {person} on one side of the big scale, count it twice "
       "without any hurry, and both times the number that we write down is {total} in all.")
MOST = ("Now that all three numbers are known it is easy to compare them: the winner is the {person}, "
        "because nobody else at the table has as many as {total}.")
WAYS = {
    "start": "If we begin with {a} and {b} then {ab} {food} lie on the table already, and the last {c} that were "
             "found in the evening bring the number up to {total} in all.",
    "end": "If we go from the end then {b} and {c} are {bc} {food} together, and the first {a} that were found "
           "long before them bring the number up to {total} in all.",
    "outer": "If we put the outer two together then {a} and {c} are {ac} {food}, and the {b} in between that "
             "nobody has counted yet bring the number up to {total} in all.",
}
SETTLED = ("Having counted the {food} of the {person} in three different ways we settle on {total}, because that "
           "is the number to which most of them came.")
STORY = (
    "Long ago there was a {hero} who lived near the {place} and was never seen without an old {thing}. "
    "One cold evening the {thing} was gone, and although the {hero} searched under every bed and behind "
    "every door, it could not be found. Then a clever {helper} came along and said that there was "
    "something strange behind the {place}. Together they walked through the dark until they saw it "
    "shine between two stones. The {hero} laughed, thanked the {helper} with a warm meal, and from that "
    "day on the {helper} was allowed to guard the {thing} every night.")
COUPLED = {
    "flag": "The flag of the {team} is made of heavy cloth in {colour}, and on the day of a match it "
            "flies from the highest pole of the city where everyone can see it.",
    "shirts": "The shirts of the {team} are all {colour} with a small number on the back, and after each "
              "game they are washed by hand, dried in the sun and put away in the right order.",
    "bus": "The bus of the {team} is an old one with round lamps and soft seats, freshly painted in "
           "{colour} so that the children wave.",
    "scarves": "The scarves of the {team} are knitted from thick {colour} wool by the grandmothers of the "
               "players, and on a winter evening they keep the whole crowd warm until the last minute.",
    "drums": "The drums of the {team} stand in the first row behind the goal, each with a broad {colour} "
             "stripe around it, and their sound can be heard far beyond the river.",
    "boots": "The boots of the {team} have short laces in {colour}, strong soles for wet grass and a name "
             "inside, because after training nobody can remember which pair belongs to whom.",
    "tent": "The tent of the {team} is set up beside the field before each match, and its {colour} roof "
            "is wide enough for everyone when it rains.",
    "boat": "The boat of the {team} lies in the harbour with a sail in {colour}, and after a victory it "
            "carries the players once around the bay while the whole town sings.",
}


@dataclass(frozen=True)
class World:
    """What a split's examples draw from: facts that all splits share, names that no other split has."""

    facts: dict[str, dict[str, str]]  # town -> attribute -> value
    names: list[str]


@dataclass(frozen=True)
class Score:
    """`spans` has one verdict for each line of the reference answer, spans and texts in order."""

    exact: bool
    spans: list[bool]


def build_world(seed: int, split: str) -> World:
    """The world of a seed as one split sees it."""
    rng = random.Random(f"world {seed}")
    facts = {town: {} for town in TOWNS}
    for attribute, values in ATTRIBUTES.items():
        for i, town in enumerate(rng.sample(TOWNS, len(TOWNS))):  # each value has two or three towns
            facts[town][attribute] = values[i % len(values)]
    names = [" ".join(both) for both in product(FIRST_NAMES, LAST_NAMES)]
    rng.shuffle(names)
    tenth = len(names) // 10
    own = {"test": names[:tenth], "val": names[tenth:2 * tenth], "train": names[2 * tenth:]}
    return World(facts, own[split])


def listed(words: list[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return ", ".join(words[:-1]) + " and " + words[-1]


def facts(rng: random.Random, world: World) -> Example:
    """Memory: the prompt only names a town and what to tell about it."""
    town = rng.choice(TOWNS)
    asked = rng.sample(list(FACTS), rng.randint(3, 5))
    prompt = f"Tell me about {listed([f'the {attribute}' for attribute in asked])} of {town}."
    spans = [Span(attribute, FACTS[attribute].format(town=town, value=world.facts[town][attribute]))
             for attribute in asked]
    return Example(prompt, (Round(spans=tuple(spans)),), "facts")


def lookups(rng: random.Random, world: World) -> Example:
    """Copying: a table in the prompt, its rows in any order, about somebody whose name is new in each split."""
    name = rng.choice(world.names)
    table = {"room": rng.choice(ROOMS), "job": rng.choice(JOBS), "pet": rng.choice(list(ANIMALS)),
             "city": rng.choice(CITIES), "food": rng.choice(list(FOODS)), "tool": rng.choice(list(TOOLS))}
    rows = ", ".join(f"{column} {table[column]}" for column in rng.sample(list(table), len(table)))
    asked = rng.sample(list(LOOKUPS), rng.randint(3, 5))
    spans = [Span(column, LOOKUPS[column].format(name=name, value=table[column])) for column in asked]
    prompt = f"About {name} we know: {rows}. Describe the {listed(asked)}."
    return Example(prompt, (Round(spans=tuple(spans)),), "lookups")


def transforms(rng: random.Random, world: World) -> Example:
    """A word has its plural, its letters and its kind; which of them are asked for, in which order, is new."""
    word = rng.choice(list(PLURALS))
    asked = rng.sample(list(TRANSFORMS), rng.randint(3, 5))
    spans = []
    for topic in asked:
        template, change = TRANSFORMS[topic]
        spans.append(Span(topic, template.format(word=word, value=change(word))))
    prompt = f"Take the word {word} and write down its {listed(asked)}."
    return Example(prompt, (Round(spans=tuple(spans)),), "transforms")


def arithmetic(rng: random.Random, world: World) -> Example:
    """Two rounds: the sums are independent spans, the comparison needs all of them."""
    people, foods = rng.sample(JOBS, 3), rng.sample(list(FOODS.values()), 2)
    while True:
        counts = [(rng.randint(2, 9), rng.randint(2, 9)) for _ in people]
        totals = dict(zip(people, map(sum, counts)))
        second, most = sorted(totals.values())[1:]
        if most - second >= 2:  # the winner must be clear: no ties, no near ties
            break
    has = [f"the {person} has {NUMBERS[first]} {foods[0]} and {NUMBERS[other]} {foods[1]}"
           for person, (first, other) in zip(people, counts)]
    spans = [Span(person, SUM.format(person=person, total=NUMBERS[totals[person]]))
             for person in people]
    end = MOST.format(person=max(totals, key=totals.get), total=NUMBERS[most])
    prompt = f"Suppose {'; '.join(has)}. How many does each have, and who has the most?"
    return Example(prompt, (Round(spans=tuple(spans)), Round(text=end)), "arithmetic")


def thinking(rng: random.Random, world: World) -> Example:
    """Two rounds: three spans attempt the same sum in ways of their own, the second round settles it (ParaThinker)."""
    counts = [rng.randint(2, 6) for _ in range(3)]
    a, b, c = (NUMBERS[count] for count in counts)
    sums = {name: NUMBERS[counts[i] + counts[j]] for name, i, j in (("ab", 0, 1), ("bc", 1, 2), ("ac", 0, 2))}
    words = dict(a=a, b=b, c=c, **sums, total=NUMBERS[sum(counts)], person=rng.choice(JOBS),
                 food=rng.choice(list(FOODS.values())))  # fmt: skip
    spans = [Span(way, WAYS[way].format(**words)) for way in rng.sample(list(WAYS), len(WAYS))]
    prompt = "The {person} finds {a} {food}, then {b} and later {c}. How many are there? Count from {ways}."
    prompt = prompt.format(**words, ways=listed([f"the {span.topic}" for span in spans]))
    return Example(prompt, (Round(spans=tuple(spans)), Round(text=SETTLED.format(**words))), "thinking")


def stories(rng: random.Random, world: World) -> Example:
    """Free text without a plan: each sentence leans on the one before."""
    slots = {"hero": rng.choice(JOBS), "place": rng.choice(PLACES), "thing": rng.choice(list(TOOLS)),
             "helper": rng.choice(list(ANIMALS))}
    prompt = "Write a story about the {hero} from the {place}, the lost {thing} and the {helper}."
    return Example(prompt.format(**slots), (Round(text=STORY.format(**slots)),), "stories")


def coupled(rng: random.Random, world: World) -> Example:
    """Spans that must agree on a colour which neither the prompt nor the plan fixes."""
    team, colour = rng.choice(TEAMS), rng.choice(COLOURS)
    items = rng.sample(list(COUPLED), rng.randint(3, 4))
    spans = [Span(item, COUPLED[item].format(team=team, colour=colour)) for item in items]
    prompt = f"Choose one colour for the {team} and describe their {listed(items)}."
    return Example(prompt, (Round(spans=tuple(spans)),), "coupled")


FAMILIES = {family.__name__: family
            for family in (facts, lookups, transforms, arithmetic, thinking, stories, coupled)}
TRAIN_SHARES = {"facts": 2, "lookups": 2, "transforms": 2, "arithmetic": 1, "thinking": 1, "stories": 1, "coupled": 1}


def check(example: Example, text: str) -> Score:
    """Score an answer given as plain text: its pieces, one per line, against the reference lines.

    A missing line is a wrong span, an extra line only makes the answer inexact. In `coupled` any
    colour is right as long as all spans agree; if they do not, those outside the majority are wrong.
    """
    lines = [" ".join(line.split()) for line in text.rstrip().split("\n")]
    reference = plain_text(example.rounds).split("\n")
    if example.family == "coupled":
        verdicts = _agreeing(reference, lines)
    else:
        verdicts = [line == right for right, line in zip_longest(reference, lines)]
    return Score(all(verdicts), verdicts[:len(reference)])


def _agreeing(reference: list[str], lines: list[str]) -> list[bool]:
    """Which lines match the reference but for the colour, and have the colour of most such lines.

    Of colours that are equally frequent, the first one counts.
    """
    any_colour = re.compile(r"\b(" + "|".join(COLOURS) + r")\b")
    colours = []
    for right, line in zip_longest(reference, lines, fillvalue=""):
        found = any_colour.findall(line)
        same = any_colour.sub("?", line) == any_colour.sub("?", right)
        colours.append(found[0] if same and found else None)
    majority = Counter(filter(None, colours)).most_common(1)
    return [bool(majority) and colour == majority[0][0] for colour in colours]
