"""Assignment 4: the two-stage sampler with its exact cache."""

import re

import by_hand
import small
from checks import Wrong, check

TITLE = "A sampler in two stages, with an exact cache"
HOURS = 10
TESTS_TAKE = 0.5
FUNCTIONS = {
    "unmask.py": ("certainty", "ranks", "beside_its_like", "fill"),
    "decode.py": ("Answer.scaffold", "WrittenPlan.begin", "WrittenPlan.force", "WrittenPlan.write", "WrittenPlan.spans",
                  "Denoise.entries", "Denoise.groups", "Denoise.readings", "Denoise.quota", "Denoise.take"),
}  # fmt: skip
COSTS = ("plan_passes", "denoise_passes", "critical_path", "positions")
HANDOUT = """
You build the loop that turns a trained network into a writer: first a plan, token by token; then all spans of the
plan at once, the most certain slots first; then, after `<sync/>`, the next round, which reads what the spans came to
say. The network, the mask, the grammar and the batching are there. What is missing is what happens between two
passes.

Samplers that are slow and right are there too: minimal.py, and with all settings `tests/naive_sampler.py`, recompute
the whole sequence in every pass. Yours has to write the same answers and compute each token only when something it
depends on has changed.

## Read first (an hour)

1. README.md, "The method". The mask's table tells which keys a query sees: the cache rests on it.
2. The paper, section 4: [Planned Diffusion](https://arxiv.org/abs/2510.18087).
3. `minimal.py`: `allowed` and `answer`, the loop that you build, without a cache.
4. `grammar.py`, only the docstrings of `Grammar`, `allowed`, `forced` and `advance`.
5. `masks.py`, only `Layout`: entry i of the layout is entry i of the KV cache.
6. `sample.py`, only `Sampler.answer` and `Sampler.step`. A pass asks each answer's phase for `entries` (what to
   compute) and `readings` (which predictions to read), and gives it what was drawn by `take`, which returns the next
   phase.
7. `decode.py`, all of it: `Answer`, `Reading` and `Reply`, `Phase`, `WrittenPlan`, `Denoise`. Of `methods.py` the last
   table, `DECODERS`: an answer has one line of it as `answer.decoder`.
8. `tests/naive_sampler.py`, all of it.

Before you write code, answer for yourself: a plan token is computed in pass 3. Can its keys and values be different
in pass 9? Can those of a slot? Can those of a slot whose span is finished?

## Build, in this order

**Step 1: which slots are filled** (`unmask.py`). All slots of all answers of a batch come as one list; `group` says
which of them compete. `certainty` gives a number per slot, `ranks` its rank among its group, `fill` draws tokens and
decides.

- Certainty is a property of the model. It does not change with temperature or top-p, which only choose the token.
- With `threshold` every slot that reaches it is kept, however small the quota.
- With `apart`, of two neighbours that would get the same token (not `[PAD]`) only the more certain is kept; the next
  most certain slot takes the place of the other. With `pads_last` a slot waits if it would get `[PAD]` and one of the
  masked slots right before it text (`before_text` is there). What reaches the threshold is kept all the same.
- `ranks` without a loop: sort by certainty, then stably by group. The place in that order, less the place where the
  group begins, is the rank. `scatter_` puts ranks back where their slots are.

**Step 2: the plan** (decode.py: `WrittenPlan.begin`, `write`, `force`, `spans`, and `Answer.scaffold`).

- `write(token)` tells the grammar and the answer's counters of a token, and notes it in `answer.rounds[-1]`: it opens
  a topic, is a topic's length, part of a topic's name, or text. It also goes into the layout, except for `<sync/>`
  and `<eos>`, which end the round: then come its spans or, without topics, the next round (`next_round`). A model that
  is not constrained can leave the grammar: set `broken`, and end the answer. `answer.last`: no round follows. Set
  `answer.cut` (never clear it) if it is constrained and `max_tokens` left it one token alone (`Grammar.out_of_room`):
  ask the grammar before you tell it.
- A name that ends a second time (`Grammar.repeats`), if the answer is constrained: take the topic out of round and layout,
  let the next pass compute the last entry once more, tell the grammar (`take_back`), and go on.
- Where the grammar allows one token, `force` writes it without a pass, if constrained; that can change the phase.
- `critical_path` counts a token per pass, which `take` does, and each token that `force` writes.
- `begin` writes `<sync/>` as the first token of a later round, and must not claim that it is cached (`answer.cached`).
- `spans` turns the plan into a scaffold (`span_slots` in tokenizer.py says how many slots) and begins the phase
  `answer.decoder.spans`. `answer.method.repeat_topic` says whether a span begins with its topic.

**Step 3: the spans** (`Denoise`). `self.unfinished` holds the spans with masked slots: where each begins and ends, and
its slots. `self.first` is the first entry of the scaffold. A group is what shares a quota: here a span's slots. `draw`
is there; it calls your `fill` for all groups at once.

- What does a pass have to compute? Everything before the scaffold that is not cached yet, and the unfinished spans,
  whole.
- After step s of S, ceil(n s / S) of a span's n slots are filled. The quota of a pass is what is missing to that,
  and at least one: a pass that fills none of a span's slots would be repeated exactly. With a threshold alone S is 0,
  and the quota one.
- `take` fills the slots whose tokens were kept: a `Reply` has them in the order of `reply.reading.entries`. Tell
  `retire` which spans are still unfinished. A denoising pass adds 1 to the critical path, however many slots it fills.
- After the pass, entries before `first` are exact in the cache. Is anything else?
- A pass that fills no slot would repeat itself for ever: raise RuntimeError.

## Hints

1. *Nothing works end to end.* (The three `raise NotImplementedError` in `Phase` belong there.) `python
   course/grade.py --only rank_in_group` needs `ranks` alone, `plan_by_hand` step 2 alone and `passes_by_hand` step 3
   alone. The tests are in that order.
2. *ceil of a float.* n s / S with whole numbers is exact enough here; do not multiply by `steps_ratio` again.
3. *The picture of the cache test* shows a line per pass and a column per layout entry. If the pass after the spans
   computes only `<sync/>`, then the spans' keys in the cache are those of their last pass, when some slots were still
   `[MASK]`.
4. *Still the cache.* Which two numbers say what the next plan pass computes? Look at `WrittenPlan.entries`.
5. *The answers of the shipped model differ in one word.* Look at the sign of the entropy; of ties the first wins.
6. `python -m pytest tests/test_unmask.py tests/test_sample.py` compares with the naive sampler.

## Think about it (no points)

Dense spans see each other (`--method dense`). Why would one quota per span be wrong there, and which of your
functions changes? (`DenoiseTogether` has the answer.)
"""


