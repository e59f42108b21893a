"""Assignment 5: drafting ahead and checking, or a way of decoding of one's own; judged on a small frontier."""

import small
from checks import Wrong, check

TITLE = "Fewer passes for the same text"
HOURS = 12
TESTS_TAKE = 1
WRITTEN = 20
FUNCTIONS = {
    "drafting/decoding.py": ("check_drafts", "residual", "DraftStream.entries", "DraftStream.readings",
                             "DraftStream.checked", "DraftedPlan.prepare", "DraftedExtend.prepare"),
}  # fmt: skip
HANDOUT = """
Text that is written left to right takes a pass per token, although on a GPU a pass over ten tokens costs hardly more
than a pass over one. So guess: let the model draft the next tokens, and check them all in its next pass. What is
written must be *exactly* what one token per pass would have written: at temperature 0 the same text, above it a draw
from the same distribution. Then measure what that saves, or what another way of decoding saves that you invent.

## Read first (an hour)

1. docs/drafting.md down to "Training". Know what a stream, a draft and a draft slot are.
2. [Leviathan et al. 2023](https://arxiv.org/abs/2211.17192), sections 2.1 to 2.3 and appendix A.1.
3. What works without drafts, one token per pass: in `decode.py` `Reading`, `Reply`, `Phase` and `WrittenPlan`, in
   `methods.py` `Stream` and `Extend`.
4. `sample.py`: `Sampler.step`. Before a pass `prepare` is called, then `entries` and `readings`. The phase's `draw`
   picks tokens from the logits, and `take` gets them as replies.
5. `drafting/decoding.py`, all of it: the same phases with drafts.

With pencil and paper: the model says p = (0.5, 0.3, 0.2), the draft is drawn from q = (0.2, 0.7, 0.1). How often is a
draft accepted? What is a rejected one replaced by, with which probabilities? Add up how often token 1 is written.
(Hint 2.)

## Build, in this order

**Step 1: a stream, by hand** (`DraftStream.entries`, `readings`, `checked`). No network takes part. Let a stream have
`known` tokens, `drafts` after them, and `slots` draft slots after those.

- Which entries does the next pass compute, and what does it read? First a reading per check: its `draft` is the token
  that is checked, `draft_probs` what that was drawn from (`probs`). Where no draft follows, to read the model's own
  next token, it is -1. Then a reading per draft slot, numbered 1, 2, ... by `ahead`.
- `checked`: drafts are right up to the first that was not kept; there the model's own token follows. Of a draft slot
  `kept` says whether it and those before it are confident enough together (`draw_checked` has decided that). What they
  predict is worth something only if all drafts were right. A new draft's `probs` is the `drawn_from` of its reading.
- Several streams share one iterator of replies: take off as many as your readings were, and no more.
- `cached`: which entries hold keys and values of tokens that turned out right? The model's own new token was never
  computed.
- Of an answer, `drafted` counts the drafts that were checked and `accepted` those that were right, as far as `counted`
  says so.

**Step 2: drafts at temperature 0.** First the easy half of `check_drafts`. `DraftedPlan.prepare` writes drafts and then
`[MASK]` draft slots into the layout, behind what is known; `take` cuts them off again. `DraftedExtend.prepare` puts
drafts in slots of its spans, where the `[MASK]` that follow serve as draft slots. Then this answers:

    python sample.py --checkpoint checkpoints/tasks/joint.safetensors --decode parallel-ar --ahead 8 \\
      --prompt "Tell me about the food of Brivok."

- A draft that the grammar forbids is dropped, with all after it. Where the grammar leaves one token, that token is
  the draft, whatever the model drafted, and does not count as one (`counted`).
- `ends`: after a draft that ends the stream (`<sync/>`, `<eos>`; in spans `[PAD]` or the last slot) there is nothing
  to read. Drafts behind it are dropped, and it is not computed either: nobody looks at its prediction.
- Draft slots: `n_slots()` in a plan, `ahead` in a span, but no more than there is room for, in the answer
  (`max_length`) or in the span; none where the stream ends.
- A plan's drafts come from `proposed()`: those of its stream or, in speculative decoding, of a second model
  (measure/speculate.py).
- `self.grammars` of a plan: the grammar before each draft and after the last, for `readings`. `copy` it before you go
  on.

**Step 3: above temperature 0.** `residual`, and the rest of `check_drafts`. Rows without a draft have `draft` -1 and
a q of zeros: they are the same formula. Tokens that the grammar forbids have logits of minus infinity and so p = 0.
`DraftedPlan.prepare` sets their q (`stream.probs`, None at temperature 0) to 0 as well: drafts of such tokens are
dropped unchecked, so no draft that is checked is one of them. So q need not sum to 1.

**Step 4: measure, and write two pages (20 points).** Choose one.

*A. Drafting on a frontier.* How much does drafting save, where, and at what price? Run

    python data/tasks/prepare.py
    python measure/eval.py --checkpoint checkpoints/tasks/joint.safetensors --decode parallel-ar --ahead 4 \\
      --limit 70 --draws 1 --json

for K (`--ahead`) of 0, 1, 2, 4, 8 and 16, decoded as `parallel-ar` and as `planned` with `--threshold 0.9`; also at
temperature 1, and with recipes (`checkpoints/recipes/joint.safetensors --data data/recipes`, after `python
data/recipes/prepare.py`) for three K. Half a minute to two minutes each on one core.

*B. A way of decoding of your own.* A subclass of `Phase` in a new file, and a script that samples with it. Ideas: fill
a slot only if its neighbours are filled or it is very certain; re-mask the least certain slots once; take more steps
for long spans; start denoising a span while the plan is still being written; draft spans by denoising and check them
left to right. Compare it with `planned` at five or more settings on 70 or more prompts, with the same checkpoint. A way
that loses is as good as one that wins, if you can say why.

In option B no other file has to change: load a sampler, and give it your phase by
`sampler.decoders = DECODERS | {"planned": Decoder(WrittenPlan, YourPhase)}`.

Hand in `report.md` or `report.pdf` with its plots, and the script that makes them:

1. A plot of quality against passes, one line per way of decoding, one point per setting, and the same against
   positions or seconds. Say which machine, how many threads, how many prompts.
2. Where on the lines would you work on a laptop, and where on a GPU that computes 500 positions as fast as one? Why?
3. Which tokens are drafted right, and which are not? Show one answer with its accepted and rejected drafts (A), or
   one in which your way fills other slots than `planned` (B).
4. The strongest objection to your own conclusion, and the experiment that would settle it.

## Hints

1. *Start with* `python course/grade.py --only stream_by_hand`: no network takes part, and its picture shows what is
   known, what is drafted, and what the model said.
2. *The pencil exercise.* Accepted: sum of min(p, q) = 0.2 + 0.3 + 0.1 = 0.6. Left of p - q: (0.3, 0, 0.1), so a
   rejected draft becomes token 0 with probability 3/4, token 2 with 1/4. Token 1: 0.7 * 0.3 / 0.7 + 0.4 * 0 = 0.3.
3. *Indices.* The prediction at entry known - 1 checks the first draft, which is number 0; the one at entry
   known - 1 + n checks draft n, or follows the last; a draft slot at entry e predicts what comes after e.
4. *The text differs only sometimes.* Was a draft compared with the prediction of its own entry instead of the one
   before? Does `cached` include a rejected draft? Is `[PAD]` followed by text? (A `KeyError` in `columns_read` means
   that a reading asks for an entry which the pass does not compute.)
5. *The text is right but takes as many passes as without drafts.* Are the new drafts kept by the stream? Does
   `DraftedPlan.prepare` start from them?
6. *The distribution is off by little.* Accept with `u * q < p`; where the grammar forbids a token that q allows, q
   must be normalised again.

## How the report is graded (20 points)

| points | for |
|---|---|
| 6 | plots that can be read alone: axes, units, settings, number of prompts; enough points to show a bend |
| 5 | a fair comparison: same checkpoint, prompts and threads; exactness checked, or quality given with its error |
| 5 | an explanation that the figures support: which tokens, which passes, which costs |
| 4 | the objection is a real one, and the experiment would settle it |

Half of the points for a result without its explanation; none off for a way that loses.
"""


