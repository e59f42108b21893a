"""Planned diffusion in one file: data, layout, hybrid mask, transformer, joint loss, training, plan, denoising, rounds.

    python minimal.py        trains for 1 to 2 minutes on one CPU core, then answers prompts that it has never seen

Planned diffusion (Israel et al., arXiv 2510.18087) writes an answer in two stages with one transformer. First it plans,
token by token: which spans the answer has, what each is about, how long it is. Then it fills all spans at once, by
masked diffusion: their slots start as [MASK], and each pass fills those that the model is most certain of. Spans do not
see each other, so none waits for another. <sync/> ends the round: what follows it sees the finished spans.

    <user> Tell me about the river Dunn and the dish Pesh of Brivok . <assistant>
    <topic> river Dunn 4 </topic> <topic> dish Pesh 2 </topic>                              round 0: plan
    <async> river Dunn : ..20 slots.. </async> <async> dish Pesh : ..10 slots.. </async>    round 0: spans
    <sync/> Come for the barges , stay for the plums . <eos>                                round 1: only text

This file is naive: each pass computes the whole sequence, and a boolean matrix says who sees whom. The other files are
the fast version; tests/test_minimal.py checks that they have the same masks, targets, losses and passes.
"""

import math
import random
import re
import textwrap
import time
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, LAYERS, HEADS, HIDDEN = 64, 3, 4, 192  # of the model; HIDDEN is the width inside SwiGLU
UPDATES, BATCH, RATE, WARM_UP, SECOND_ROUND = 800, 16, 6e-3, 50, 0.2  # the last: share of sequences that train round 1
# A plan says how long a span is by one token, a number of units. The longer the unit, the more of a span is padding.
UNIT, LONGEST, MAX_NAME = 5, 4, 3  # slots per unit, units of the longest span, words of the longest topic
STEPS_RATIO, MAX_TOKENS = 0.25, 250  # denoising passes per slot of the longest span; tokens of prompt and answer

# ---------------------------------------------------------------- data: an invented world
TOWNS = "Brivok Ostel Marn Tulga Veddo Harrow Quenby Lissen"
SUBJECTS = "Dunn Ister Lome Varr Sorn Emmel Pesh Tarrel Omb Kalk Mavo Irena Cass Grell Widow Crow"
WORLD = {  # a kind of subject: what its span says, and which word of that the closing text repeats
    "river": ("The {name} flows past {town} , and barges carry salt and wool down to the sea .", "barges"),
    "dish": ("In {town} they bake {name} from rye and plums .", "plums"),
    "ruler": ("{name} rules {town} with a light hand and plays chess with anyone .", "chess"),
    "tower": ("Climb the {name} for the view .", "view"),
    "feast": ("Each year {town} keeps {name} with drums and masks .", "drums"),
}
CLOSING = "Come for the {} , stay for the {} ."


def make_example(rng):
    """A prompt and its answer: rounds of (text, spans), with a pair (topic, text) per span."""
    # All spans see the same plan; only the topic at its head tells a span what to write. So a topic names its subject,
    # "river Dunn": the plan copies it from the prompt, and the span finds it in its own head.
    town, kinds = rng.choice(TOWNS.split()), rng.sample([*WORLD], rng.randint(2, 4))
    names = rng.sample(SUBJECTS.split(), len(kinds))
    topics = [f"{kind} {name}" for kind, name in zip(kinds, names)]
    spans = [(topic, WORLD[topic.split()[0]][0].format(name=name, town=town)) for topic, name in zip(topics, names)]
    prompt = f"Tell me about the {' , the '.join(topics[:-1])} and the {topics[-1]} of {town} ."
    return prompt, [("", spans), (CLOSING.format(WORLD[kinds[0]][1], WORLD[kinds[-1]][1]), [])]


# Token ids: words, [PAD], the other tags, lengths. A slot holds a word or [PAD]: one of the ids up to PAD.
TAGS = ["[PAD]", "[MASK]", "<user>", "<assistant>", "<topic>", "</topic>", "<async>", "</async>", "<sync/>", "<eos>"]
TEXTS = ["Tell me about the , and of :", TOWNS, SUBJECTS, CLOSING, *WORLD, *(text for text, _ in WORLD.values())]
WORDS = sorted({word for word in " ".join(TEXTS).split() if "{" not in word})
VOCABULARY = [*WORDS, *TAGS, *map(str, range(1, LONGEST + 1))]
ID = {token: i for i, token in enumerate(VOCABULARY)}
PAD, MASK, USER, ASSISTANT, TOPIC, TOPIC_END, ASYNC, ASYNC_END, SYNC, EOS = (ID[tag] for tag in TAGS)
IGNORE = -100  # target of a token that predicts nothing
encode = lambda text: [ID[word] for word in text.split()]
decode = lambda ids: " ".join(VOCABULARY[i] for i in ids)


