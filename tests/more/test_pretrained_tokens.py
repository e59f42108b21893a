"""tokenizer.json of published models: texts are cut as its merges say, and as the `tokenizers` library cuts them."""

import json
import random
import unicodedata

import pytest
import regex
from conftest import CORPUS, each, hostile
from published import AWKWARD, BYTES, CUTS, LLAMA3, SPECIAL, SPLIT, awkward, library, tokenizer_json

from pretrained import tokens
from pretrained.tokens import CHARACTER, GPT2
from tags import TAGS
from tokenizer import Tokenizer


def saved_in(folder, saved):
    (folder / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=CUTS)
def both(request, tmp_path_factory):
    """A tokenizer.json, the folder that it is in, and what is read from it."""
    saved = tokenizer_json(request.param)
    folder = saved_in(tmp_path_factory.mktemp("model"), saved)
    return saved, folder, *tokens.read(folder)


def words_of(text, saved):
    """The words of a text, step by step as the pre_tokenizer says."""
    steps = saved["pre_tokenizer"].get("pretokenizers", [saved["pre_tokenizer"]])
    words = [text]
    for step in steps:
        if step["type"] == "Digits":
            words = [part for word in words for part in regex.findall(r"\p{N}|\P{N}+", word)]
        else:
            pattern = GPT2 if step.get("use_regex") else step.get("pattern", {}).get("Regex")
            words = [part for word in words for part in regex.findall(pattern, word)] if pattern else words
    return words


def merged(word, saved):
    """The ids of a word: the first merge of the list that applies, at its first place, until none does."""
    model, parts = saved["model"], [CHARACTER[b] for b in word.encode()]
    if model["ignore_merges"] and "".join(parts) in model["vocab"]:
        return [model["vocab"]["".join(parts)]]
    while pairs := [pair for pair in model["merges"] if tuple(pair) in zip(parts, parts[1:])]:
        at = next(i for i in range(len(parts)) if parts[i : i + 2] == pairs[0])
        parts[at : at + 2] = ["".join(pairs[0])]
    return [model["vocab"][part] for part in parts]


def test_texts_are_cut_as_the_merges_say(both):
    saved, _, tokenizer, rows = both
    rng = random.Random(0)
    for text in [*CORPUS, *AWKWARD, *(awkward(rng) for _ in range(150))]:
        whole = text.strip()
        normal = unicodedata.normalize("NFC", whole) if saved["normalizer"] else whole
        expected = [i for word in words_of(normal, saved) for i in merged(word, saved)]
        assert [rows[i] for i in tokenizer.encode(text)] == expected, repr(text)
        assert tokenizer.decode(tokenizer.encode(text)) == normal.strip()


def test_texts_are_cut_as_the_library_cuts_them(both):
    """A special token that is typed in a text is text."""
    library("tokenizers")
    import tokenizers

    saved, folder, tokenizer, rows = both
    theirs, rng = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), random.Random(1)
    theirs.encode_special_tokens = True
    for text in [*CORPUS, *AWKWARD, *(awkward(rng) for _ in range(3000)), *(hostile(rng) for _ in range(500))]:
        text = text.strip()
        assert [rows[i] for i in tokenizer.encode(text)] == theirs.encode(text).ids, repr(text)


