"""The two-stage sampler: write a plan token by token, then denoise its spans in parallel.

    python sample.py --prompt "Tell me about the river, the food and the ruler of Brivok."

One loop serves planned and autoregressive models: every forward pass computes, for each answer of
the batch, the layout entries that this answer needs next (Planned Diffusion, section 4).
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, field
from itertools import islice

import torch

from checkpoint import load_checkpoint
from grammar import Grammar
from kernels.graphs import Replayed, bucket
from masks import PLAN, PROMPT, SLOT, Layout, encode_prompt
from methods import MethodConfig, trained_by
from model import KVCache
from settings import add_settings, locate, pick, setting
from show.terminal import Screen
from tags import Round, Span, format_answer, plain_text
from tokenizer import span_slots
from unmask import ORDERS, fill, probabilities


@dataclass
class SampleConfig:
    """Sampling."""

    steps_ratio: float = setting(0.5, "denoising steps of a round, as a share of its longest span's slots")
    threshold: float = setting(0.0, "if above 0: fill all slots of at least this confidence, whatever steps_ratio")
    order: str = setting("entropy", f"which slots are certain, so filled first: {', '.join(ORDERS)}")
    length_scale: float = setting(1.0, "scales every planned length")
    temperature: float = setting(0.0, "0 takes the likeliest token")
    top_p: float = setting(1.0, "draws from the likeliest tokens that have this probability together")
    constrained: bool = setting(True, "write plans under the grammar; without it an answer that leaves it is broken")
    max_tokens: int = setting(512, "most positions of an answer: plan, text and spans with their tags")
    seed: int = setting(0, "seed; answer i of a batch uses seed + i")

    def __post_init__(self):
        limits = {"steps_ratio": (0, 1), "threshold": (-1e-9, 1), "length_scale": (0, 100), "top_p": (0, 1)}
        for name, (low, high) in limits.items():
            if not low < getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}: expected more than {max(low, 0)}, at most {high}")
        if self.temperature < 0 or self.max_tokens < 1 or self.order not in ORDERS:
            raise ValueError(f"expected temperature >= 0, max_tokens >= 1 and an order of {', '.join(ORDERS)}, not "
                             f"{self.temperature}, {self.max_tokens}, {self.order}")  # fmt: skip


# ---------------------------------------------------------------- one answer


@dataclass
class Draft:
    """A round being made, in token ids."""

    text: list = field(default_factory=list)
    topics: list = field(default_factory=list)  # [name tokens, length in units] a topic
    spans: list = field(default_factory=list)  # (first, last + 1) layout entry a span


class Answer:
    """An answer being made: its layout so far, what it needs computed next, and what it has cost.

    Stages: "write" (plan or text, a token a pass), "denoise" (the spans of a round), "done".
    """

    def __init__(self, prompt, sampler, seed):
        self.prompt, self.sampler, self.config, self.tokenizer = prompt, sampler, sampler.config, sampler.tokenizer
        self.method, self.causal = sampler.method, sampler.method.attention == "causal"
        self.layout, self.drafts, self.stage = Layout(self.method.attention), [Draft()], "write"
        self.layout.write(encode_prompt(prompt, self.tokenizer), PROMPT, 0)
        self.room = len(self.layout) + self.config.max_tokens  # the layout stays shorter than this
        plans = self.method.plan == "written"
        self.grammar = Grammar(self.tokenizer, self.config.max_tokens, self.config.length_scale, plans)
        self.generator = torch.Generator(sampler.device).manual_seed(seed)
        self.cached = 0  # the first so many layout entries are in the KV cache as a fresh forward would compute them
        self.active, self.step, self.steps = [], 0, 0  # unfinished spans; denoising steps done and planned
        self.plan_passes = self.denoise_passes = self.critical_path = self.positions = 0
        self.cut, self.broken, self.seconds = False, False, 0.0
        if self.method.plan == "given":
            self.next_block()
        else:
            self.force()

    def entries(self):
        """The layout entries that the next pass computes: what the cache lacks, but of spans only the unfinished."""
        if self.stage == "write":
            return list(range(self.cached, len(self.layout)))
        first = self.drafts[-1].spans[0][0]
        return [*range(self.cached, first), *(i for span in self.active for i in self.unread(*span))]

    def unread(self, start, stop):
        """The entries of an unfinished span that a pass computes: all, or if causal what is before the next slot."""
        if not self.causal:
            return range(start, stop)
        slot = self.layout.kind.index(SLOT, start) + self.step
        return range(slot - 1 if self.step else start, slot)

    def reads(self, entries):
        """What the pass over these entries predicts, in groups: (columns of the pass, how many of them to keep).

        Sparse spans fill by themselves. Dense ones do so together, most certain first over the whole
        round, or they could not agree on anything.
        """
        if self.stage == "write":
            return [([len(entries) - 1], 1)]
        if self.causal:
            return [([entries.index(self.unread(*span).stop - 1)], 1) for span in self.active]
        kind, mask = self.layout.kind, self.tokenizer.mask
        column = {i: n for n, i in enumerate(entries) if self.layout.token[i] == mask}
        slots = [[i for i in range(*span) if kind[i] == SLOT] for span in self.active]
        groups = [sum(slots, [])] if self.layout.attention == "dense" else slots
        left = [[column[i] for i in group if i in column] for group in groups]
        return [(columns, self.share(len(group), len(columns))) for group, columns in zip(groups, left)]

    def share(self, slots, left):
        """How many to fill of a group's slots, of which so many are left; a threshold may fill more."""
        if self.config.threshold:
            return 1
        return max(0, math.ceil(slots * (self.step + 1) / self.steps) - (slots - left))

    def allowed(self):
        """(vocabulary,) which tokens may be drawn: slots hold text or [PAD], never a tag."""
        if self.stage != "write":
            return self.sampler.slot_tokens
        return torch.from_numpy(self.grammar.allowed()) if self.config.constrained else self.sampler.all_tokens

    def take(self, entries, drawn):
        """Go on with what was drawn: for each column that was read a token, and whether to keep it."""
        self.positions += len(entries)
        self.cached = len(self.layout) if self.stage == "write" else self.drafts[-1].spans[0][0]
        if self.stage == "write":
            self.plan_passes += 1
            self.write(drawn[0][1])
        else:
            self.denoise_passes += 1
            (self.extend if self.causal else self.unmask)(entries, drawn)
            self.end_step()
        self.force()

    def write(self, token):
        """Stage 1: append the next token of plan or text."""
        if self.config.constrained or self.grammar.allowed()[token]:
            self.append(token)
        else:
            self.broken, self.stage = True, "done"

    def force(self):
        """Append the tokens to which the grammar leaves no alternative: they cost no pass."""
        while self.config.constrained and self.stage == "write" and (forced := self.grammar.forced()) is not None:
            self.cut |= forced == self.tokenizer.eos  # no room for anything else
            self.append(forced)

    def append(self, token):
        tok, draft = self.tokenizer, self.drafts[-1]
        self.critical_path += 1
        self.grammar.advance(token)
        if token in (tok.sync, tok.eos):
            self.last = token == tok.eos
            self.start_spans(draft) if draft.topics else self.end_round()
            return
        if token == tok.topic:
            draft.topics.append([[], 0])
        elif tok.length_of(token):
            draft.topics[-1][1] = tok.length_of(token)
        elif token != tok.topic_end:
            (draft.topics[-1][0] if draft.topics else draft.text).append(token)
        self.layout.write([token], PLAN, len(self.drafts) - 1)

    def start_spans(self, draft):
        """The spans of a written plan."""
        unit, scale, repeat = self.tokenizer.unit, self.config.length_scale, self.method.repeat_topic
        self.scaffold([(name if repeat else [], span_slots(length, unit, scale)) for name, length in draft.topics])

    def next_block(self):
        """The span of a given plan: one block, or what there is room for."""
        size = min(self.method.block, self.room - len(self.layout) - 2)  # 2: <async> and </async>
        self.cut = size < 1
        if self.cut:
            self.stage = "done"
        else:
            self.scaffold([([], size)])

    def scaffold(self, spans):
        """Begin to denoise spans of [MASK], given as pairs of topic tokens and number of slots."""
        masked = [(topic, [self.tokenizer.mask] * slots) for topic, slots in spans]
        self.drafts[-1].spans = self.layout.scaffold(masked, self.tokenizer, len(self.drafts) - 1)
        self.active, self.stage = self.drafts[-1].spans, "denoise"
        longest = max(slots for _, slots in spans)
        self.step, self.steps = 0, longest if self.causal else math.ceil(self.config.steps_ratio * longest)

    def unmask(self, entries, drawn):
        """Stage 2: fill slots of the unfinished spans."""
        for column, token, kept in drawn:
            if kept:
                self.layout.token[entries[column]] = token

    def extend(self, entries, drawn):
        """Stage 2 of causal spans: write the next token of each unfinished span; [PAD] ends it."""
        for (start, stop), (_, token, _) in zip(self.active, drawn):
            slot = self.unread(start, stop).stop
            stop = stop - 1 if token == self.tokenizer.pad else slot + 1  # the last entry is </async>
            self.layout.token[slot:stop] = [token] * (stop - slot)

    def end_step(self):
        """Finished spans leave, but dense ones stay while another still sees them."""
        self.step += 1
        self.critical_path += 1
        unfinished = [span for span in self.active if self.tokenizer.mask in self.layout.token[slice(*span)]]
        self.active = self.active if unfinished and self.layout.attention == "dense" else unfinished
        if not unfinished:
            self.end_round()

    def end_round(self):
        """Go on after a round, or end. The pass that reads what follows computes the finished spans once more, so
        that the cache stays exact."""
        given = self.method.plan == "given"
        if self.tokenizer.pad in self.contents(self.drafts[-1].spans[0]) if given else self.last:
            self.stage = "done"
            return
        self.drafts.append(Draft())
        if given:
            self.next_block()
        else:
            self.layout.write([self.tokenizer.sync], PLAN, len(self.drafts) - 1)
            self.stage = "write"

    def contents(self, span):
        """Slot tokens of a span, [PAD] and [MASK] included."""
        return [self.layout.token[i] for i in range(*span) if self.layout.kind[i] == SLOT]

    def rounds(self):
        """The finished answer as a list of `Round`; what is written under a given plan is one text."""
        decode = self.tokenizer.decode
        if self.method.plan == "given":
            return [Round(decode([i for draft in self.drafts for span in draft.spans for i in self.contents(span)]))]
        return [
            Round(decode(draft.text), tuple(Span(decode(name), decode(self.contents(span)), length)
                                            for (name, length), span in zip(draft.topics, draft.spans)))  # fmt: skip
            for draft in self.drafts
        ]

    def result(self):
        """What `--json` prints."""
        rounds = self.rounds()
        slots = [i for draft in self.drafts for span in draft.spans for i in self.contents(span)]
        pads = slots.count(self.tokenizer.pad)
        return {
            "prompt": self.prompt,
            "text": plain_text(rounds),
            "tagged": format_answer(rounds),
            "rounds": [{"text": r.text, "plan": [{"topic": s.topic, "length": s.length} for s in r.spans],
                        "spans": [s.text for s in r.spans]} for r in rounds],  # fmt: skip
            "cut": self.cut,
            "broken": self.broken,
            "plan_passes": self.plan_passes,
            "denoise_passes": self.denoise_passes,
            "critical_path": self.critical_path,
            "positions": self.positions,
            "content_tokens": sum(len(draft.text) for draft in self.drafts) + len(slots) - pads,
            "slots": len(slots),
            "pads": pads,
            "seconds": round(self.seconds, 4),
        }