def unmask_inputs(rng, size):
    """Logits (N, V) of slots in groups of random sizes, and the groups' numbers (N,)."""
    import torch

    sizes = rng.integers(1, 4 + 3 * size, 2 + size)
    logits = torch.from_numpy(2 * rng.standard_normal((int(sizes.sum()), 9))).float()
    return logits, torch.tensor([n for n, k in enumerate(sizes) for _ in range(k)])


@check(
    points=10,
    idea="certainty is the model's own: of its probabilities at temperature 1, whatever tokens are drawn with",
)
def certainty_of_slots(rng, size):
    import torch

    from config import ORDERS, SampleConfig
    from unmask import certainty

    logits, group = unmask_inputs(rng, size)
    slots = dict(logits=logits, token=logits.argmax(-1), group=group, entry=torch.arange(len(group)), generators=[])
    found = {}
    for order in (order for order in ORDERS if order != "random"):
        for settings in (dict(), dict(temperature=0.3), dict(temperature=2.0, top_p=0.5), dict(threshold=0.7)):
            name = ", ".join([order, *(f"{key} {value}" for key, value in settings.items())])
            found[name] = small.call(certainty, config=SampleConfig(order=order, **settings), **slots)
    slots["generators"] = [(torch.Generator().manual_seed(7), 2), (torch.Generator().manual_seed(8), len(group) - 2)]
    drawn = small.call(certainty, config=SampleConfig(order="random"), **slots)
    found["random: from each answer's own generator"] = drawn
    return found


@check(points=8, idea="rank 0 is the most certain slot of its own group, and of equally certain ones the first")
def rank_in_group(rng, size):
    import torch

    from unmask import ranks

    _, group = unmask_inputs(rng, size)
    sure = torch.from_numpy(rng.integers(0, 6, len(group)) / 8).float()
    names = [f"group {g}: {s:.3f}" for g, s in zip(group.tolist(), sure.tolist())]
    return {"names": names, "rank": small.call(ranks, sure=sure, group=group)}


