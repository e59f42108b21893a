"""Assignment 3: noising, the joint loss of plan and spans, and the ELBO."""

import small
from checks import Wrong, check, draw_rows

TITLE = "Noising, joint loss and ELBO"
HOURS = "6 to 8"
TESTS_TAKE = 0.5
FUNCTIONS = {
    "noise.py": ("Sequence.__init__", "Sequence.stop", "Sequence.targets_in", "make_batch", "noise_levels", "pad"),
    "loss.py": ("JointLoss.forward", "counts", "validate.sums"),
}
HANDOUT = """
Planned diffusion trains one network on two tasks at once: to predict the next token of plan and text, and to restore
the masked slots of spans. You write what is masked, what is predicted, how it is weighed, and the bound on the
likelihood that evaluation reports. Most bugs in such code do not crash: the loss falls, and the samples are bad. So
each test here is one such bug.

## Read

1. README.md, "The method", the paragraphs on mask and loss.
2. minimal.py: `make_batch` and `joint_loss`, the naive version of what you write.
3. [MDLM](https://arxiv.org/abs/2406.07524), section 3 up to equation 10: where 1/t comes from.
4. masks.py: the columns of `Layout`, and the four kinds of token.
5. noise.py and loss.py: all docstrings, and the code of `Batch.places`, `Piece`, `validate` and `validation_rounds`,
   which are given. So is `Arrange`, which decides what a row of a batch holds. It knows causal spans, and its subclass
   in drafting/training.py drafts (assignment 5); you only pass `causal` on.

## Build, in this order

**`Sequence.__init__`** turns the lists of a `Layout` into arrays of int64, with these attributes:

| attribute | shape | what it is |
|---|---|---|
| `token`, `kind`, `round`, `position` | (n,) | the layout's columns |
| `ranges` | (n, 3) | prefix, begin, end |
| `span` | (n,) | the number of the span in the sequence: 0, 1, ... over all rounds; -1 outside spans |
| `attention`, `n_rounds` | | the layout's attention (a text), and how many rounds there are |
| `next` | (n,) | the target of a token that predicts the next token of plan or text, IGNORE elsewhere |

Which tokens predict the next one: the prompt's last token, and each of kind PLAN. What follows an `</topic>` may be a
hundred slots away. The last token of the sequence predicts nothing.

**`Sequence.stop`, `Sequence.targets_in`**: a line or two each. What is predicted in a round: its slots, and its
tokens that have a `next`.

**`pad`** puts the `Piece`s of several sequences into arrays of one width. Padding holds [PAD] at position 0, predicts
nothing, belongs to `Term.PLAN`, and sees the key 0 alone. All weights are 1 for now, in float32. It returns the batch
(of arrays; `make_batch` makes tensors of them with `batch.map`), and the group of each slot, -1 where there is none,
made different from row to row.

**`make_batch`** and **`noise_levels`**: call `arrange` (without one, `Arrange()`) for each sequence and `pad` for all.
Then noise all tokens whose term is `Term.SPAN`. Each group among them draws one t (`noise_levels`). Stratified means:
of n groups, one has its t in (0, 1/n], one in (1/n, 2/n], and so on, in random order. With `t_min`, this is moved into
(t_min, 1]. A [PAD] is a token like any other: to learn where a span ends, the model has to restore it. Masked slots
predict their original token, the others nothing. Which of them draws its random numbers first is up to you.

**`JointLoss.forward`** returns five sums, one per `Term`. `batch.places` says where something is predicted, and over
which tokens. What is the weight of a token of the plan?

**`counts`** says what each sum is divided by. For the weight "elbo" the span's sum is divided by all slots, masked or
not.

**`sums`** in `validate`: the losses of all rounds of all sequences, added up, and how many targets they have, with the
weight "elbo". `validate` calls it once per noising and makes means of it. Set the targets of other terms than `terms`
to IGNORE, which saves their logits. The plan's part is exact, so each of its tokens has to count once: only the row
that trains a sequence's last round, which holds the plans of all rounds, keeps its targets.

## Hints, in steps

1. `next`: the tokens of kind PLAN in their order are a text of their own. Who comes before each of them in that text?
2. `make_batch`: `np.unique(..., return_inverse=True)` numbers the groups. A batch may have no group at all: an
   autoregressive model learns text alone.
3. (permutation of 0..n-1 + a uniform draw) / n is stratified. Why is it better to subtract the draw from n? Look at
   the half-open interval, and at the weight 1/t.
4. `weight`: where does 1/t belong, and where must it not appear? docs/differences.md names a bug.
5. `forward`: compute logits only where something is predicted. For slots `self.model.logits(hidden,
   self.slot_tokens)`. Cross-entropies in float32.
6. A sum over a term: `torch.where(term == number, loss, 0).sum()`.
7. `sums`: `validation_rounds` gives all rounds of all sequences. `torch.isin(noised.term, torch.tensor(terms))` says
   which targets are of these terms. Move the batch by `noised.to(device)`, and what `loss` returns back to the CPU.
8. `span`: `np.unique(..., axis=1, return_inverse=True)` numbers pairs (round, number of the span in it).
"""