def distributions(rng, n, vocabulary=6):
    """(n, V) random distributions p of a model and q of drafts, some equal, and some p with a forbidden token."""
    import torch

    p, q = (torch.from_numpy(1.5 * rng.standard_normal((n, vocabulary))).softmax(-1).float() for _ in "pq")
    p[1], q[2, 0], p[2, 0] = q[1], 0, 0
    return p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)


@check(points=8, idea="a rejected draft is replaced by a draw from max(0, p - q), normalised, not from p")
def residual_of(rng, size):
    from drafting.decoding import residual

    p, q = distributions(rng, 3 + size)
    left = residual(p.clone(), q.clone())
    return {"p": p, "q": q, "replaced by": left / left.sum(-1, keepdim=True)}


@check(
    points=8,
    idea="at temperature 0 a draft is right if it is the model's likeliest token, which is written in any case",
)
def greedy_check(rng, size):
    import torch

    from config import SampleConfig
    from drafting.decoding import check_drafts

    logits = torch.from_numpy(rng.standard_normal((6 * size, 9))).float()
    draft = torch.from_numpy(rng.integers(-1, 9, 6 * size))
    draft[::3] = logits.argmax(-1)[::3]
    token, accepted, _ = check_drafts(logits.clone(), draft, None, SampleConfig(ahead=2), [])
    return {"names": [f"draft {d}" for d in draft.tolist()], "token": token, "accepted": accepted}