def draw_kept(expected, came):
    """The slots of the first case that differs: which were kept."""
    name = next(key for key in expected if expected[key] != came[key])
    lines = [f"{name} ('#' kept, '.' not; a line per group)"]
    for n, (e, c) in enumerate(zip(expected[name], came[name])):
        row = lambda flags: "".join(".#"[flag] for flag in flags)
        lines.append(f"group {n}: expected {row(e)}, came {row(c)}" + "  <-" * (e != c))
    return "\n".join(lines)


@check(
    points=12,
    idea="of each group the most certain slots up to its quota are kept, of two neighbours with the same token only "
    "one, and with a threshold all that reach it",
    draw=draw_kept,
)
def slots_kept(rng, size):
    import torch

    from config import SampleConfig
    from unmask import fill

    logits, group = unmask_inputs(rng, size + 4)
    quota = torch.from_numpy(rng.integers(2, 7, int(group.max()) + 1))[group]
    entry, pad, found = torch.arange(len(logits)), 0, {}
    for first in range(0, len(logits) - 1, 3):  # neighbours that are both sure of the same token
        logits[first : first + 2, int(rng.integers(9))] += 6
    logits[2::6, pad] += 7  # [PAD] that is surer than the text before it
    for settings in (dict(order="entropy"), dict(order="margin", apart=False), dict(pads_last=False),
                     dict(threshold=0.5), dict(threshold=0.99), dict(threshold=0.5, apart=False, pads_last=False),
                     dict(order="confidence", temperature=1.0, top_p=1e-6)):  # fmt: skip
        limit = torch.ones_like(quota) if "threshold" in settings else quota
        generators = [(torch.Generator().manual_seed(1), len(logits))]
        token, kept = small.call(fill, logits=logits, group=group, entry=entry, quota=limit, pad=pad,
                                 config=SampleConfig(**settings), generators=generators)  # fmt: skip
        if not torch.equal(token, logits.argmax(-1)):
            found["the likeliest token of each slot"] = token
        name = ", ".join(f"{key} {value}" for key, value in settings.items())
        found[name] = [kept[group == n].tolist() for n in range(int(group.max()) + 1)]
    return found


def draw_plan(expected, came):
    """Plans as text, where they differ."""
    name = next(key for key in expected if expected[key] != came[key])
    row = lambda table: " ".join(piece.strip() for piece in table[name]["plan"])
    same = row(expected) == row(came)
    return (
        f"{name}: the plan is right, {row(came)}" if same else f"{name}\nexpected {row(expected)}\n    came {row(came)}"
    )


@check(
    points=15,
    idea="a plan is written into rounds and layout token by token; what the grammar forces takes no pass",
    draw=draw_plan,
)
def plan_by_hand(rng, size):
    return {
        f"at most {limit} tokens": by_hand.planned(rng, limit, 1 + size) for limit in (12 + 4 * size, 40 + 30 * size)
    }


def draw_layout(expected, came):
    """The scaffold's tokens, masks in a row as one."""
    name = next(key for key in expected if expected[key] != came[key])
    text = lambda table: " ".join(piece.strip() for piece in table[name]["tokens"])
    row = lambda table: re.sub(r"\[MASK\]( \[MASK\])+", lambda run: f"[MASK] x {run[0].count('[')}", text(table))
    return f"{name}\nexpected {row(expected)}\n    came {row(came)}"


@check(
    points=10,
    idea="each topic becomes a span: its tags, its topic, and length x unit x length_scale slots of [MASK]",
    draw=draw_layout,
)
def scaffold_of_a_plan(rng, size):
    tokenizer, found = small.tokenizer(), {}
    for repeat, scale in ((True, 1.0), (False, 1.0), (True, float(rng.choice([0.3, 0.5, 1.1, 2.5])))):
        answer, phase = by_hand.begun(tokenizer, repeat_topic=repeat, length_scale=scale, max_tokens=400)
        for name in (names := rng.permutation(["otter", "the food", "river animal", "a den"])[: 1 + size].tolist()):
            phase = by_hand.wished(phase, name, int(rng.integers(1, 5)))
        for token in (tokenizer.topic, *tokenizer.encode(names[0]), tokenizer.length_id(2)):  # again: it is taken back
            phase = phase.write(token)
        first = len(answer.layout)
        phase = phase.write(tokenizer.eos)
        y = answer.layout
        found[f"repeat_topic {repeat}, length_scale {scale}, unit {tokenizer.unit}"] = {
            "tokens": small.names(y.token[first:], tokenizer),
            "kinds": y.kind[first:], "prefix": y.prefix[first:], "begin": y.begin[first:], "end": y.end[first:],
            "spans": [[*span] for span in answer.rounds[0].spans],
            "next phase": type(phase).__name__,
        }  # fmt: skip
    return found


