"""tokenizer.json of the `tokenizers` library to our tokenizer and back.

Byte-level BPE comes in two forms. tokenizer.json lists merges, pairs of tokens in the order in which they are applied;
tiktoken ranks tokens, and merges the neighbours that together have the lowest rank. They cut every text alike if the
pair that makes each token under the ranks is one of the merges, and in the same order: `read` checks that.
"""

import json
from pathlib import Path
from typing import Any

from tags import TAGS
from tokenizer import MAX_LENGTH, Tokenizer

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# the same where digits were cut off first: white space before them is one word, too
DIGITS_GPT2 = r"\p{N}%s|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")  # fmt: skip
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")  # fmt: skip

_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are written as the character they number
_HIDDEN = [b for b in range(256) if b not in _PRINTED]  # the others: as the characters from 256 on
CHARACTER = {**{b: chr(b) for b in _PRINTED}, **{b: chr(256 + n) for n, b in enumerate(_HIDDEN)}}
BYTE = {character: b for b, character in CHARACTER.items()}
ADVICE = "take a model with byte-level BPE, such as Llama 3, SmolLM2, Qwen2.5 or Qwen3"


def names() -> list[str]:
    """The control tags and lengths in the order of their ids, as `Tokenizer` names them."""
    return [*TAGS, *(f"<length {i}>" for i in range(1, MAX_LENGTH + 1))]


# ---------------------------------------------------------------- reading


def read(folder: str | Path, unit: int = 10) -> tuple[Tokenizer, list[int | None]]:
    """The tokenizer of a pretrained model, and for each of its tokens the row of the model's embedding, or None.

    Special tokens of the model, and tokens that no text gives, are left out; tags and lengths are new, unless the
    model has them already. Raises ValueError, naming the file, for a tokenizer of another kind.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        kind = "a SentencePiece tokenizer (tokenizer.model)" if path.with_suffix(".model").exists() else "no tokenizer"
        raise ValueError(f"{folder} has {kind}, expected tokenizer.json: {ADVICE}")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return _read(saved, unit)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a tokenizer of the tokenizers library ({error!r}): copy it again") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read(saved: dict[str, Any], unit: int) -> tuple[Tokenizer, list[int | None]]:
    model, added = saved["model"], {token["content"]: token["id"] for token in saved.get("added_tokens", [])}
    if model.get("byte_fallback") and "ByteLevel" in json.dumps(saved.get("pre_tokenizer")):
        raise ValueError("byte-level BPE with byte_fallback, expected without: transformers writes this for a GGUF file, and "
                         "cuts texts wrong; python pretrained/gguf.py FILE.gguf writes a right one")  # fmt: skip
    if model.get("byte_fallback") or (saved.get("decoder") or {}).get("type") == "Metaspace":
        raise ValueError(f"a SentencePiece tokenizer, expected byte-level BPE: {ADVICE}")
    if model.get("type", "BPE") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError(f"a tokenizer of type {model.get('type')}, expected byte-level BPE: {ADVICE}")
    for text, i in (*model["vocab"].items(), *added.items()):
        if type(i) is not int or not 0 <= i < 1 << 31:
            raise ValueError(
                f"the token {text[:20]!r} has the id {json.dumps(i)[:60]}, expected a whole number: copy it again"
            )
    pattern, normal = pattern_of(saved.get("pre_tokenizer")), normal_form(saved.get("normalizer"))
    merges = [tuple(map(to_bytes, m.split(" ") if isinstance(m, str) else m)) for m in model["merges"]]
    priority = {pair: n for n, pair in enumerate(merges)}  # in the library too, a pair that comes twice is the later
    order = {left + right: n for n, (left, right) in reversed([*enumerate(merges)]) if priority[left, right] == n}
    ids = {to_bytes(text): i for text, i in model["vocab"].items() if text not in added or to_bytes(text, "") in order}
    longer = sorted((t for t in ids if len(t) > 1), key=lambda t: (order.get(t, len(merges)), ids[t]))
    kept = consistent(longer, priority, keep_all=bool(model.get("ignore_merges")))
    tokens = [bytes([b]) for b in range(256)] + kept
    tokenizer = Tokenizer(tokens, unit, pattern, normal)
    return tokenizer, [ids.get(token) for token in tokens] + [added.get(name) for name in names()]


def to_bytes(text: str, otherwise: str | None = None) -> bytes:
    """The bytes that a token's text in tokenizer.json is written for. Raises ValueError if it is not of that kind."""
    try:
        return bytes(BYTE[character] for character in text)
    except KeyError as error:
        if otherwise is not None:
            return otherwise.encode()
        raise ValueError(f"the token {text[:20]!r} has the character {error}, which byte-level BPE lacks: "
                         f"{ADVICE}") from None  # fmt: skip


