"""Instruction data from a pretrained model's own answers (data/instruct/own.py)."""

import json
import sys

import pytest
from conftest import each
from published import published

from data.instruct import own
from plumbing.settings import command

LONG = "1. Hammer: for nails.\n2. Saw: for wood."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return published(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def ask(monkeypatch, folder):
    def ask(out, **settings):
        options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        monkeypatch.setattr(
            sys, "argv", ["own.py", "--model", str(folder), "--out", str(out), *options, "--device", "cpu"]
        )
        command(own.main)
        return [json.loads(row) for row in out.read_text().splitlines()] if out.exists() else []

    return ask


def test_no_prompt_is_made_twice_and_the_seed_decides_their_order():
    made = own.prompts(0)
    assert len({*made}) == len(made) > 1500 and own.prompts(0) == made != own.prompts(1)
    assert sorted(own.prompts(1)) == sorted(made) and not any("{" in prompt for prompt in made)


def test_a_good_answer_has_no_item_twice_and_a_list_where_one_is_asked_for():
    for text, once in each([(LONG, True), (LONG + "\n3. Hammer: for metal.", False), (LONG + "\n\n\n", True),
                            ("Cut the wood first.\n- Cut the wood with care.", False),
                            ("Cut the wood first.\n- Cut the cloth with care.", True)]):  # fmt: skip
        assert own.good("Name two tools.", text) == own.good("What is a saw? Answer in two sentences.", text) == once
    for text in each(["Cut the wood.", "1. Cut it. 2. Sand it.\n"]):
        assert own.good("How? Answer in two sentences.", text) and not own.good("Name two tools.", text)


def test_whole_answers_are_kept_and_an_interrupted_call_goes_on(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(own.Sampler, "answer", lambda self, prompts: [Said(prompt) for prompt in prompts])
    whole = ask(tmp_path / "whole", prompts=12, batch=4)
    kept = [prompt for prompt in own.prompts(0)[:12] if Said(prompt).good]
    assert [row["instruction"] for row in whole] == kept and {row["output"] for row in whole} == {LONG}
    ask(tmp_path / "part", prompts=8, batch=4)
    assert ask(tmp_path / "part", prompts=12, batch=4) == whole
    (tmp_path / "other").write_text('{"instruction": "otter"}\n')
    with pytest.raises(SystemExit, match="something else than answers to these prompts"):
        ask(tmp_path / "other", prompts=12)


def test_a_real_sampler_answers_under_the_models_own_template(ask, tmp_path):
    assert isinstance(ask(tmp_path / "own", prompts=2, max_tokens=16), list)


class Said:
    """An answer: of a third of the prompts whole, of others cut, looping, or with an item twice."""

    def __init__(self, prompt):
        kind = len(prompt) % 5
        self.prompt, self.cut, self.looping, self.good = prompt, kind == 0, kind == 1, kind > 2
        self.text = LONG + "\n3. Saw: for metal." * (kind == 2)

    def result(self):
        return {"text": self.text}
