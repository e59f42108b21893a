"""The two-stage sampler: write a plan, then denoise its spans in parallel (Planned Diffusion, section 4).

    python sample.py --prompt "Tell me about the river, the food and the ruler of Brivok."

One loop serves every way to decode: each forward pass computes, for each answer of the batch, the layout entries
that its phase (decode.py) asks for.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from config import LONGEST, METHODS, MethodConfig, SampleConfig
from decode import Answer, Decoder, Reading, Reply, next_round
from drafting.decoding import DECODERS_AHEAD
from kernels.backends import attend_by
from kernels.graphs import Replayed, bucket
from masks import Layout
from methods import DECODERS, decoded_as, trained_by
from model import KVCache, Transformer
from plumbing import device as devices
from plumbing.files import refuse_overwriting
from plumbing.settings import Help, add_settings, command, locate, pick, refuse_idle
from pretrained.chat import model_to_sample
from show.page import Race, write_page
from show.record import record
from show.terminal import Screen
from tokenizer import Tokenizer
from training.checkpoint import introduction

# ---------------------------------------------------------------- a pass


class Passes:
    """Forward passes of a model over a KV cache: some entries of several layouts at once, with the keys and values of
    all before. On a GPU shapes are rounded up, and passes replayed as graphs."""

    def __init__(self, model: Transformer):
        self.model, self.device, self.cache = model, model.embedding.weight.device, None
        attend_by(model, "auto", model.embedding.weight.dtype, sampling=True)
        graphs = devices.has_graphs(self.device)
        self.rounded, self.replayed = (bucket, Replayed) if graphs else (int, lambda function: function)
        if self.device.type == "cpu":
            devices.keep_freed_memory()

    def reserve(self, batch: int, length: int) -> None:
        """Have a KV cache for that many answers and entries: the last one if it is large enough, since graphs know it."""
        if self.cache is None or self.cache.batch < batch or self.cache.junk < length:
            dtype = self.model.embedding.weight.dtype
            self.cache = KVCache(self.model.config, self.rounded(batch), self.rounded(length), self.device, dtype)
            self.compute = self.replayed(self.one_pass)

    def forward(self, layouts: list[Layout], entries: list[list[int]], readings: list[list[Reading]],
                rows: list[int]) -> Tensor:  # fmt: skip
        """Hidden states (B, R, D) of the entries that are read, of a pass over all `entries`; the rest is padding.

        One layout, list of entries and list of readings per answer; `rows`: where it is in the cache.
        """
        size, width = self.rounded(len(rows)), self.rounded(max(map(len, entries)))
        table = torch.zeros(6, size, width, dtype=torch.long)
        table[2], table[5] = 1, self.cache.junk  # padding sees one entry, and writes to one that nothing sees
        for row, (y, computed) in enumerate(zip(layouts, entries)):
            columns = [[column[i] for i in computed] for column in (y.token, y.position, y.prefix, y.begin, y.end)]
            table[:, row, : len(computed)] = torch.tensor([*columns, computed])
        n_keys = self.rounded(int(table[2:5].max()))  # here: later the host would have to wait for the device
        rows = [*rows, *[row for row in range(self.cache.batch) if row not in rows][: size - len(rows)]]
        inputs = [table, torch.tensor(rows)]
        if width > 1:
            inputs.append(self.columns_read(entries, readings, size))
        return self.compute(*(i.to(self.device) for i in inputs), n_keys=n_keys, first=rows == list(range(size)))

    def columns_read(self, entries: list[list[int]], readings: list[list[Reading]], size: int) -> Tensor:
        """(B, R) where in a pass the entries are that are read."""
        read = []
        for computed, mine in zip(entries, readings):
            column = {entry: n for n, entry in enumerate(computed)}
            read.append([column[entry] for reading in mine for entry in reading.entries])
        columns = torch.zeros(size, self.rounded(max(map(len, read))), dtype=torch.long)
        for row, mine in enumerate(read):
            columns[row, : len(mine)] = torch.tensor(mine)
        return columns

    def one_pass(self, table: Tensor, rows: Tensor, columns: Tensor | None = None, *, n_keys: int,
                 first: bool) -> Tensor:  # fmt: skip
        """What the device does in a pass."""
        self.cache.select(rows, first)
        token, position, ranges, entry = table[0], table[1], table[2:5].movedim(0, -1), table[5]
        return self.model(token, position, ranges, self.cache, entry, n_keys, columns)


class Predictions:
    """What a pass predicts for its answers, and what they draw from it."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def predict(self, live: list[Answer], hidden: Tensor,
                readings: list[list[Reading]]) -> list[tuple[list[Reply], Tensor]]:  # fmt: skip
        """For each answer a reply to each of its readings, and the logits (N, V) that they were drawn from.

        Raises ValueError if the model predicts no numbers.
        """
        drawn, logits, order = [], {}, []
        for in_spans in (False, True):  # which tokens can be drawn differs
            rows = [row for row, answer in enumerate(live) if answer.phase.in_spans == in_spans]
            if rows:
                lines, seen = self.draw([live[r] for r in rows], [hidden[r] for r in rows], [readings[r] for r in rows])
                drawn.append(lines)
                logits |= zip(rows, seen)
                order += rows
        table = iter(torch.cat(drawn).tolist())  # the host waits for the device, once per pass
        replies = [[] for _ in live]
        for row, reading in ((row, reading) for row in order for reading in readings[row]):
            tokens, kept, cut, finite = zip(*islice(table, len(reading.entries)))
            if not all(finite):
                raise ValueError("the model's predictions are not finite: its weights are broken or too large")
            replies[row].append(Reply(reading, [*tokens], [*map(bool, kept)], any(cut)))
        return [(replies[row], logits[row]) for row in range(len(live))]

    def draw(self, live: list[Answer], hidden: list[Tensor],
             readings: list[list[Reading]]) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """For each entry that these answers read a line (token, kept, cut, finite), and each answer's logits."""
        phase, config, asked = live[0].phase, live[0].config, [reading for mine in readings for reading in mine]
        counts = [sum(len(reading.entries) for reading in mine) for mine in readings]
        generators = [(answer.generator, n) for answer, n in zip(live, counts)]
        states = torch.cat([states[:n] for states, n in zip(hidden, counts)])
        logits = self.model.logits(states, self.tokenizer.pad + 1 if phase.in_spans else None).float()
        cut = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        if any(reading.allowed is not None for reading in asked):
            likeliest = self.only([reading.endless for reading in asked], logits).argmax(-1, keepdim=True)
            logits = self.only([reading.allowed for reading in asked], logits)
            cut = logits.gather(-1, likeliest)[:, 0] == -torch.inf
        finite = logits.amax(-1).isfinite()
        if config.temperature:  # what cannot be drawn from ends in `predict`, not in a device's assertion
            logits = logits.where(finite[:, None], 0)
        token, kept = phase.draw(logits, asked, config, generators, self.tokenizer.pad)
        return torch.stack([token, kept.long(), cut.long(), finite.long()], dim=1), logits.split(counts)

    def only(self, masks: list[Tensor | None], logits: Tensor) -> Tensor:
        """The logits (N, V); -inf where a reading's mask leaves a token out. None leaves out none."""
        any_token = torch.ones(self.tokenizer.vocab_size, dtype=torch.bool)
        masks = torch.stack([any_token if mask is None else mask for mask in masks])
        return logits.where(masks.to(logits.device), -torch.inf)


