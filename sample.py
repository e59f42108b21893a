"""The two-stage sampler: write a plan, then denoise its spans in parallel (Planned Diffusion, section 4).

    python sample.py --prompt "Tell me about the river, the food and the ruler of Brivok."

One loop serves every way to decode: each forward pass computes, for each answer of the batch, the layout entries
that its phase (decode.py) asks for.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from answer import Answer
from decode import Reply, next_round
from methods import MethodConfig, decoded_as, trained_by
from passes import Passes
from plumbing import device as devices
from plumbing.checkpoint import load_checkpoint
from plumbing.settings import add_settings, check, command, locate, pick, refuse_idle, setting
from show.page import Race, write_page
from show.record import TITLES, record
from show.terminal import Screen
from unmask import ORDERS, check_drafts, fill

LONGEST = 4096  # positions of prompt and answer together: the dense mask of a prompt grows with its square


@dataclass
class SampleConfig:
    """Sampling."""

    decode: str = setting(
        "", "method to decode by, of those that the model was trained for; default: the first of them"
    )
    steps_ratio: float = setting(0.5, "denoising steps of a round, as a share of its longest span's slots",
                                 above=0, at_most=1)  # fmt: skip
    threshold: float = setting(0.0, "if above 0: fill all slots of at least this confidence, whatever steps_ratio",
                               at_least=0, at_most=1)  # fmt: skip
    stable: float = setting(0.0, "with a threshold: fill only slots whose prediction is at most this far (KL) from that "
                                 "of the last pass; 0: any", at_least=0)  # fmt: skip
    entropy_bound: float = setting(0.0, "if above 0: fill the most certain slots up to this sum of their entropies, "
                                        "whatever steps_ratio", at_least=0)  # fmt: skip
    order: str = setting("entropy", "which slots count as certain and are filled first (a threshold takes confidence)",
                         among=ORDERS)  # fmt: skip
    apart: bool = setting(True, "of two neighbouring slots that would get the same token in a pass, fill only one")
    pads_last: bool = setting(True, "leave a slot for a later pass if it would get [PAD] while a masked one right before "
                                    "it would get text")  # fmt: skip
    length_scale: float = setting(1.0, "scales every planned length", above=0, at_most=100)
    temperature: float = setting(0.0, "0 takes the likeliest token; else 0.01 or more", at_least=0, at_most=100)
    top_p: float = setting(
        1.0, "draw from the likeliest tokens that have this probability together", above=0, at_most=1
    )
    constrained: bool = setting(True, "write plans under the grammar; without it an answer that leaves it is broken")
    ahead: int = setting(0, "tokens drafted ahead in plan, text and causal spans, then checked", at_least=0, at_most=64)
    max_tokens: int = setting(512, "most positions of an answer: plan, text and spans with their tags",
                              at_least=1, at_most=LONGEST)  # fmt: skip
    seed: int = setting(0, "seed; the i-th prompt answered uses seed + i", at_least=0, at_most=2**53)

    def __post_init__(self):
        check(self)
        if 0 < self.temperature < 0.01:
            raise ValueError(f"--temperature {self.temperature}: expected 0, or 0.01 or more")
        if self.stable and not self.threshold:
            raise ValueError(f"--stable {self.stable}: expected a --threshold too")

    def expect_effect(self, method: MethodConfig) -> None:
        """Raise ValueError for a setting that would change nothing in sampling by this method."""
        noised = method.plan != "none" and method.attention != "causal"
        how = "steps_ratio", "threshold", "entropy_bound", "order", "apart", "pads_last"
        acts = {"no span is denoised": (noised, *how),
                "no length is planned": (method.plan == "written", "length_scale"),
                "nothing is written left to right": (method.plan != "given", "ahead", "constrained")}  # fmt: skip
        acts = {f"{reason} when decoding as {method.method}": names for reason, names in acts.items()}
        bound = self.threshold or self.entropy_bound
        acts |= {"at temperature 0 the likeliest token is taken": (self.temperature, "top_p"),
                 "with a threshold, slots are filled by confidence": (not self.threshold, "order"),
                 "--threshold or --entropy_bound decides how many slots are filled": (not bound, "steps_ratio")}  # fmt: skip
        refuse_idle([self], acts)


class Predictions:
    """What a pass predicts for its answers, and what they draw from it."""

    def __init__(self, model, tokenizer, config):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.device = model.embedding.weight.device

    def predict(self, live, hidden, readings):
        """For each answer a `Reply` to each of its readings. Raises ValueError if the model predicts no numbers."""
        kinds = [[row for row, a in enumerate(live) if a.phase.in_spans == in_spans] for in_spans in (False, True)]
        drawn = [self.draw(live, hidden, readings, rows) for rows in kinds if rows]
        table = iter(torch.cat([lines for lines, _ in drawn]).tolist())  # the host waits for the device, once per pass
        probs = iter([p for _, probs in drawn for p in probs])
        replies = [[] for _ in live]
        for row in sum(kinds, []):
            for reading in readings[row]:
                lines = [next(table) for _ in reading.entries]
                tokens, kept, confidence, cut = ([line[n] for line in lines] for n in range(4))
                if not all(map(math.isfinite, confidence)):
                    raise ValueError("the model's predictions are not finite: its weights are broken or too large")
                tokens, kept = [*map(int, tokens)], [flag > 0 for flag in kept]
                replies[row].append(Reply(tokens, kept, max(confidence, default=0), next(probs), any(cut)))
        return replies

    def draw(self, live, hidden, readings, rows):
        """A line (token, kept, confidence, cut) per entry that these answers read; what was drawn from, per reading."""
        phase, asked = live[rows[0]].phase, [reading for row in rows for reading in readings[row]]
        counts = [sum(len(reading.entries) for reading in readings[row]) for row in rows]
        generators = [(live[row].generator, n) for row, n in zip(rows, counts)]
        hidden = torch.cat([hidden[row, :n] for row, n in zip(rows, counts)])
        logits = self.logits(phase, hidden)
        likeliest = self.only("endless", logits, asked).argmax(-1, keepdim=True)
        logits = self.only("allowed", logits, asked)
        largest, cut = logits.amax(-1), logits.gather(-1, likeliest)[:, 0] == -torch.inf
        if self.config.temperature:  # what cannot be drawn from ends in `predict`, not in a device's assertion
            logits = logits.where(largest.isfinite()[:, None], 0)
        token, kept, probs = (self.fill if phase.fills else self.check)(logits, asked, generators)
        confidence = logits.softmax(-1).amax(-1).where(largest.isfinite(), torch.nan) if self.config.ahead else largest
        lines = torch.stack([token.float(), kept.float(), confidence, cut.float()], dim=1)
        return lines, [None] * len(asked) if probs is None else probs

    def logits(self, phase, hidden):
        """(N, V) float32 predictions of a phase at hidden states (N, D)."""
        return self.model.logits(hidden, self.tokenizer.pad + 1 if phase.in_spans else None).float()

    def only(self, mask, logits, asked):
        """The logits (N, V); -inf where a reading's mask of that name, "allowed" or "endless", leaves a token out."""
        masks = [getattr(reading, mask) for reading in asked]
        if masks[0] is None:
            return logits
        any_token = torch.ones(self.tokenizer.vocab_size, dtype=torch.bool)
        masks = torch.stack([any_token if one is None else one for one in masks])
        return logits.where(masks.to(self.device), -torch.inf)

    def fill(self, logits, asked, generators):
        """Tokens for slots, which of them are kept, and with --stable the probabilities of each reading's."""
        sizes = [len(reading.entries) for reading in asked]
        group = torch.arange(len(asked)).repeat_interleave(torch.tensor(sizes))
        quota = torch.tensor([reading.quota for reading in asked])[group]
        entry = torch.tensor([entry for reading in asked for entry in reading.entries])
        group, entry, quota = torch.stack([group, entry, quota]).to(self.device)
        before, probs = None, None
        if self.config.stable:
            nothing = torch.zeros_like(logits[0])
            before = torch.stack([nothing if row is None else row for reading in asked for row in reading.before])
            probs = logits.softmax(-1).split(sizes)
        return *fill(logits, group, entry, quota, self.tokenizer.pad, self.config, generators, before), probs

    def check(self, logits, asked, generators):
        """The next token of each reading, whether that is its accepted draft, and what it was drawn from."""
        draft, draft_probs = torch.tensor([reading.draft for reading in asked], device=self.device), None
        if self.config.temperature and self.config.ahead:
            # where a drafter's grammar left it no choice its draft was certain, and was not drawn
            certain = F.one_hot(draft.clamp_min(0), logits.shape[-1]).where(draft[:, None] >= 0, 0).float()
            draft_probs = torch.stack([q if r.draft_probs is None else r.draft_probs for r, q in zip(asked, certain)])
        return check_drafts(logits, draft, draft_probs, self.config, generators)


