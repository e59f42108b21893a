"""A pretrained model as it was published: it answers token by token (`ar`), under its own chat template if it has one.

The template, a text in the language Jinja, is filled in Jinja's sandbox, which keeps it from Python, files and network.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

from masks import PLAN, PROMPT, Layout
from model import Transformer
from plumbing import device as devices
from plumbing.settings import one_line
from pretrained.llama import load, look, read_json
from pretrained.lora import holds_adapters, load_adapted
from tokenizer import Tokenizer
from training.checkpoint import load_checkpoint

PROMPT_HERE, ANSWER_HERE = "\x1aprompt\x1a", "\x1aanswer\x1a"  # no template has these


@dataclass(frozen=True)
class Around:
    """What stands around a prompt in place of `<user>` and `<assistant>`."""

    before: list[int]
    after: list[int]

    def __call__(self, layout: Layout) -> int:
        """Put it around the prompt of a layout without spans. Returns how many tokens the layout has more now."""
        size, prompt = len(layout), layout.kind.count(PROMPT)
        tokens = layout.token[:]
        layout.cut(0)
        layout.write([*self.before, *tokens[1 : prompt - 1], *self.after], PROMPT, 0)
        layout.write(tokens[prompt:], PLAN, 0)
        return len(layout) - size


def model_to_sample(
    path: Path, device: torch.device | str
) -> tuple[Transformer, Tokenizer, dict[str, Any], Callable[[Layout], int]]:
    """The model of a checkpoint, whole or with adapters alone, or of a pretrained folder, in the type to sample in; its
    tokenizer, how it was trained, and what puts its chat template, if it has one, around a prompt. Raises ValueError if
    the file or folder cannot be read."""
    if (path / "config.json").exists():
        model, tokenizer, around = as_published(path, device)
        info = {"method": {"method": "ar"}}
    elif holds_adapters(path):
        (model, tokenizer, info), around = load_adapted(path, device), lambda layout: 0
    else:
        model, tokenizer, info, _ = load_checkpoint(path, device)
        around = lambda layout: 0
    devices.use_threads(model.n_params())
    dtype = devices.sampling_dtype(device)
    return model.to(getattr(torch, model.config.half) if dtype == torch.float16 else dtype), tokenizer, info, around


def as_published(folder: Path, device: torch.device | str = "cpu") -> tuple[Transformer, Tokenizer, Around]:
    """The model of a folder, in float32, its tokenizer, and what stands around a prompt: without a template a line break
    after it.

    `ar` needs no tags but `<eos>`: special tokens of the model take their places. Raises ValueError, naming the file, for
    a folder that cannot be read.
    """
    pretrained = look(folder)
    tokenizer, special = pretrained.tokenizer, special_tokens(folder)
    rows, tags = pretrained.rows[: tokenizer.pad], pretrained.rows[tokenizer.pad :]
    begin, eos = tags[tokenizer.user - tokenizer.pad], tags[tokenizer.eos - tokenizer.pad]
    *texts, end = filled(folder, {row: text for text, row in special.items()}.get(begin, "")) or ("", "\n", "")
    eos = next((row for row in pieces(end, special) if isinstance(row, int)), eos)
    names = [row for row in {begin: 0, **dict.fromkeys(special.values())} if row not in (None, eos)]
    free = [token for token in range(tokenizer.user, tokenizer.vocab_size) if token != tokenizer.eos]
    place = {eos: tokenizer.eos, **dict(zip(names, free))}
    row_of = {token: row for row, token in place.items()}
    rows += [row_of.get(token) for token in range(tokenizer.pad, tokenizer.vocab_size)]
    model = load(replace(pretrained, rows=rows), device)
    with torch.no_grad():  # what the model lacks is never likely
        for name in ("embedding.weight", "output.weight")[: 2 - model.config.tied]:
            model.get_parameter(name)[[token for token, row in enumerate(rows) if row is None]] = 0
    before, after = ([token for piece in pieces(text, special) for token in
                      ([place[piece]] if isinstance(piece, int) else encoded(piece, tokenizer))] for text in texts)  # fmt: skip
    return model, tokenizer, Around(before or [place[begin]] * (begin in place), after)


def special_tokens(folder: Path) -> dict[str, int]:
    """The rows of the model's special tokens by their texts."""
    return {token["content"]: token["id"] for token in read_json(folder / "tokenizer.json").get("added_tokens", [])}


def pieces(text: str, special: dict[str, int]) -> Iterator[str | int]:
    """The text cut at special tokens, of which the row stands there."""
    marks = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    for piece in filter(None, re.split(f"({marks})", text) if marks else [text]):
        yield special.get(piece, piece)


def encoded(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a text with the white space at its ends."""
    return tokenizer.encoding.encode_ordinary(
        unicodedata.normalize(tokenizer.normal, text) if tokenizer.normal else text
    )


def filled(folder: Path, bos: str) -> tuple[str, str, str] | None:
    """What the chat template of a folder writes before a prompt, between prompt and answer, and after the answer."""
    path = folder / "chat_template.jinja"
    path = path if path.exists() else folder / "tokenizer_config.json"
    prompt = [{"role": "user", "content": PROMPT_HERE}]
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else "{}"
        template = text if path.suffix == ".jinja" else json.loads(text).get("chat_template")
        if template is None:
            return None
        render = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template).render
        begun = render(messages=prompt, add_generation_prompt=True, bos_token=bos)
        whole = render(messages=[*prompt, {"role": "assistant", "content": ANSWER_HERE}], bos_token=bos)
        (before, after), (_, end) = begun.split(PROMPT_HERE), whole.split(ANSWER_HERE)
    except Exception as error:  # a template may raise any
        raise ValueError(f"{path}: expected a chat template for a prompt and an answer ({one_line(repr(error))[:200]})"
                         ) from None  # fmt: skip
    return before, after, end
