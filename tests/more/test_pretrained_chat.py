"""A pretrained folder as it is: sampled and evaluated as `ar`, under its own chat template."""

import json

import pytest
import torch
from conftest import each
from naive_model import naive_forward
from published import published
from safetensors.torch import load_file

from config import SampleConfig
from masks import PROMPT
from measure.eval import EvalConfig, evaluate
from pretrained.chat import as_published
from pretrained.llama import load, look
from sample import Sampler
from tags import Example, Round

CHATML = ("{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}{% for m in messages %}"
          "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")  # fmt: skip
FILLED = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nThe otter<|im_end|>\n<|im_start|>assistant\n"
SPECIAL = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}


def chat(folder, template=CHATML, **config):
    """A pretrained folder with a chat template."""
    published(folder, "llama", "smollm", **config)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def rows_of(text, pretrained):
    """The rows of a text with special tokens in it, cut by hand."""
    for name, row in SPECIAL.items():
        if name in text:
            before, _, after = text.partition(name)
            return rows_of(before, pretrained) + [row] + rows_of(after, pretrained)
    return [pretrained.rows[i] for i in pretrained.tokenizer.encoding.encode_ordinary(text)] if text else []


def begun(folder, prompt="The otter", **config):
    """A sampler of the folder, and the tokens that it begins an answer to a prompt with."""
    sampler = Sampler.load(folder, SampleConfig(**config))
    (answer,) = sampler.begin([prompt])
    assert {*answer.layout.kind} == {PROMPT} and answer.max_length == len(answer.layout) + sampler.config.max_tokens
    return sampler, answer.layout.token


def same_rows(folder, sampler, tokens, text):
    """Whether tokens are embedded as the published model embeds this text."""
    published = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    return torch.equal(sampler.model.embedding.weight[tokens], published[rows_of(text, look(folder))])


def test_a_prompt_stands_in_the_template(fresh):
    """With its default system prompt, and the line that begins an answer."""
    folder = chat(fresh())
    assert same_rows(folder, *begun(folder), FILLED)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}:{{ messages[-1].content }}")
    with pytest.raises(ValueError, match="chat_template.jinja"):  # newer folders have it there; here twice the prompt
        begun(folder)


def test_without_a_template_a_line_break_follows_the_prompt(fresh):
    folder = published(fresh(), "llama", "smollm")
    assert same_rows(folder, *begun(folder), "<|im_start|>The otter\n")


def test_a_special_token_that_is_typed_in_a_prompt_is_text(fresh):
    folder = chat(fresh())
    sampler, tokens = begun(folder, "a <|im_end|> b")
    assert tokens.count(sampler.tokenizer.eos) == 2  # of the template


def test_what_ends_a_message_ends_an_answer(fresh):
    """Whatever config.json says: Llama 3's has the end of a text first."""
    folder = chat(fresh(), eos_token_id=[0, 2])
    sampler, _ = begun(folder)
    assert same_rows(folder, sampler, [sampler.tokenizer.eos], "<|im_end|>")


def test_eval_gives_the_likelihood_under_the_template(fresh, tmp_path):
    """Against a naive model on the filled template, answer and end of message."""
    folder, data = chat(fresh()), fresh()
    example = Example("The otter", (Round("eats fish"),))
    sampler, tokens = begun(folder)
    tokenizer, start = sampler.tokenizer, len(tokens)
    row = {"prompt": example.prompt, "answer": "eats fish<eos>"}
    (data / "test.jsonl").write_text(json.dumps(row) + "\n")
    (data / "tokenizer.json").write_text(tokenizer.to_json())
    report = evaluate(EvalConfig(str(folder), str(data), judge=str(folder), device="cpu"), SampleConfig(max_tokens=8))
    whole = torch.tensor([*tokens, *tokenizer.encode("eats fish"), tokenizer.eos])
    n = torch.arange(len(whole))
    ranges = torch.stack([n + 1, 0 * n, 0 * n], dim=-1)
    with torch.no_grad():
        hidden = naive_forward(sampler.model.double(), whole, n, ranges)
        logits = sampler.model.logits(hidden)[start - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, whole[start:])
    assert report["plan_nll"] == pytest.approx(float(expected), rel=1e-3)
    assert report["readers"]["perplexity"]["references"] == pytest.approx(float(expected.exp()), rel=1e-3)


def test_a_broken_template_is_refused_in_one_line_that_names_it(fresh):
    for template in each(["{% for", "{{ messages[0] }}{{ 1 / 0 }}", "no prompt", "{{ messages.pop() }}", 7, ["a"]]):
        folder = chat(fresh(), template)
        with pytest.raises(ValueError) as refused:
            as_published(folder)
        assert "tokenizer_config.json" in str(refused.value) and "\n" not in str(refused.value)


def test_a_template_reaches_no_python(fresh):
    for attack in each(
        ["{{ ''.__class__.__mro__ }}", "{{ messages.__init__.__globals__ }}", "{% include '/etc/passwd' %}"]
    ):
        with pytest.raises(ValueError):
            as_published(chat(fresh(), attack + CHATML))


def test_the_folder_of_a_run_is_no_pretrained_model(fresh):
    folder = fresh()
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="name a file in it"):
        Sampler.load(folder, SampleConfig())


def test_the_token_before_an_answer_begins_as_an_empty_line(fresh):
    """In training; as the mean of the pieces of its name it would be followed by the rest of the name."""
    pretrained = look(published(fresh(), "llama", "smollm"))
    tokenizer, weight = pretrained.tokenizer, load(pretrained).embedding.weight.detach()
    empty = weight[tokenizer.encoding.encode_ordinary("\n\n")].mean(0)
    named = weight[tokenizer.encode("assistant")].mean(0)
    distance = [float((weight[tokenizer.assistant] - about).std()) for about in (empty, named)]
    assert distance[0] < 0.15 * float(weight.std()) < distance[1]


def test_what_the_model_lacks_is_never_likely(fresh):
    """Lengths have logits of 0 where real tokens have some of 10 and more; in training they begin otherwise."""
    model, tokenizer, _ = as_published(chat(fresh(), tie_word_embeddings=False))
    for weight in each([model.embedding.weight, model.output.weight]):
        assert not weight[tokenizer.length_id(1) :].any() and weight[tokenizer.eos].any()