def draw_order(expected, came):
    """When each slot was filled."""
    name = next(key for key in expected if expected[key] != came[key])
    lines = [f"{name}: the pass in which each slot is filled, a line per span"]
    row = lambda steps: " ".join(f"{step:2}" for step in steps)
    for n, (e, c) in enumerate(zip(expected[name]["filled in pass"], came[name]["filled in pass"])):
        lines += [f"span {n}: expected {row(e)}", f"            came {row(c)}" + "  <-" * (e != c)]
    return "\n".join(lines)


@check(
    points=15,
    idea="after step s of S, ceil(n s / S) of each span's own n slots are filled, at least one per pass; only "
    "unfinished spans are computed",
    draw=draw_order,
)
def passes_by_hand(rng, size):
    tokenizer, found = small.tokenizer(), {}
    for settings in (dict(steps_ratio=float(rng.choice([0.3, 0.5, 0.8]))), dict(threshold=0.8),
                     dict(steps_ratio=0.5, threshold=0.9)):  # fmt: skip
        answer, phase = by_hand.begun(tokenizer, max_tokens=400, **settings)
        for name, length in zip("abcdefgh", (3, 1, *(int(n) for n in rng.integers(1, 5, size)))):
            phase = by_hand.wished(phase, f"food {name}", length)
        phase = phase.write(tokenizer.eos)
        slots = [answer.slots(span) for span in answer.rounds[0].spans]
        sure = {i: rng.random() for i in sum(slots, [])}  # as if the network had said so
        phase, passes, filled = by_hand.denoised(phase, sure, settings.get("threshold"))
        found[", ".join(f"{key} {value}" for key, value in settings.items())] = {
            "filled in pass": [[filled.get(i, 0) for i in entries] for entries in slots],
            "passes": passes,
            "cached": answer.cached,
            "counted": {"denoise_passes": answer.denoise_passes, "critical_path": answer.critical_path},
            "the answer ends": phase is None,
        }
    return found


def recorded(model, tokenizer, settings, prompt):
    """An answer, and of each of its passes the stage, what it computes, and its largest error.

    The error is that of the hidden states that are read, against those of a pass over everything without a cache.
    """
    from config import SampleConfig
    from masks import SLOT
    from sample import Passes, Sampler

    passes = []

    class Recorder(Passes):
        def forward(self, layouts, entries, readings, rows):
            hidden = super().forward(layouts, entries, readings, rows)
            read = [entry for reading in readings[0] for entry in reading.entries]
            fresh = small.without_cache(self.model, layouts[0])[read]
            stage = "spans" if layouts[0].kind[read[0]] == SLOT else "plan"
            error = float((hidden[0, : len(read)] - fresh).abs().max())
            passes.append({"stage": stage, "computes": small.ranges_of(entries[0]), "error": error})
            return hidden

    sampler = Sampler(model, tokenizer, SampleConfig(**settings))
    sampler.passes = Recorder(model)
    return sampler.answer([prompt])[0], passes


@check(
    points=15,
    idea="the cache holds what a fresh pass would compute: the pass that reads <sync/> computes the finished spans "
    "once more, and nothing else is computed twice",
    draw=by_hand.draw_passes,
    seconds=40,
)
def exact_cache(rng, size):
    tokenizer = small.tokenizer()
    for _ in range(20):
        model = small.planner(rng, tokenizer)
        (prompt,) = small.prompts(rng, 1)
        settings = dict(max_tokens=40 + 40 * size, steps_ratio=float(rng.choice([0.3, 0.5, 1.0])))
        answer, passes = recorded(model, tokenizer, settings, prompt)
        if any(round_.spans for round_ in answer.rounds[:-1]):
            break  # a round after spans: what the test is about
    y = answer.layout
    return {
        "passes": passes,
        "tokens": small.names(y.token, tokenizer),
        "counted": {name: getattr(answer, name) for name in COSTS},
    }


@check(points=10, idea="with a trained model: plan, spans and costs are those of the rules, step by step", seconds=60)
def shipped_model(rng, size):
    import random

    from config import SampleConfig
    from data.tasks.families import build_world, facts, lookups
    from sample import Sampler

    draws = random.Random(int(rng.integers(1 << 30)))
    family = (facts, lookups)[int(rng.integers(2))] if size > 1 else facts
    ask = family(draws, build_world(0, "test")).prompt
    settings = [dict(steps_ratio=0.5), dict(threshold=0.9)]
    found = {}
    for given in settings:
        sampler = Sampler.load("checkpoints/tasks/planned.safetensors", SampleConfig(**given))
        result = sampler.answer([ask])[0].result()
        costs = {name: result[name] for name in (*COSTS, "content_tokens", "pads")}
        found[str(given)] = {"answer": result["tagged"], **costs}
    return found