# ---------------------------------------------------------------- a batch of answers


class Sampler:
    """Answers prompts with a model by the method (a MethodConfig) that it was trained with."""

    def __init__(self, model, tokenizer, config, method=MethodConfig()):
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        self.method, self.device = method, model.embedding.weight.device
        self.all_tokens = torch.ones(tokenizer.vocab_size, dtype=torch.bool)
        self.slot_tokens = torch.arange(tokenizer.vocab_size) <= tokenizer.pad
        # on a GPU a pass over more positions costs about the same; on a CPU one token need not wait for a hundred
        cuda = self.device.type == "cuda"
        self.turns = (("write", "denoise"),) if cuda else (("write",), ("denoise",))
        self.rounded, self.replayed = (bucket, Replayed) if cuda else (int, lambda function: function)  # graphs.py
        self.cache = None

    @classmethod
    def load(cls, path, config, device="cpu"):
        """From a checkpoint, which says how it was trained."""
        model, tokenizer, info, _ = load_checkpoint(locate(path), device)
        if torch.device(device).type == "cuda":
            model.half().attend_by("auto", torch.float16, many_shapes=True)  # checkpoints of finished runs are float16
        return cls(model, tokenizer, config, trained_by(info, path))

    def reserve(self, batch, length):
        """Have a KV cache for so many answers and entries: the last one if it is large enough, for graphs know it."""
        if self.cache is None or self.cache.batch < batch or self.cache.junk < length:
            dtype = self.model.embedding.weight.dtype
            self.cache = KVCache(self.model.config, self.rounded(batch), self.rounded(length), self.device, dtype)
            self.compute = self.replayed(self.one_pass)

    @torch.inference_mode()
    def answer(self, prompts, watch=None):
        """Answer a list of prompts together. Returns a list of finished `Answer`.

        `watch`: called with each answer after each of its passes.
        """
        start = time.perf_counter()
        answers = [Answer(prompt, self, self.config.seed + i) for i, prompt in enumerate(prompts)]
        longest = max((len(a.layout) for a in answers), default=0) + self.config.max_tokens
        self.reserve(len(answers), longest)
        while any(answer.stage != "done" for answer in answers):
            for stages in self.turns:
                rows = [row for row, answer in enumerate(answers) if answer.stage in stages]
                if rows:
                    self.step([answers[row] for row in rows], rows, watch, start)
        return answers

    def step(self, live, rows, watch, start):
        """One forward pass for some answers, in these rows of the cache."""
        entries = [answer.entries() for answer in live]
        reads = [answer.reads(mine) for answer, mine in zip(live, entries)]
        drawn = self.predict(live, self.forward(live, entries, rows), reads)
        for answer, mine, rows in zip(live, entries, drawn):
            answer.take(mine, rows)
            answer.seconds = time.perf_counter() - start
            if watch:
                watch(answer)

    def predict(self, live, hidden, reads):
        """What the columns of `reads` predict: for each answer rows of (column, token, whether to keep it)."""
        groups = [(row, columns, share) for row, mine in enumerate(reads) for columns, share in mine]
        table = [(row, c, number, share) for number, (row, columns, share) in enumerate(groups) for c in columns]
        row, column, group, share = torch.tensor(table, device=self.device).T.contiguous()
        allowed = torch.stack([answer.allowed() for answer in live]).to(self.device)
        logits = self.model.logits(hidden[row, column]).masked_fill_(~allowed[row], float("-inf"))
        sizes = [sum(len(columns) for columns, _ in mine) for mine in reads]
        generators = [(answer.generator, size) for answer, size in zip(live, sizes)]
        all_kept = all(len(columns) <= share for _, columns, share in groups)
        token, kept = fill(probabilities(logits, self.config), group, share, all_kept, self.config, generators)
        drawn = iter(torch.stack([column, token, kept], dim=1).tolist())  # the host waits for the device, once a pass
        return [list(islice(drawn, size)) for size in sizes]

    def forward(self, live, entries, rows):
        """Hidden states (B, T, D) of some layout entries of each answer; the rest is padding.

        rows: where the answers are in the cache.
        """
        size, width = self.rounded(len(rows)), self.rounded(max(map(len, entries)))
        columns = torch.zeros(size, width, 6, dtype=torch.long)
        columns[:, :, 2], columns[:, :, 5] = 1, self.cache.junk  # padding sees one entry, writes where nobody looks
        for row, (answer, mine) in enumerate(zip(live, entries)):
            y = answer.layout
            columns[row, : len(mine)] = torch.tensor(
                [(y.token[i], y.position[i], y.prefix[i], y.begin[i], y.end[i], i) for i in mine]
            )
        n_keys = self.rounded(int(columns[..., 2:5].max()))  # here: later the host would have to wait for the device
        rows = [*rows, *[row for row in range(self.cache.batch) if row not in rows][: size - len(rows)]]
        columns, picked = columns.to(self.device), torch.tensor(rows, device=self.device)
        return self.compute(columns, picked, n_keys=n_keys, first=rows == list(range(size)))

    def one_pass(self, columns, rows, n_keys, first):
        """What a pass has the device do."""
        self.cache.select(rows, first)
        token, position, see, entry = columns[..., 0], columns[..., 1], columns[..., 2:5], columns[..., 5]
        return self.model(token, position, see, self.cache, entry, n_keys)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", action="append", required=True, help="a question; give it again for a batch")
    parser.add_argument("--checkpoint", default="checkpoints/tasks/planned.safetensors",
                        help="trained model (default: %(default)s)")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    add_settings(parser, SampleConfig)
    args = parser.parse_args()
    try:
        sampler = Sampler.load(args.checkpoint, pick(SampleConfig, args), args.device)
    except ValueError as error:
        sys.exit(f"sample.py: {error}")
    if args.json:
        for answer in sampler.answer(args.prompt):
            print(json.dumps(answer.result(), ensure_ascii=False))
        return
    for prompt in args.prompt:
        sampler.answer([prompt], watch=Screen())


if __name__ == "__main__":
    main()