@pytest.mark.parametrize("digits", [True, False])
def test_a_tokenizer_that_the_library_trained_is_cut_the_same(tmp_path, digits):
    library("tokenizers")
    from tokenizers import Tokenizer as Theirs
    from tokenizers import models, pre_tokenizers, trainers

    theirs = Theirs(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=digits), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()[:200]  # bytes that the vocabulary lacks become new tokens
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    rng = random.Random(2)
    theirs.train_from_iterator([*CORPUS * 3, *(awkward(rng) for _ in range(300))], trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    tokenizer, rows = tokens.read(tmp_path)
    missing = {tokenizer.tokens[i] for i in range(tokenizer.pad) if rows[i] is None}
    assert all(len(token) == 1 for token in missing)
    for text in [*CORPUS, *AWKWARD, *(awkward(rng) for _ in range(2000))]:
        text = text.strip()
        if not missing & {bytes([b]) for b in text.encode()}:
            assert [rows[i] for i in tokenizer.encode(text)] == theirs.encode(text).ids, repr(text)


def test_a_token_is_its_row_of_the_embedding_and_tags_are_new(both):
    saved, _, tokenizer, rows = both
    ids = saved["model"]["vocab"]
    for token, row in list(zip(tokenizer.tokens, rows)):
        assert ids["".join(CHARACTER[b] for b in token)] == row
    assert len(rows) == tokenizer.vocab_size and set(rows[tokenizer.pad :]) == {None}
    assert not {text.encode() for text in SPECIAL} & set(tokenizer.tokens), "special tokens are left out"


def test_tags_that_the_model_has_already_keep_their_rows(tmp_path):
    saved = tokenizer_json()
    saved["added_tokens"].append({"id": 390, "content": TAGS[1]})
    tokenizer, rows = tokens.read(saved_in(tmp_path, saved))
    assert rows[tokenizer.mask] == 390 and rows[tokenizer.pad] is None


def test_tokens_that_no_text_gives_are_left_out_unless_a_whole_word_can_be_one(tmp_path):
    saved = tokenizer_json("smollm")
    saved["model"]["vocab"]["zqzq"] = 350
    assert b"zqzq" not in tokens.read(saved_in(tmp_path, saved))[0].tokens
    saved["model"]["ignore_merges"] = True
    tokenizer, rows = tokens.read(saved_in(tmp_path, saved))
    assert [rows[i] for i in tokenizer.encode("zqzq")] == [350]


def test_merges_as_texts_are_read_too(tmp_path):
    saved = tokenizer_json()
    pairs, saved["model"]["merges"] = saved["model"]["merges"], [" ".join(m) for m in saved["model"]["merges"]]
    assert pairs and tokens.read(saved_in(tmp_path, saved))[0].tokens == tokens._read(tokenizer_json(), 10)[0].tokens


def test_a_checkpoint_keeps_the_pattern_and_the_normal_form(both):
    _, _, tokenizer, _ = both
    again = Tokenizer.from_json(tokenizer.to_json())
    assert (again.pattern, again.normal, again.tokens) == (tokenizer.pattern, tokenizer.normal, tokenizer.tokens)
    assert again.encode("don't e\u0301 123   x") == tokenizer.encode("don't e\u0301 123   x")


def test_a_tokenizer_with_a_broken_pattern_or_normal_form_is_refused(both):
    for name, value in each([("pattern", 3), ("pattern", "("), ("normal", "NFX"), ("normal", 1)]):
        with pytest.raises(ValueError):
            Tokenizer.from_json(json.dumps(json.loads(both[2].to_json()) | {name: value}))


# ---------------------------------------------------------------- written


@pytest.mark.parametrize("own", [True, False])
def test_what_is_written_is_cut_the_same_by_the_library_tags_included(tmp_path, both, tok, own):
    library("tokenizers")
    import tokenizers

    tokenizer, rng = tok if own else both[2], random.Random(3)
    theirs = tokenizers.Tokenizer.from_file(str(saved_in(tmp_path, tokens.written(tokenizer)) / "tokenizer.json"))
    for text in [*CORPUS, *AWKWARD, *(awkward(rng) for _ in range(1000))]:
        text = text.replace("<eos>", "").replace("[PAD]", "").strip()
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)
    assert theirs.encode("<user>the sea<assistant>").ids == [tokenizer.user, *tokenizer.encode("the sea"),
                                                              tokenizer.assistant]  # fmt: skip


def test_what_is_written_is_read_again_tags_included(tmp_path, both):
    _, _, tokenizer, _ = both
    again, rows = tokens.read(saved_in(tmp_path, tokens.written(tokenizer)))
    assert again.to_json() == tokenizer.to_json() and rows == [*range(tokenizer.vocab_size)]


# ---------------------------------------------------------------- refused


def refused(folder):
    with pytest.raises(ValueError) as error:
        tokens.read(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}