WRONG = (
    Wrong("certainty the wrong way round", "unmask.py", "order = sure.argsort(descending=True, stable=True)",
          "order = sure.argsort(stable=True)", ("rank_in_group", "slots_kept")),
    Wrong("entropy without its sign", "unmask.py", "return torch.linalg.vecdot(probs,",
          "return -torch.linalg.vecdot(probs,", ("certainty_of_slots", "slots_kept")),
    Wrong("certainty of what is drawn from", "unmask.py", "    probs = torch.softmax(logits, dim=-1)\n",
          "    probs = probabilities(logits, config) if config.temperature else torch.softmax(logits, dim=-1)\n",
          "certainty_of_slots"),
    Wrong("one ranking for all groups", "unmask.py", "order = order[group[order].argsort(stable=True)]", "pass",
          ("rank_in_group", "slots_kept")),
    Wrong("a threshold that holds slots back", "unmask.py", "kept |= sure >=", "kept &= sure >=", "slots_kept"),
    Wrong("both neighbours with the same token", "unmask.py", "if config.apart:", "if False:", "slots_kept"),
    Wrong("[PAD] before its text", "unmask.py", "if config.pads_last:", "if False:", "slots_kept"),
    Wrong("a place left empty by a neighbour", "unmask.py", "ranks(sure.where(~waits, -torch.inf), group)",
          "ranks(sure, group)", "slots_kept"),
    Wrong("stale cache after sync", "decode.py", "self.answer.cached, self.step = self.first, self.step + 1",
          "self.answer.cached, self.step = len(self.layout), self.step + 1", "exact_cache"),
    Wrong("quota over the round", "decode.py", "return [slots for _, slots in self.unfinished]",
          "return [[i for _, slots in self.unfinished for i in slots]]", "passes_by_hand"),
    Wrong("quota rounded down", "decode.py", "math.ceil(size * self.step / self.steps)",
          "size * self.step // self.steps", "passes_by_hand"),
    Wrong("quota per pass instead of in all", "decode.py", "share - (size - left)", "math.ceil(size / self.steps) if self.steps else 0",
          "passes_by_hand"),
    Wrong("short spans wait for long ones", "decode.py", "return max(1, share", "return max(self.steps == 0 or self.config.threshold > 0, share",
          "passes_by_hand"),
    Wrong("finished spans go on", "decode.py", "        self.retire(unfinished)\n", "", "passes_by_hand"),
    Wrong("plan computed by every pass", "decode.py", "return [*range(self.answer.cached, self.first), *(",
          "return [*range(0, self.first), *(", ("passes_by_hand", "exact_cache")),
    Wrong("forced tokens take a pass", "decode.py", "while phase is self and self.config.constrained and (",
          "while False and (", ("plan_by_hand", "exact_cache")),
    Wrong("forced tokens are free on the critical path", "decode.py",
          "            self.answer.critical_path += 1\n            phase = self.write(forced)",
          "            phase = self.write(forced)", ("plan_by_hand", "exact_cache")),
    Wrong("cut not noted", "decode.py", "answer.cut |= self.config.constrained and", "answer.cut |= False and",
          "plan_by_hand"),
    Wrong("a topic comes twice", "decode.py", "and answer.grammar.repeats(token):", "and False:", "scaffold_of_a_plan"),
    Wrong("sync belongs to the old round", "decode.py", "write([answer.tokenizer.sync], PLAN, len(answer.rounds))",
          "write([answer.tokenizer.sync], PLAN, len(answer.rounds) - 1)", "plan_by_hand"),
    Wrong("names of topics are text", "decode.py", "(round_.topics[-1].name if round_.topics else round_.text)",
          "round_.text", ("plan_by_hand", "scaffold_of_a_plan")),
    Wrong("length in tokens", "decode.py", "span_slots(topic.length, unit,", "span_slots(topic.length, 1,",
          "scaffold_of_a_plan"),
    Wrong("topic not repeated", "decode.py", "(topic.name if repeat else [], ", "([], ", "scaffold_of_a_plan"),
)  # fmt: skip