def pattern_of(pre_tokenizer: dict[str, Any] | None) -> str:
    """The regular expression by which a text is cut into words. Raises ValueError for another way to cut."""
    steps = pre_tokenizer and (
        pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    )
    *before, last = steps or [{"type": None}]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True) or len(before) > 1:
        raise ValueError(f"its pre_tokenizer is not one of byte-level BPE without a prefix space: {ADVICE}")
    if not before:
        return GPT2
    (step,), own = before, last.get("use_regex", True)
    if step["type"] == "Digits" and own:
        return DIGITS_GPT2 % ("" if step["individual_digits"] else "+")
    if step["type"] == "Split" and not own and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"]["Regex"]
    raise ValueError(
        f"its pre_tokenizer cuts words by {step['type']}, expected Split by a regular expression or Digits"
    )


def normal_form(normalizer: dict[str, Any] | None) -> str | None:
    """The Unicode normal form that a text gets first, or None. Raises ValueError for another normalizer."""
    steps = normalizer and (normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer])
    forms = [step["type"] for step in steps or []]
    if len(forms) > 1 or not set(forms) <= {"NFC", "NFD", "NFKC", "NFKD"}:
        raise ValueError(f"its normalizer is {', '.join(forms)}, expected a Unicode normal form or none: {ADVICE}")
    return forms[0] if forms else None


def last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that are merged to this one under the ranks; None if it does not come about by merging."""
    parts, none = [bytes([b]) for b in token], len(ranks)
    while len(parts) > 2:
        pairs = [ranks.get(left + right, none) for left, right in zip(parts, parts[1:])]
        at = pairs.index(min(pairs))
        if pairs[at] == none:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)


def consistent(tokens: list[bytes], priority: dict[tuple[bytes, bytes], int], keep_all: bool) -> list[bytes]:
    """The tokens that ranks in this order make of texts; with `keep_all` also those that only a whole word can be.

    Raises ValueError if ranks would cut some text in another way than the merges do.
    """
    ranks, kept, latest = {token: n for n, token in enumerate(tokens)}, [], 0
    for token in tokens:
        pair = last_pair(token, ranks)
        place = priority.get(pair, -1) if pair else latest
        if place < latest:
            raise ValueError(f"the merges of {token!r} do not follow the order of its tokens, so tiktoken would cut some "
                             f"texts in another way: {ADVICE}")  # fmt: skip
        latest = place
        if pair or keep_all:
            kept.append(token)
    return kept


# ---------------------------------------------------------------- writing


def written(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as the object of a tokenizer.json: tags and lengths are special tokens with the same ids."""
    text = lambda token: "".join(CHARACTER[b] for b in token)
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    pairs = [last_pair(token, ranks) for token in tokenizer.tokens if len(token) > 1]
    normal = {"type": tokenizer.normal} if tokenizer.normal else None
    if tokenizer.pattern is None:  # as `_spaced` in tokenizer.py
        strip, prepend = {"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "Prepend", "prepend": " "}
        replace = {"type": "Replace", "pattern": {"String": "\n"}, "content": "\n "}
        normal = {"type": "Sequence", "normalizers": [strip, prepend, replace]}
    pattern = tokenizer.pattern or tokenizer.PATTERN
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": tokenizer.pad + n, "content": name, **special} for n, name in enumerate(names())],
        "normalizer": normal,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # as tiktoken, a word that is a token is not cut
            "vocab": {text(token): rank for rank, token in enumerate(tokenizer.tokens)},
            "merges": [[*map(text, pair)] for pair in pairs if pair],
        },
    }


def cuts_as_qwen2(tokenizer: Tokenizer) -> bool:
    """Whether transformers' Qwen2Tokenizer, which reads of a tokenizer.json only tokens and merges, cuts texts alike."""
    by_merging = 256 + len(written(tokenizer)["model"]["merges"])
    return (tokenizer.pattern, tokenizer.normal) == (QWEN2, "NFC") and len(tokenizer.tokens) == by_merging