def judged(counted, exact, n, limit):
    """Whether draws are distributed as they should be: "" or, where chi-square exceeds its limit, a table."""
    impossible = [key for key in counted if exact.get(key, 0) <= 1e-9]
    rare = {key for key, p in exact.items() if n * p < 10}  # too few for chi-square each: taken together
    rest = sum(exact[key] for key in rare)
    cells = [(counted.get(key, 0), p) for key, p in exact.items() if key not in rare]
    cells += [(sum(counted.get(key, 0) for key in rare), rest)] * (n * rest >= 10)
    chi_square = sum((came - n * p) ** 2 / (n * p) for came, p in cells)
    if chi_square <= limit and not impossible:
        return {"distributed as without drafts": True, "table": ""}
    rows = sorted(exact, key=lambda key: -abs(counted.get(key, 0) - n * exact[key]))[:8]
    table = [f"chi-square {chi_square:.0f}, expected below {limit}; the largest differences:"]
    table += [f"{key!s:>16}: expected {exact[key]:.3f} {'#' * round(40 * exact[key])}\n{'':>18}    came "
              f"{counted.get(key, 0) / n:.3f} {'#' * round(40 * counted.get(key, 0) / n)}" for key in rows]  # fmt: skip
    table += [f"{key!s:>16}: impossible, but came" for key in impossible[:3]]
    return {"distributed as without drafts": False, "table": "\n".join(table)}


def draw_table(expected, came):
    """The tables of `judged`."""
    return next(part["table"] for part in came.values() if part["table"])


@check(
    points=12,
    idea="accept a draft with probability min(1, p/q), else draw from the residual: tokens are distributed as p",
    draw=draw_table,
)
def draft_distribution(rng, size):
    import torch

    from config import SampleConfig
    from drafting.decoding import check_drafts

    n, found = 40_000, {}
    p, q = distributions(rng, 2 + size)
    for row in range(len(p)):
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 30)))
        draft = torch.multinomial(q[row], n, replacement=True, generator=generator)
        logits, probs = p[row].log().repeat(n, 1), q[row].repeat(n, 1)
        config = SampleConfig(temperature=1.0, ahead=1)
        token, accepted, _ = check_drafts(logits, draft, probs, config, [(generator, n)])
        name = f"p {[round(x, 2) for x in p[row].tolist()]}, q {[round(x, 2) for x in q[row].tolist()]}"
        counted = dict(enumerate(torch.bincount(token, minlength=6).tolist()))
        found[name + ": tokens"] = judged(
            {k: v for k, v in counted.items() if v}, dict(enumerate(p[row].tolist())), n, 40
        )
        right, yes = float(torch.minimum(p[row], q[row]).sum()), int(accepted.sum())
        counted = {"accepted": yes, "rejected": n - yes}
        found[name + ": drafts"] = judged({k: v for k, v in counted.items() if v},
                                          {"accepted": right, "rejected": 1 - right}, n, 25)  # fmt: skip
    return found


def draw_scene(expected, came):
    """The first scene in which they differ."""
    name = next(key for key in expected if expected[key] != came[key])
    e, c = expected[name], came[name]
    return "\n".join(
        [e["scene"], *(f"{key}: expected {e[key]}, came {c.get(key)}" for key in e if e[key] != c.get(key))]
    )