def layout(rng, tok, rounds=(2, 1, 0)):
    """A random layout with so many spans in its rounds."""
    from masks import encode_example

    return encode_example(small.example(rng, tok, rounds), tok)


def sequences(rng, tok, n, **more):
    from noise import Sequence

    return [Sequence(layout(rng, tok, **more)) for _ in range(n)]


def batches(rng, tok, size, n=8, **more):
    """Layouts with the rounds to train, and what `make_batch` makes of them: lists (layout, round, row of columns)."""
    from noise import Sequence, make_batch

    layouts = [layout(rng, tok) for _ in range(n * size)]
    rounds = [int(r) for r in rng.integers(0, 3, n * size)]
    batch = make_batch([Sequence(x) for x in layouts], rounds, tok, rng, **more)
    columns = [getattr(batch, name).numpy() for name in ("token", "target", "weight")]
    return [(x, r, *(column[b] for column in columns)) for b, (x, r) in enumerate(zip(layouts, rounds))]


def model(tok, seed, std=0.3):
    """A small random transformer of some opinion."""
    import torch

    from model import ModelConfig, Transformer

    torch.manual_seed(seed)
    made = Transformer(ModelConfig(tok.vocab_size, n_layer=1, d_model=16, n_head=2, n_kv_head=1, d_ff=16))
    for p in made.parameters():
        torch.nn.init.normal_(p, std=std) if p.ndim == 2 else torch.nn.init.ones_(p)
    return made.eval().requires_grad_(False)


@check(points=15, idea="plan and text predict the next token of plan or text, shifted by one: the spans are skipped",
       draw=draw_rows)  # fmt: skip
def shift(rng, size):
    from noise import IGNORE

    tok = small.tokenizer()
    (s,) = sequences(rng, tok, 1, rounds=(2, 1, 0, 3)[: size + 1])
    following = ["-" if i == IGNORE else tok.name(i) for i in s.next.tolist()]
    columns = {"names": [tok.name(i) for i in s.token.tolist()], "next": following, "span": s.span.tolist()}
    stops = [[s.stop(r), s.targets_in(r)] for r in range(s.n_rounds)]
    return {**columns, "stop, targets of a round": stops, "ranges": s.ranges.tolist()}


@check(points=10, idea="padding predicts nothing, sees the first token alone, and no two rows share a group of slots",
       draw=draw_rows)  # fmt: skip
def padding(rng, size):
    import numpy as np

    from noise import Piece, Term, pad

    tok, rows = small.tokenizer(), []
    for n in rng.integers(3, 6, 1 + size).tolist():
        column = lambda high, *more: rng.integers(0, high, (n, *more))
        term = column(2)
        rows.append(
            Piece(column(tok.pad), column(9), column(n, 3), column(9), term, np.where(term == Term.SPAN, 7, -1))
        )
    batch, group = pad(rows, tok)
    slots = batch.term == Term.SPAN
    facts = {name: getattr(batch, name).reshape(-1).tolist() for name in ("token", "target", "term", "weight")}
    seen = batch.ranges.reshape(-1, 3).tolist()
    groups = [len(set(group[b][slots[b]].tolist())) for b in range(len(rows))]
    shared = len(set(group[slots].tolist())) < sum(groups)
    return {**facts, "ranges": seen, "n_tokens": batch.n_tokens, "groups of each row": groups, "rows share one": shared}