class Sampler(Predictions):
    """Answers prompts with a model by a method (MethodConfig); `drafter`: a second model that drafts, or None."""

    def __init__(self, model, tokenizer, config, method=MethodConfig(), drafter=None):
        super().__init__(model.eval(), tokenizer, config)
        self.method, self.drafter = method, drafter
        self.passes = Passes(model)
        # on a GPU a pass over more positions costs about the same; on a CPU one token need not wait for a hundred
        together = devices.has_graphs(self.device)
        self.turns = ((False, True),) if together else ((False,), (True,))  # of phases in spans or not

    @classmethod
    def load(cls, path, config, device="cpu", drafter=None):
        """From a checkpoint, which says how it was trained.

        Raises ValueError if it cannot be sampled from, or if a setting would change nothing.
        """
        model, tokenizer, info, _ = load_checkpoint(locate(path), device)
        method = decoded_as(trained_by(info, path), config.decode)
        config.expect_effect(method)
        dtype = devices.sampling_dtype(device)
        dtype = getattr(torch, model.config.half) if dtype == torch.float16 else dtype
        return cls(model.to(dtype), tokenizer, config, method, drafter)

    def begin(self, prompts):
        """Answers to prompts in their first phase. Raises ValueError if a prompt is too long."""
        answers = []
        for i, prompt in enumerate(prompts):
            answer = Answer(prompt, self.tokenizer, self.config, self.method, self.config.seed + i, self.device)
            if answer.max_length > LONGEST:
                raise ValueError(
                    f"the prompt {prompt[:40]!r}... has {len(answer.layout)} tokens: "
                    f"with --max_tokens {self.config.max_tokens} that is more than {LONGEST}"
                )
            answer.phase = next_round(answer)
            answers.append(answer)
        self.passes.reserve(len(answers), max((answer.max_length for answer in answers), default=0))
        return answers

    @torch.inference_mode()
    def answer(self, prompts, watch=None, probe=None):
        """Answer a list of prompts together. Returns a list of finished `Answer`.

        `watch`: called with each answer after each of its passes. `probe`: called in each pass, before the answers
        take what was drawn, with what `predict` is given and what it returns.
        """
        start = time.perf_counter()
        answers = self.begin(prompts)
        while any(answer.phase for answer in answers):
            for in_spans in self.turns:
                rows = [row for row, a in enumerate(answers) if a.phase and a.phase.in_spans in in_spans]
                if rows:
                    self.step([answers[row] for row in rows], rows, watch, probe, start)
        return answers

    def step(self, live, rows, watch, probe, start):
        """One forward pass for some answers, in these rows of the cache."""
        for answer in live:
            answer.phase.prepare(self.drafter)
        entries, readings = ([getattr(a.phase, part)() for a in live] for part in ("entries", "readings"))
        hidden = self.forward(live, entries, readings, rows)
        drawn = self.predict(live, hidden, readings)
        if probe:
            probe(live, hidden, readings, drawn)
        for answer, computed, replies in zip(live, entries, drawn):
            answer.positions += len(computed)
            answer.phase = answer.phase.take(replies)
            answer.seconds = time.perf_counter() - start
            if watch:
                watch(answer)

    def forward(self, live, entries, readings, rows):
        """Hidden states (B, R, D) of the entries that are read, of a pass over `entries` of answers in these rows."""
        return self.passes.forward([answer.layout for answer in live], entries, readings, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", action="append", required=True, help="a question; may be given several times")
    parser.add_argument("--checkpoint", default="checkpoints/tasks/planned.safetensors",
                        help="trained model (default: %(default)s)")  # fmt: skip
    parser.add_argument("--device", default="auto", help=f"{', '.join(devices.CHOICES)} (default: %(default)s)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    output.add_argument("--html", metavar="FILE", help="also write a page that plays the answers pass by pass")
    add_settings(parser, SampleConfig)
    args = parser.parse_args()
    config = pick(SampleConfig, args)
    sampler = Sampler.load(args.checkpoint, config, devices.find(args.device))
    if args.json:
        for answer in sampler.answer(args.prompt):
            print(json.dumps(answer.result(), ensure_ascii=False))
        return
    races = []
    for n, prompt in enumerate(args.prompt):
        sampler.config = replace(config, seed=config.seed + n)
        frames = record(sampler, prompt, watch=Screen())
        if frames[-1].ending == "cut":
            print(f"(cut: --max_tokens {args.max_tokens} leaves no place for more)")
        if frames[-1].ending == "broken":
            print("(broken: the model left the grammar of plans here)")
        races.append(Race(prompt, [(TITLES[sampler.method.method], sampler.method.method, frames)]))
    if args.html:
        print(write_page(args.html, races))


if __name__ == "__main__":
    command(main)