@check(
    points=12,
    idea="right drafts up to the first wrong one, then the model's own token; new drafts only if all were right",
    draw=draw_scene,
)
def stream_by_hand(rng, size):
    from types import SimpleNamespace

    from decode import Reply
    from drafting.decoding import DraftReading, DraftStream

    found = {}
    for number in range(6 + 4 * size):
        known = int(rng.integers(5, 20))
        stream, answer = DraftStream(known - int(rng.integers(1, 4)), known), SimpleNamespace(drafted=0, accepted=0)
        n, right, sure = int(rng.integers(0, 5)), int(rng.integers(0, 6)), int(rng.integers(0, 8))
        stream.drafts, stream.probs = [int(token) for token in rng.integers(97, 123, n)], [*range(n)]
        stream.counted, stream.ends = [bool(rng.integers(4)) for _ in range(n)], bool(n and rng.integers(4) == 0)
        stream.slots = 0 if stream.ends else int(rng.integers(0, 7))
        drafts, slots, cached = "".join(map(chr, stream.drafts)), stream.slots, stream.cached
        entries, readings = stream.entries(), stream.readings()
        checks = [Reply(None, [d if i < right else d - 32], [i < right]) for i, d in enumerate(stream.drafts)]
        checks += [Reply(None, [int(rng.integers(65, 91))], [False])] * (not stream.ends)
        made = [Reply(DraftReading([0], ahead=i + 1, drawn_from=f"q{i + 1}"), [int(rng.integers(97, 123))], [i < sure])
                for i in range(slots)]  # fmt: skip
        text = lambda replies: "".join(chr(reply.tokens[0]) for reply in replies)
        others = Reply(None, [0], [False])  # of the next stream
        replies = iter([*checks, *made, others])
        tokens, came_from = stream.checked(replies, answer)
        found[f"scene {number}"] = {
            "scene": f"known: entries 0-{known - 1}, cached {cached}; drafts '{drafts}'"
            + " (the last ends)" * stream.ends + f"; the model says '{text(checks)}'; {slots} draft slots: "
            f"'{text(made)}', kept '{text(reply for reply in made if reply.kept[0])}'",
            "entries": small.ranges_of(entries),
            "readings: entry, draft, what it was drawn from, ahead": [[*r.entries, r.draft, r.draft_probs, r.ahead]
                                                                      for r in readings],
            "tokens": "".join(map(chr, tokens)), "their replies": [r.tokens[0] for r in came_from],
            "next reply is the next stream's": next(replies, None) is others, "cached": stream.cached,
            "next drafts": "".join(map(chr, stream.drafts)), "drawn from": stream.probs,
            "drafted, accepted": [answer.drafted, answer.accepted],
        }  # fmt: skip
    return found


def draw_texts(expected, came):
    """The texts that differ, around the first token that does."""
    name = next(key for key in expected if expected[key] != came[key])
    e, c = expected[name]["text"], came[name]["text"]
    first = next((n for n, pair in enumerate(zip(e, c)) if pair[0] != pair[1]), min(len(e), len(c)))
    if e == c:
        costs = [f"{key} {expected[name][key]}, came {value}" for key, value in came[name].items() if key != "text"]
        return f"{name}: the text is right; passes and drafts: expected {'; '.join(costs)}"
    around = lambda text: " ".join(text[max(0, first - 6) : first + 6])
    return f"{name}: token {first} of the text differs\nexpected .. {around(e)} ..\n    came .. {around(c)} .."


@check(points=15, idea="with drafts the text is, token for token, the text without drafts", draw=draw_texts, seconds=60)
def same_text(rng, size):
    from config import MethodConfig, SampleConfig
    from sample import Sampler

    tokenizer, found = small.tokenizer(), {}
    model, prompts = small.planner(rng, tokenizer), small.prompts(rng, 2)
    for method in ("ar", "planned", "parallel-ar"):
        for ahead, limit in ((0, 24 + 8 * size), (1, 24 + 8 * size), (4, 24 + 8 * size), (4, 7)):
            config = SampleConfig(max_tokens=limit, ahead=ahead, steps_ratio=0.2)
            for n, answer in enumerate(Sampler(model, tokenizer, config, MethodConfig(method)).answer(prompts)):
                costs = ("plan_passes", "denoise_passes", "drafted", "accepted", "critical_path")
                found[f"{method}, {ahead} ahead, at most {limit} tokens, prompt {n}"] = {
                    "text": small.names(answer.layout.token, tokenizer), **{c: getattr(answer, c) for c in costs},
                }  # fmt: skip
    return found