@check(points=15, idea="earlier rounds are clean context: only slots of the round that is trained are noised")
def history(rng, size):
    from masks import SLOT

    tok = small.tokenizer()
    wrong = {"noised slots of earlier rounds": 0, "noised tokens that are no slots": 0, "tokens of later rounds": 0,
             "tokens that became something else than [MASK]": 0}  # fmt: skip
    noised = 0
    for clean, round_, token, *_ in batches(rng, tok, 2 * size):
        for i, original in enumerate(clean.token[: len(token)]):
            new = int(token[i])
            noised += new != original and clean.round[i] <= round_
            if clean.round[i] > round_:
                wrong["tokens of later rounds"] += new != tok.pad
            elif new != original:
                wrong["noised slots of earlier rounds"] += clean.kind[i] == SLOT and clean.round[i] < round_
                wrong["noised tokens that are no slots"] += clean.kind[i] != SLOT
                wrong["tokens that became something else than [MASK]"] += new != tok.mask
    return {**wrong, "some slots are noised": noised > 0}


@check(points=15, idea="a masked slot predicts its own original token, unshifted, [PAD] like any other; others nothing")
def slots(rng, size):
    from masks import SLOT
    from noise import IGNORE

    tok = small.tokenizer()
    wrong = {"masked slots that predict another token": 0, "slots not masked that predict something": 0}
    masked = {"text": [], "[PAD]": []}
    for clean, round_, token, target, _ in batches(rng, tok, 8 * size):
        for i in range(min(len(token), len(clean))):
            if clean.kind[i] == SLOT and clean.round[i] == round_:
                is_masked = token[i] == tok.mask
                masked["[PAD]" if clean.token[i] == tok.pad else "text"].append(is_masked)
                wrong["masked slots that predict another token"] += is_masked and target[i] != clean.token[i]
                wrong["slots not masked that predict something"] += not is_masked and target[i] != IGNORE
    some = {f"some {name} slots are masked, and some not": 0.2 < sum(m) / len(m) < 0.8 for name, m in masked.items()}
    return {**wrong, **some}


@check(points=10, idea="each span draws a t of its own, stratified; its slots weigh 1/t (or 1 if uniform), all else 1")
def levels(rng, size):
    from unittest import mock

    import numpy as np

    import noise
    from masks import SLOT

    tok, found, drawn = small.tokenizer(), {}, noise.noise_levels
    for name, settings in {"elbo": {}, "t_min": {"t_min": 0.5}, "uniform": {"weight": "uniform"}}.items():
        schedule = [np.sort(column) for column in drawn(100_000, settings.get("t_min", 0.0), rng)]
        t, masked, others = [], [], set()  # masked: (t, how much more often than t says) of each slot
        with mock.patch.object(noise, "noise_levels", lambda *given: 2 * drawn(*given)[:1]):  # a slot weighs its t
            rows = batches(rng, tok, 6 * size, **settings)
        for clean, round_, token, _, weight in rows:
            inside = [clean.kind[i] == SLOT and clean.round[i] == round_ for i in range(min(len(token), len(clean)))]
            for number in range(3):
                mine = [i for i, x in enumerate(inside) if x and clean.span[i] == number]
                t += [float(weight[i]) for i in mine[:1]]
                masked += [(t[-1], (token[i] == tok.mask) - t[-1]) for i in mine]
                others |= {"weights differ within a span" for i in mine if weight[i] != weight[mine[0]]}
            others |= {float(weight[i]) for i, x in enumerate(inside) if not x}
        parts = np.array_split(schedule[0], len(t))
        in_parts = [part[0] - 1e-3 <= x <= part[-1] + 1e-3 for part, x in zip(parts, sorted(t))]
        found[name] = {"weights of all else": sorted(map(str, others))[:5], "one t in each of n parts": all(in_parts),
                       "t, and weights, of noise_levels": [x[9_999:-1:10_000].tolist() for x in schedule]}  # fmt: skip
        if name == "elbo":
            more, rising = (abs(sum(x * (t - 0.5) ** k for t, x in masked)) / len(masked) for k in (0, 1))
            found[name]["each masked with probability t"] = more < 0.12 and rising < 0.03
    return found


@check(points=15, idea="the sums: 1/t weighs slots alone, never the plan; slots predict text or [PAD], never a tag")
def sums(rng, size):
    import numpy as np
    import torch

    from loss import JointLoss, counts
    from noise import IGNORE, Batch, Term

    tok, shape = small.tokenizer(), (2, 12 * size)
    draw = lambda high: torch.from_numpy(rng.integers(0, high, shape))
    term = draw(len(Term))
    in_text = (term == Term.PLAN) | (term == Term.PLAN_DRAFT)
    target = torch.where(in_text, draw(tok.vocab_size), draw(tok.pad + 1)).where(draw(3) > 0, IGNORE)
    weight = torch.where(in_text | (term == Term.SPAN), 1 + draw(9), 1).float()
    position = torch.arange(shape[1]).expand(shape)
    ranges = torch.stack([position + 1, position * 0, position * 0], -1)
    batch = Batch(draw(tok.vocab_size), position, ranges, target, term, weight, int(np.prod(shape)))
    loss = JointLoss(model(tok, size), tok.pad + 1)(batch)
    names = [t.name.lower() for t in Term]
    table = {"names": names, "sum": loss.tolist()}
    return table | {f"counts, {w}": counts(batch, w).tolist() for w in ("uniform", "elbo")}