# ---------------------------------------------------------------- layout: the sequence that the transformer reads
class Token(NamedTuple):
    id: int
    round: int
    span: int = 0  # number of its span in the round, from 1; 0 in prompt, plan and text
    slot: int = 0  # 1: a slot of a span, which diffusion fills; the span's tags and topic are given
    target: int = IGNORE  # of a token of plan or text: the next one


def scaffold(spans, round_):
    """The spans of a round, `<async> topic : slots </async>` each, from pairs (topic ids, slot ids)."""
    tokens = []
    for n, (topic, slots) in enumerate(spans, 1):
        tokens += [Token(i, round_, n) for i in (ASYNC, *topic, ID[":"])]
        tokens += [Token(i, round_, n, slot=1) for i in slots]
        tokens += [Token(ASYNC_END, round_, n)]
    return tokens


def write_example(prompt, answer=()):
    """All tokens of an example, or of a prompt alone. The tag that ends a round counts as the first of the next."""
    tokens = [Token(i, 0) for i in (USER, *encode(prompt), ASSISTANT)]
    start = len(tokens)
    for r, (text, pairs) in enumerate(answer):
        plan, spans = encode(text), []
        for topic, content in pairs:
            slots = encode(content)
            units = math.ceil(len(slots) / UNIT)
            slots += [PAD] * (units * UNIT - len(slots))  # as many slots as the plan says, here as in sampling
            plan += [TOPIC, *encode(topic), ID[str(units)], TOPIC_END]
            spans.append((encode(topic), slots))
        end = Token(SYNC if r + 1 < len(answer) else EOS, r + 1)
        tokens += [*(Token(i, r) for i in plan), *scaffold(spans, r), end]
    # Plan and text predict the next token of plan or text: past the spans, so the last </topic> predicts <sync/>.
    outside = [i for i, token in enumerate(tokens) if token.span == 0 and i >= start - 1]  # no loss on the prompt
    for here, following in zip(outside, outside[1:]):
        tokens[here] = tokens[here]._replace(target=tokens[following].id)
    return tokens


def hybrid_mask(round_, span):
    """Who sees whom: (B, T, T), True where query sees key. round_, span: (B, T)."""
    q_round, k_round, q_span, k_span = round_[:, :, None], round_[:, None], span[:, :, None], span[:, None]
    place = torch.arange(span.shape[1])
    # Prompt, plan and text see all that was written before them, finished spans included.
    text_sees_the_past = (q_span == 0) & (place[:, None] >= place)
    # A span sees the rounds before, and the prompt, plan and text of its own.
    span_sees_earlier_rounds = (q_span > 0) & (k_round < q_round)
    span_sees_its_plan = (q_span > 0) & (k_round == q_round) & (k_span == 0)
    # It sees itself in both directions, and no other span of its round.
    span_sees_itself = (q_span > 0) & (k_round == q_round) & (k_span == q_span)
    return text_sees_the_past | span_sees_earlier_rounds | span_sees_its_plan | span_sees_itself


# ---------------------------------------------------------------- transformer: Llama's shape, under the hybrid mask
def rope(x):
    """Rotate queries or keys (B, H, T, hd) by their places in the sequence (arXiv 2104.09864)."""
    T, half = x.shape[2], x.shape[3] // 2
    angle = torch.arange(T)[:, None] * 10000 ** (-torch.arange(half) / half)  # (T, hd / 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.ff_norm = nn.RMSNorm(WIDTH, 1e-5), nn.RMSNorm(WIDTH, 1e-5)
        self.q_norm, self.k_norm = nn.RMSNorm(WIDTH // HEADS, 1e-5), nn.RMSNorm(WIDTH // HEADS, 1e-5)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_up, self.down = nn.Linear(WIDTH, 2 * HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x, mask):
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, hd)
        q, k = rope(self.q_norm(q)), rope(self.k_norm(k))
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5  # (B, H, T, T)
        y = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ v  # (B, H, T, hd)
        x = x + self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)
        gate, up = self.gate_up(self.ff_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(VOCABULARY), WIDTH)  # also the output layer
        nn.init.normal_(self.embedding.weight, std=0.5)  # with GPT-2's 0.02 so narrow a model learns next to nothing
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(LAYERS)), nn.RMSNorm(WIDTH, 1e-5)

    def forward(self, token, round_, span):
        """Logits (B, T, V) of tokens (B, T) in these rounds and spans."""
        x, mask = self.embedding(token), hybrid_mask(round_, span)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x) @ self.embedding.weight.T