@check(
    points=8, idea="right drafts save passes: a trained model writes the same answer in a fraction of them", seconds=60
)
def passes_saved(rng, size):
    import random

    from config import SampleConfig
    from data.tasks.families import build_world, facts
    from sample import Sampler

    draws, found = random.Random(int(rng.integers(1 << 30))), {}
    prompts = [facts(draws, build_world(0, "test")).prompt for _ in range(size)]
    for ahead in (0, 8):
        config = SampleConfig(decode="parallel-ar", ahead=ahead)
        for n, answer in enumerate(Sampler.load("checkpoints/tasks/joint.safetensors", config).answer(prompts)):
            costs = ("plan_passes", "denoise_passes", "drafted", "accepted")
            found[f"prompt {n}, {ahead} ahead"] = {c: getattr(answer, c) for c in costs} | {
                "answer": answer.result()["tagged"]
            }
    return found


@check(
    points=12,
    idea="above temperature 0 whole texts are distributed as without drafts (by enumeration of all short texts)",
    draw=draw_table,
    seconds=60,
)
def text_distribution(rng, size):
    from collections import Counter

    from config import MethodConfig, SampleConfig
    from sample import Sampler

    tokenizer, tokens, n, found = small.tokenizer(), [97, 98], 3000, {}
    for ahead in (1 + size,):
        model = small.bigrams(rng, tokenizer, [*tokens, tokenizer.eos])
        config = SampleConfig(temperature=1.0, max_tokens=4, ahead=ahead, seed=int(rng.integers(1 << 30)))
        answers = Sampler(model, tokenizer, config, MethodConfig("ar")).answer([""] * n)
        counted = Counter("".join(map(chr, answer.rounds[0].text)) for answer in answers)
        exact = small.enumerated(model, tokenizer.assistant, 1, tokens, tokenizer.eos, 3)
        found[f"{ahead} ahead"] = judged(counted, exact, n, 50)  # 14 degrees of freedom: once in 100,000 cases
    return found


WRONG = (
    Wrong("draft accepted without its residual draw", "drafting/decoding.py", "left = (p - q).clamp_min(0)", "left = p",
          ("residual_of", "draft_distribution", "text_distribution")),
    Wrong("draft accepted where the model likes it at least as much", "drafting/decoding.py",
          "(uniform(generators, p.device) * q.gather(1, at)[:, 0] < p.gather(1, at)[:, 0])",
          "(q.gather(1, at)[:, 0] <= p.gather(1, at)[:, 0])", ("draft_distribution", "text_distribution")),
    Wrong("every draft accepted", "drafting/decoding.py",
          "(uniform(generators, p.device) * q.gather(1, at)[:, 0] < p.gather(1, at)[:, 0])",
          "(p.gather(1, at)[:, 0] > 0)",
          ("draft_distribution", "text_distribution")),
    Wrong("one token too many", "drafting/decoding.py", "tokens, self.cached = self.drafts[:accepted] + own",
          "tokens, self.cached = self.drafts[: accepted + 1] + own", ("stream_by_hand", "same_text")),
    Wrong("drafts kept after a rejected one", "drafting/decoding.py", "for reply in made if all_right else []:",
          "for reply in made:", "stream_by_hand"),
    Wrong("rejected drafts stay in the cache", "drafting/decoding.py",
          "self.known + accepted - (all_right and self.ends)", "self.known + n_drafts - self.ends", "stream_by_hand"),
    Wrong("checked a token too late", "drafting/decoding.py", "DraftReading([self.known - 1 + n]",
          "DraftReading([self.known - (n == 0) + n]",
          "stream_by_hand"),
    Wrong("drafts that nobody is sure of", "drafting/decoding.py",
          "            if not reply.kept[0]:\n                break\n", "", "stream_by_hand"),
    Wrong("replies of dropped draft slots are left to the next stream", "drafting/decoding.py",
          "islice(replies, self.slots)", "islice(replies, self.slots * all(r.kept[0] for r in checks[:n_drafts]))",
          "stream_by_hand"),
    Wrong("drafts never used", "drafting/decoding.py", "in enumerate(proposed):", "in enumerate([]):",
          ("same_text", "passes_saved")),
    Wrong("forced tokens count as drafts", "drafting/decoding.py", "stream.counted.append(forced is None)",
          "stream.counted.append(True)", ("same_text", "passes_saved")),
)  # fmt: skip