@check(
    points=5,
    idea="what is read left to right has an exact likelihood: each token counts once, though rounds overlap",
    tolerance=1e-4,
)
def plan_nll(rng, size):
    from loss import JointLoss, validate

    tok = small.tokenizer()
    loss, some = JointLoss(model(tok, 0, std=1.0), tok.pad + 1), sequences(rng, tok, 5 * size)
    read = validate(loss, some, tok, batch=4, causal=1.0)
    return {"plan": validate(loss, some, tok, batch=4)["plan"], "beside spans read left to right": read["plan"],
            "these spans": read.get("causal")}  # fmt: skip


@check(points=10, idea="weighted by 1/t and divided by all slots, the span loss is the negative ELBO", tolerance=0.3)
def elbo(rng, size):
    import torch

    from loss import JointLoss, validate
    from noise import Term

    def constant(batch):  # a loss of 3.5 for each slot, masked or not
        slots = (batch.term == Term.SPAN).sum()
        return torch.tensor([3.5 * slots if term == Term.SPAN else 2.0 for term in Term])

    tok = small.tokenizer()
    some = sequences(rng, tok, 4 * size, rounds=(2, 1))
    per_slot = validate(constant, some, tok, draws=3, batch=3)
    found = {"3.5 per slot gives": "{span:.3f}, with an error of {span_error:.3f}".format(**per_slot)}
    some = sequences(rng, tok, 1, rounds=(2, 1)) * 32
    losses = validate(JointLoss(model(tok, 1), tok.pad + 1), some, tok, draws=6, batch=32)
    return {**found, "a random model's": losses["span"], "its error is not 0": losses["span_error"] > 0}


WRONG = (
    Wrong("missing shift", "noise.py",
          "self.next[before] = self.token[written]", "self.next[written] = self.token[written]", loses="shift"),
    Wrong("noised history", "noise.py",
          "rows = [arrange(s, r, tokenizer, rng, history, causal)",
          'rows = [arrange(s, r, tokenizer, rng, "noised", causal)', loses="history"),
    Wrong("masked slots predict the next token", "noise.py",
          "np.where(masked, batch.token[slots], IGNORE)", "np.where(masked, np.roll(batch.token[slots], -1), IGNORE)",
          loses="slots"),
    Wrong("PAD excluded from the loss", "noise.py",
          "masked = rng.random(len(rate)) < rate",
          "masked = (rng.random(len(rate)) < rate) & (batch.token[slots] != tokenizer.pad)",
          loses="slots"),
    Wrong("one noise level for the whole batch", "noise.py",
          "_, draw = np.unique(group[slots], return_inverse=True)", "draw = 0 * group[slots]", loses="levels"),
    Wrong("half of the slots are masked whatever t", "noise.py",
          "masked = rng.random(len(rate)) < rate", "masked = rng.random(len(rate)) < 0.5", loses="levels"),
    Wrong("1 over t missing", "noise.py",
          'elbo_weight if weight == "elbo" else 1', "1", loses=("levels", "elbo")),
    Wrong("1 over t on the plan loss", "loss.py",
          "loss = torch.cat([any_loss, slot_loss * batch.weight.flatten()[slot_token]])",
          "loss = torch.cat([any_loss, slot_loss]) * batch.weight.flatten()[torch.cat(batch.places)]", loses="sums"),
    Wrong("slots may predict tags", "loss.py",
          "self.model.logits(hidden[slot_token], self.slot_tokens)", "self.model.logits(hidden[slot_token])",
          loses="sums"),
    Wrong("divided by masked slots alone", "loss.py",
          'targets[Term.SPAN] = (batch.term == Term.SPAN).sum()', "pass", loses=("sums", "elbo")),
    Wrong("padding sees nothing", "noise.py",
          "np.tile([1, 0, 0], (*shape, 1))", "np.tile([0, 0, 0], (*shape, 1))", loses="padding"),
    Wrong("the plan counts once per round", "loss.py",
          " | (noised.term == Term.PLAN) & ~last[:, None]", "", loses="plan_nll"),
)  # fmt: skip