REFUSED = [
    ({"model": {"byte_fallback": True}}, "pretrained/gguf.py"), ({"decoder": METASPACE}, "SentencePiece"),
    ({"model": {"type": "Unigram"}}, "Unigram"), ({"model": {"type": "WordPiece"}}, "WordPiece"),
    ({"normalizer": PREPEND}, "normalizer is Prepend"), ({"pre_tokenizer": METASPACE}, "pre_tokenizer"),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}}, "NFC, NFKC, expected a"),
    ({"pre_tokenizer": None}, "pre_tokenizer"), ({"pre_tokenizer": BYTES | {"add_prefix_space": True}}, "prefix space"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"String": " "}}, BYTES]}}, "Split"),
    ({"model": {"vocab": {"▁the": 1}}}, "▁"), ({"model": {"end_of_word_suffix": "</w>"}}, "BPE"),
]  # fmt: skip


def test_another_kind_of_tokenizer_is_refused_by_name(fresh):
    for change, words in each(REFUSED):
        tmp_path = fresh()
        saved = tokenizer_json()
        for name, value in change.items():
            saved[name] = saved[name] | value if name == "model" else value
        message = refused(saved_in(tmp_path, saved))
        assert words in message and ("Qwen3" in message or "expected" in message)


def test_an_id_that_is_no_whole_number_is_refused_with_its_token(tmp_path):
    for value in each(["97", 97.5, -1, True, None, 2**63, 10**400]):
        saved = tokenizer_json()
        saved["model"]["vocab"]["a"] = value
        assert "the token 'a' has the id" in refused(saved_in(tmp_path, saved))
        saved = tokenizer_json()
        saved["added_tokens"][1]["id"] = value
        assert "the token '<|im_start|>' has the id" in refused(saved_in(tmp_path, saved))


def of_merges(merges):
    """A tokenizer of bytes and these merges."""
    vocab = {CHARACTER[b]: b for b in range(256)}
    for pair in merges:
        vocab.setdefault("".join(pair), len(vocab))
    saved = tokenizer_json("gpt2")
    return saved | {"added_tokens": [], "model": saved["model"] | {"vocab": vocab, "merges": merges}}


def test_of_a_pair_that_comes_twice_the_last_place_counts(tmp_path):
    """So in the library: b c is merged before a b."""
    tokenizer, _ = tokens.read(saved_in(tmp_path, of_merges([["a", "b"], ["b", "c"], ["a", "b"]])))
    assert [tokenizer.tokens[i] for i in tokenizer.encode("abc")] == [b"a", b"bc"]
    theirs = library("tokenizers").Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("abc").tokens == ["a", "bc"]


def test_merges_that_ranks_cannot_express_are_refused(tmp_path):
    """Of "abc" the merges first make bc, and then no pair applies; ranks would go on to abc. Of "cbacb" they make
    cb and acb, ranks cbac and b: there, two merges that are neighbours are in the other order. Of "ccc" they make cc c."""
    for merges in each([[["c", "cc"], ["c", "c"]], [["b", "c"], ["a", "b"], ["ab", "c"]],
                        [["a", "c"], ["c", "b"], ["b", "ac"], ["c", "bac"], ["ac", "b"], ["cb", "ac"]]]):  # fmt: skip
        assert "tiktoken" in refused(saved_in(tmp_path, of_merges(merges)))


def test_files_that_are_missing_cut_or_something_else_are_refused(tmp_path):
    assert "no tokenizer" in refused(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    assert "SentencePiece" in refused(tmp_path) and "Qwen3" in refused(tmp_path)
    for text in ("", "{", "[]", "3", "{}", '{"model": 3}', '{"model": {"merges": [3], "vocab": {}}}', "[" * 100_000):
        (tmp_path / "tokenizer.json").write_text(text)
        refused(tmp_path)
    saved = tokenizer_json()
    saved["pre_tokenizer"]["pretokenizers"][0] = SPLIT | {"pattern": {"Regex": LLAMA3 + "("}}
    refused(saved_in(tmp_path, saved))
