"""Prompts that a model does not know: what it was trained on is said, and that an answer repeats itself."""

import io
import sys

import pytest
import torch
from conftest import each, small_model
from runs import run

import sample
from config import MethodConfig, SampleConfig
from data import read_split
from masks import PLAN, PROMPT
from plumbing.settings import ROOT, command
from sample import Sampler
from show.terminal import Screen
from tags import Example, Round
from tokenizer import Tokenizer, loops
from training.checkpoint import CheckpointError, introduction, load_checkpoint, save_checkpoint
from training.run import introduce


@pytest.fixture
def say(monkeypatch, capsys):
    """Run sample.py: what it prints, and what it says beside that."""

    def say(*options):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--prompt", "otter", "--device", "cpu", *map(str, options)])
        command(sample.main)
        return capsys.readouterr()

    return say


# ---------------------------------------------------------------- what a checkpoint was trained on


def test_prompts_to_try_are_short_and_of_different_families():
    def introduced(*prompts):
        return introduce(ROOT / "data" / "tasks", [Example(p, (Round("x"),), family) for p, family in prompts])

    many = [("long prompt", "a"), ("a", "a"), ("", "a"), ("bb", "a"), ("cccc", "b"), ("ddd", "c"), ("eeeee", "d")]
    assert introduced(*many) == {"data": "tasks", "prompts": ["a", "ddd", "cccc"]}
    assert introduced(*many[:4])["prompts"] == ["a", "bb", "long prompt"], "of one family"
    assert introduced(("a", ""), ("a", ""))["prompts"] == ["a"]


def test_sample_says_what_its_checkpoint_was_trained_on_beside_the_answer(folder, tmp_path, say, capsys):
    run(folder, tmp_path, steps=1)
    path = tmp_path / "model.safetensors"
    model, tokenizer, info, _ = load_checkpoint(path)
    capsys.readouterr()
    shown, said = say("--checkpoint", path, "--max_tokens", 20)
    name, *prompts = said.splitlines()
    assert repr(folder.name) in name and len(prompts) == 3
    known = {" ".join(example.prompt.split()) for example in read_split(folder / "val.jsonl", tokenizer)}
    assert {prompt.strip() for prompt in prompts} <= known
    assert say("--checkpoint", path, "--max_tokens", 20, "--json").err == ""
    del info["trained_on"]
    save_checkpoint(path, model, tokenizer, info)  # as older files are
    assert say("--checkpoint", path, "--max_tokens", 20) == (shown, "")


def test_what_a_checkpoint_says_is_printed_without_control_codes_or_refused_in_a_line(model, tokenizer, tmp_path):
    path = tmp_path / "model.safetensors"

    def says(trained_on):
        save_checkpoint(path, model, tokenizer, {"method": vars(MethodConfig()), "trained_on": trained_on})
        return introduction(path)

    assert says({"data": "a\x1b[2J", "prompts": ["b\nc\x9b"]}).splitlines()[1:] == ["  b c?"]
    assert "\x1b" not in says({"data": "a\x1b[2J", "prompts": []})
    for wrong in each([7, "x", ["x"], {"data": "x"}, {"data": 7, "prompts": []}, {"data": "x", "prompts": [7]}]):
        with pytest.raises(CheckpointError, match="model.safetensors does not say as it should what it was trained on"):
            says(wrong)


def test_the_shipped_checkpoints_say_it_too():
    for path in each(sorted((ROOT / "checkpoints").glob("*/*.safetensors"))):
        name, *prompts = introduction(path).splitlines()
        data = {"towns": "named" if path.stem == "named" else "coupled", "smollm2": "mine"}.get(
            path.parent.name, path.parent.name
        )
        assert repr(data) in name and len(prompts) == 3 and max(map(len, [name, *prompts])) <= 80


def test_a_folder_is_told_from_a_checkpoint_and_its_file_is_named(tmp_path):
    for made, words in each([
        (".txt", "no model is in it, or not yet: a training saves its first after --validate_every updates"),
        *((f"{name}.safetensors", f"name a file in it: .*/{name}.safetensors") for name in ("b", "a", "model")),
    ]):  # fmt: skip
        (tmp_path / made).touch()
        with pytest.raises(CheckpointError, match=rf"{tmp_path} is a folder: {words}$"):
            load_checkpoint(tmp_path)


# ---------------------------------------------------------------- an answer that repeats itself


def test_tokens_repeat_themselves_if_of_16_in_a_row_at_most_5_differ():
    real = list(range(100, 140))
    for tokens in each([[1], [1, 2], [1, 2, 3, 4, 5], [1, 1, 2, 1, 3, 2, 2]]):
        looping = (tokens * 16)[:16]
        assert loops(looping) and loops(real + looping + real)
        assert not loops(looping[:15]) and not loops(real + looping[:10] + real)
    assert not loops(list(range(6)) * 9) and not loops(real) and not loops([])


def test_the_answers_of_the_data_sets_do_not_repeat_themselves():
    for folder in each([path for path in (ROOT / "data").iterdir() if (path / "test.jsonl").exists()]):
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        for example in read_split(folder / "test.jsonl", tokenizer)[:300]:
            parts = [
                part
                for r in example.rounds
                for part in (r.text, *(text for s in r.spans for text in (s.topic, s.text)))
            ]
            assert not loops([token for part in parts for token in tokenizer.encode(part)]), example.prompt


def test_an_answer_repeats_itself_in_what_it_says_and_not_in_its_prompt_or_pads(model, tokenizer):
    words = tokenizer.encode("Rivers and coasts, lakes and marshes; the otter swims in all of them.")
    sampler = Sampler(model, tokenizer, SampleConfig())
    for kind, tokens, looping in each([(PLAN, words[:1] * 20, True), (PLAN, words[:20], False), (PLAN, [], False),
                                       (PROMPT, words[:1] * 20, False), (PLAN, [tokenizer.pad] * 20, False)]):  # fmt: skip
        (answer,) = sampler.begin(["otter " * 20])
        answer.layout.write(tokens, kind, 0)
        assert answer.looping == answer.result()["looping"] == looping


def test_that_an_answer_repeats_itself_is_said_after_it_and_in_json(tokenizer):
    for looping in each([False, True]):
        model = small_model(tokenizer.vocab_size)
        if looping:
            model.logits = lambda hidden, n=None: torch.eye(tokenizer.vocab_size)[7].expand(len(hidden), -1)
        screen = io.StringIO()
        sampler = Sampler(model, tokenizer, SampleConfig(max_tokens=30), MethodConfig("ar"))
        (answer,) = sampler.answer(["otter"], watch=Screen(screen))
        assert answer.looping == answer.result()["looping"] == looping
        endings = "(cut: --max_tokens 30 has no room left)\n" * answer.cut + "(it repeats itself)\n" * looping
        assert screen.getvalue().partition("(")[2] == endings[1:]
    assert answer.cut, "both are said"
