"""An answer being made: its layout so far, the phase that it is in, and what it has cost."""

from dataclasses import dataclass, field

import torch

from grammar import Grammar
from masks import PROMPT, SLOT, Layout, encode_prompt
from tags import Round, Span, format_answer, plain_text


@dataclass
class RoundTokens:
    """A round in token ids."""

    text: list = field(default_factory=list)
    topics: list = field(default_factory=list)  # [name tokens, length in units] per topic
    spans: list = field(default_factory=list)  # (first layout entry, last + 1) per span


class Answer:
    """What all ways to decode share. `phase` (decode.py) is what happens next; None once the answer is finished.

    config: the sampler's SampleConfig; method: MethodConfig; device: of the generator that draws its tokens.
    """

    def __init__(self, prompt, tokenizer, config, method, seed, device="cpu"):
        self.prompt, self.tokenizer, self.config, self.method = prompt, tokenizer, config, method
        self.layout, self.rounds, self.phase = Layout(method.attention), [], None
        self.layout.write(encode_prompt(prompt, tokenizer), PROMPT, 0)
        self.max_length = len(self.layout) + config.max_tokens  # of the layout, <eos> included
        self.grammar = Grammar(tokenizer, config.max_tokens, config.length_scale, plans=method.plan == "written")
        self.generator = torch.Generator(device).manual_seed(seed)
        self.cached = 0  # layout entries [0, cached) are in the KV cache as a fresh forward would compute them
        self.cut = self.broken = False  # cut: max_tokens had no room for more; broken: a token outside the grammar
        self.plan_passes = self.denoise_passes = self.draft_passes = self.critical_path = self.positions = 0
        self.drafted = self.accepted = 0  # tokens
        self.seconds = 0.0

    def scaffold(self, spans):
        """Append spans of [MASK] to the layout; `spans` holds pairs of topic tokens and number of slots."""
        masked = [(topic, [self.tokenizer.mask] * slots) for topic, slots in spans]
        self.rounds[-1].spans = self.layout.scaffold(masked, self.tokenizer, len(self.rounds) - 1)

    def slots(self, span):
        """The layout entries of a span's slots."""
        return [i for i in range(*span) if self.layout.kind[i] == SLOT]

    def contents(self, span):
        """The tokens of a span's slots, [PAD] and [MASK] included."""
        return [self.layout.token[i] for i in self.slots(span)]

    def decoded(self):
        """The answer as a list of `Round`; what is written under a given plan is one text."""
        decode = self.tokenizer.decode
        if self.method.plan == "given":
            return [Round(decode([i for round_ in self.rounds for span in round_.spans for i in self.contents(span)]))]
        return [
            Round(
                decode(round_.text),
                tuple(
                    Span(decode(name), decode(self.contents(span)), length)
                    for (name, length), span in zip(round_.topics, round_.spans)
                ),
            )
            for round_ in self.rounds
        ]

    def result(self):
        """What `--json` prints."""
        rounds = self.decoded()
        slots = [i for round_ in self.rounds for span in round_.spans for i in self.contents(span)]
        pads = slots.count(self.tokenizer.pad)
        return {
            "prompt": self.prompt,
            "text": plain_text(rounds),
            "tagged": format_answer(rounds),
            "rounds": [
                {
                    "text": r.text,
                    "plan": [{"topic": s.topic, "length": s.length} for s in r.spans],
                    "spans": [s.text for s in r.spans],
                }
                for r in rounds
            ],
            "cut": self.cut,
            "broken": self.broken,
            "plan_passes": self.plan_passes,
            "denoise_passes": self.denoise_passes,
            "draft_passes": self.draft_passes,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "critical_path": self.critical_path,
            "positions": self.positions,
            "content_tokens": sum(len(round_.text) for round_ in self.rounds) + len(slots) - pads,
            "slots": len(slots),
            "pads": pads,
            "seconds": round(self.seconds, 4),
        }