# ---------------------------------------------------------------- training: each sequence trains one round
def make_batch(examples, rounds):
    """Noised tokens, their rounds and spans, targets, and which tokens are slots of the round trained; (B, T) each."""
    # A sequence shows what sampling will have shown in its round: earlier rounds finished, later ones not there.
    rows = [[t for t in write_example(*example) if t.round <= round_] for example, round_ in zip(examples, rounds)]
    T = max(map(len, rows))
    rows = [row + [Token(PAD, round=99)] * (T - len(row)) for row in rows]  # of a far round, so no token sees it
    token, round_, span, slot, target = torch.tensor(rows).unbind(-1)  # (B, T) each
    noised = (slot == 1) & (round_ == torch.tensor(rounds)[:, None])
    # Each span draws a noise level t ~ U(0, 1], stratified: of n spans one draws from each n-th part of (0, 1].
    spans, of_slot = torch.unique((span + 100 * torch.arange(len(rows))[:, None])[noised], return_inverse=True)
    t = (torch.randperm(len(spans)) + 1 - torch.rand(len(spans))) / len(spans)
    masked = torch.rand(len(of_slot)) < t[of_slot]
    target[noised] = torch.where(masked, token[noised], IGNORE)  # a masked slot predicts its own token, not the next
    token[noised] = torch.where(masked, MASK, token[noised])
    return token, round_, span, target, noised


def joint_loss(model, token, round_, span, target, noised):
    """Two losses, each a mean over its targets: the next token of plan and text, and the tokens under [MASK]."""
    logits, predicts = model(token, round_, span), target != IGNORE  # (B, T, V), (B, T)
    plan_loss = F.cross_entropy(logits[predicts & ~noised], target[predicts & ~noised])
    # A bound on the likelihood would weigh slots by 1/t, with which small models learn slower. No slot holds a tag.
    span_loss = F.cross_entropy(logits[predicts & noised][:, : PAD + 1], target[predicts & noised])
    return plan_loss, span_loss


def train(model, rng, unseen, updates):
    """Train on new examples in each update, none of them with an unseen prompt."""
    optimizer, start = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95)), time.time()
    for update in range(1, updates + 1):
        examples = [example for example in (make_example(rng) for _ in range(BATCH)) if example[0] not in unseen]
        rounds = [int(rng.random() < SECOND_ROUND) for _ in examples]
        plan, span = joint_loss(model, *make_batch(examples, rounds))
        optimizer.zero_grad()
        (plan + span).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * min(update / WARM_UP, 1 - update / (updates + 1))  # up, then down
        optimizer.step()
        if update % 50 == 0:
            left = (time.time() - start) * (updates / update - 1)
            print(f"update {update}: plan loss {plan:.3f}, span loss {span:.3f}, {left:.0f} s left", flush=True)


# ---------------------------------------------------------------- sampling: plan, scaffold, denoise, next round
def allowed(plan, full):
    """The ids that may come next in the plan or text of a round: with this small grammar every plan can be read."""
    words, lengths = [*range(PAD)], [*range(EOS + 1, len(VOCABULARY))]
    if plan and plan[-1] in lengths:
        return [TOPIC_END]
    if plan.count(TOPIC) > plan.count(TOPIC_END):
        n_words = plan[::-1].index(TOPIC)  # of the open topic so far
        return (words if n_words < MAX_NAME else []) + (lengths if n_words > 0 else [])
    return [EOS] if full else [TOPIC, SYNC, EOS] + (words if TOPIC not in plan else [])