# ---------------------------------------------------------------- the sampler


class Sampler:
    """Answers prompts with a model by a method. `decoders`: the phases of each method; by default those that `config`
    asks for."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config: SampleConfig,
                 method: MethodConfig = MethodConfig(), decoders: dict[str, Decoder] | None = None,
                 around: Callable[[Layout], int] = lambda layout: 0):  # fmt: skip
        self.model, self.tokenizer, self.config, self.method = model.eval(), tokenizer, config, method
        self.decoders = decoders or (DECODERS_AHEAD if config.ahead else DECODERS)
        self.around = around  # puts a chat template around a prompt, and returns how many tokens that adds
        self.passes, self.predictions = Passes(model), Predictions(model, tokenizer)
        self.device = self.passes.device
        # on a GPU a pass over more positions costs about the same; on a CPU one token need not wait for a hundred
        self.turns = ((False, True),) if devices.has_graphs(self.device) else ((False,), (True,))  # of phases in spans?

    @classmethod
    def load(cls, path: str | Path, config: SampleConfig, device: torch.device | str = "cpu") -> "Sampler":
        """From a checkpoint, which says how it was trained, or a pretrained model as it is, from its folder.

        Raises ValueError if it cannot be sampled from, or if a setting would change nothing.
        """
        model, tokenizer, info, around = model_to_sample(locate(path), device)
        method = decoded_as(trained_by(info, path), config.decode)
        refuse_idle(config, method)
        return cls(model, tokenizer, config, method, around=around)

    def begin(self, prompts: Sequence[str]) -> list[Answer]:
        """Answers to prompts in their first phase. Raises ValueError if a prompt is too long."""
        answers, config, method, decoder = [], self.config, self.method, self.decoders[self.method.method]
        for i, prompt in enumerate(prompts):
            answer = Answer(prompt, self.tokenizer, config, method, decoder, config.seed + i, self.device)
            answer.max_length += self.around(answer.layout)
            if answer.max_length > LONGEST:
                raise ValueError(f"the prompt {prompt[:40]!r}... has {len(answer.layout)} tokens: "
                                 f"with --max_tokens {config.max_tokens} that is more than {LONGEST}")  # fmt: skip
            answer.phase = next_round(answer)
            answers.append(answer)
        self.passes.reserve(len(answers), max((answer.max_length for answer in answers), default=0))
        return answers

    @torch.inference_mode()
    def answer(self, prompts: Sequence[str], watch: Callable | None = None,
               probe: Callable | None = None) -> list[Answer]:  # fmt: skip
        """Answer prompts together.

        `watch`: called with each answer after each of its passes. `probe`: called with each answer in each of its
        passes, before it takes its replies, with these and the logits (N, V) that they were drawn from.
        """
        start = time.perf_counter()
        answers = self.begin(prompts)
        while any(answer.phase for answer in answers):
            for in_spans in self.turns:
                rows = [row for row, a in enumerate(answers) if a.phase and a.phase.in_spans in in_spans]
                if rows:
                    self.step([answers[row] for row in rows], rows, probe)
                for answer in (answers[row] for row in rows):
                    answer.seconds = time.perf_counter() - start
                    if watch:
                        watch(answer)
        return answers

    def step(self, live: list[Answer], rows: list[int], probe: Callable | None = None) -> None:
        """One forward pass for some answers, in these rows of the cache."""
        for answer in live:
            answer.phase.prepare()
        entries, readings = [a.phase.entries() for a in live], [a.phase.readings() for a in live]
        hidden = self.passes.forward([answer.layout for answer in live], entries, readings, rows)
        drawn = self.predictions.predict(live, hidden, readings)
        for answer, computed, (replies, logits) in zip(live, entries, drawn):
            if probe:
                probe(answer, replies, logits)
            answer.positions += len(computed)
            answer.phase = answer.phase.take(replies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--prompt", action="append", required=True, help="a question; may be given several times")
    parser.add_argument("--checkpoint", default="checkpoints/tasks/planned.safetensors", help="(default: %(default)s)")
    parser.add_argument("--device", default="auto", help=f"{', '.join(devices.CHOICES)} (default: %(default)s)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    output.add_argument("--html", metavar="FILE", help="also write a page that plays the answers pass by pass")
    add_settings(parser, SampleConfig)
    args = parser.parse_args()
    config, path = pick(SampleConfig, args), locate(args.checkpoint)
    refuse_overwriting([path], html=args.html or "")
    sampler = Sampler.load(path, config, devices.find(args.device))
    if args.json:
        print(*(json.dumps(a.result(), ensure_ascii=False) for a in sampler.answer(args.prompt)), sep="\n")
        return
    races, method = [], sampler.method.method
    for n, prompt in enumerate(args.prompt):
        sampler.config = replace(config, seed=config.seed + n)
        races.append(Race(prompt, [(METHODS[method].title, method, record(sampler.answer, prompt, watch=Screen()))]))
    if args.html:
        print(write_page(args.html, races))
    sys.stderr.write("" if path.is_dir() else introduction(path))


if __name__ == "__main__":
    command(main)