@torch.no_grad()
def answer(model, prompt):
    """Answer a prompt. A generator: after each forward pass it yields the pass's stage and the tokens so far."""
    tokens, round_, plan = write_example(prompt), 0, [SYNC]
    predict = lambda: model(*torch.tensor([tokens]).unbind(-1)[:3])[0]  # one pass over all tokens: logits (T, V)
    while plan[-1] == SYNC:
        # Stage 1: write the plan or text of a round, token by token, up to the tag that ends the round.
        plan = []
        while plan[-1:] not in ([SYNC], [EOS]):
            choices = allowed(plan, len(tokens) >= MAX_TOKENS)
            free = len(choices) > 1  # a token without alternative needs no pass
            plan.append(choices[predict()[-1, choices].argmax()] if free else choices[0])
            if plan[-1] not in (SYNC, EOS):  # these two follow the spans
                tokens.append(Token(plan[-1], round_))
            if free:
                yield "write", tokens
        # The scaffold: what the plan asks for, all slots masked.
        topics = re.findall(r"<topic> (.*?) (\d+) </topic>", decode(plan))
        tokens += scaffold([(encode(topic), [MASK] * (int(units) * UNIT)) for topic, units in topics], round_)
        # Stage 2: denoise all spans in the same passes. After pass s of S at least n s / S of the n slots of each span
        # are filled. Quotas are per span, so no span depends on another; short ones finish first and stay as they are.
        slots = [i for i, token in enumerate(tokens) if token.slot and token.round == round_]
        spans = [[*places] for _, places in groupby(slots, key=lambda i: tokens[i].span)]
        steps = math.ceil(STEPS_RATIO * max(map(len, spans), default=0))
        for step in range(1, steps + 1):
            log_p = predict()[:, : PAD + 1].log_softmax(-1)  # (T, words and [PAD])
            certainty = (log_p.exp() * log_p).sum(-1).tolist()  # negative entropy
            for span in spans:
                masked = [i for i in span if tokens[i].id == MASK]
                quota = max(1, math.ceil(len(span) * step / steps) - (len(span) - len(masked)))
                for i in sorted(masked, key=lambda i: certainty[i], reverse=True)[:quota]:
                    tokens[i] = tokens[i]._replace(id=log_p[i].argmax().item())
            yield "denoise", tokens
        # The next round sees the spans as they are now. Its first token is the tag that ended this one.
        round_ += 1
        tokens.append(Token(plan[-1], round_))


# ---------------------------------------------------------------- what the terminal shows
def spans_of(tokens):
    """The spans of an answer as texts, each with its topic first; _ is a masked slot."""
    text = decode(token.id for token in tokens if token.span and token.id != PAD).replace("[MASK]", "_")
    return re.findall("<async> (.*?) </async>", text)


def show(passes):
    """Print prompt and plan, the spans after each denoising pass, and the text of the next round."""
    plan, text = (decode(t.id for t in passes[-1][1] if t.span == 0 and (t.round > 0) == later) for later in (0, 1))
    lines = ["", *plan.replace(" <topic>", "\n<topic>").split("\n")]
    for n, (stage, tokens) in enumerate(passes, 1):
        lines += [f"pass {n}", *spans_of(tokens)] if stage == "denoise" else []
    print(*(textwrap.fill(line, 78, subsequent_indent="    ") for line in [*lines, text]), sep="\n")


def main(seed=0):
    torch.set_num_threads(1)  # in a model this small, threads wait for each other more than they help
    torch.manual_seed(seed)
    rng, model = random.Random(seed), Transformer()
    unseen = dict(make_example(rng) for _ in range(50))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {UPDATES} updates: 1 to 2 minutes on one core")
    train(model, rng, unseen, UPDATES)
    answers = [[(stage, [*tokens]) for stage, tokens in answer(model, prompt)] for prompt in unseen]
    for passes in answers[:2]:
        show(passes)
    stages = [stage for passes in answers for stage, _ in passes]
    expected, found = [write_example(*example) for example in unseen.items()], [passes[-1][1] for passes in answers]
    right = [span in spans_of(b) for a, b in zip(expected, found) for span in spans_of(a)]
    n_valid = sum(len(tokens) < MAX_TOKENS for tokens in found)  # not cut off; the grammar sees to all else
    n_tokens = sum(t.slot * (t.id != PAD) + (t.round > 0) for tokens in expected for t in tokens)  # all but the plans
    print(f"\n50 unseen prompts: {sum(right)} of {len(right)} spans right, {n_valid} plans valid")
    print(f"{len(stages)} passes, {stages.count('denoise')} to denoise spans; one token per pass would take {n_tokens}")


if __name__ == "__main__":
    main()
