"""From a data set and a pretrained model to a model of one's own: new tokens first, all weights or adapters, resuming."""

import json
import shutil
import sys

import pytest
import torch
from conftest import each, random_example
from published import library, published
from runs import Crash, assert_same, crash, interrupt, losses, said, settings
from safetensors.torch import load_file
from test_pretrained import our_logits

from config import MethodConfig, SampleConfig
from data import read_split, write_dataset
from measure.eval import EvalConfig, evaluate
from model import ModelConfig
from pretrained import export, lora
from pretrained.llama import load, look
from sample import Sampler
from tokenizer import Tokenizer
from train import Trainer
from training.checkpoint import load_checkpoint

FEW = dict(steps=6, warmup=0, validate_every=3, adam_lr=0.01)


@pytest.fixture(scope="module")
def data(tokenizer, tmp_path_factory):
    """A data set with a tokenizer of its own, whose lengths are not the model's."""
    folder = tmp_path_factory.mktemp("data")
    examples = [random_example(seed, tokenizer) for seed in range(12)]
    write_dataset(folder, {"train": examples[:8], "val": examples[8:10], "test": examples[10:]}, 256 + 74 + 40, 4)
    return folder


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model_folder(request, tmp_path_factory):
    return published(tmp_path_factory.mktemp("model"), request.param, tie_word_embeddings=request.param != "llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One pretrained model, for what does not depend on its kind."""
    return published(tmp_path_factory.mktemp("model"), "qwen2.5")


def trainer(data, out, folder, **changed):
    rate = {} if changed.get("lora") else {"lr": 0.01}  # adapters are trained by AdamW alone
    config = settings(data, out, **{**FEW, **rate, "init": str(folder), **changed})
    return Trainer(config, ModelConfig(), MethodConfig("planned"))


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---------------------------------------------------------------- data


def test_span_lengths_are_counted_anew_with_the_models_tokenizer_in_the_data_sets_unit(data, folder, tmp_path):
    made = trainer(data, tmp_path, folder)
    tokenizer = made.tokenizer
    assert tokenizer.tokens == look(folder).tokenizer.tokens and tokenizer.unit == 4
    old, new = read_split(data / "train.jsonl"), read_split(data / "train.jsonl", tokenizer)
    spans = lambda examples: [s for e in examples for r in e.rounds for s in r.spans]
    assert [s.text for s in spans(old)] == [s.text for s in spans(new)] and spans(old) != spans(new)
    assert all(s.length == tokenizer.units(s.text) for s in spans(new))
    assert len(made.data.train) == 8


def test_lengths_stay_as_they_are_for_the_data_sets_own_tokenizer(data, tmp_path):
    (tmp_path / "tokenizer.json").write_text((data / "tokenizer.json").read_text())
    (tmp_path / "val.jsonl").write_text('{"prompt": "", "answer": "<topic> a 3</topic><async> a: b</async><eos>"}\n')
    (example,) = read_split(tmp_path / "val.jsonl", Tokenizer.load(tmp_path / "tokenizer.json"))
    assert example.rounds[0].spans[0].length == 3


def test_a_span_that_is_too_long_for_the_models_tokenizer_is_named(data, folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text((data / "tokenizer.json").read_text())
    line = {"prompt": "", "answer": f"<topic> a 60</topic><async> a: {'水獺' * 300}</async><eos>"}
    (tmp_path / "val.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match="val.jsonl, line 1: topic 'a'.*larger unit"):
        read_split(tmp_path / "val.jsonl", look(folder, 4).tokenizer)


def test_prepare_takes_the_tokenizer_of_a_pretrained_model(folder, tmp_path, monkeypatch):
    from data.instruct import prepare

    rows = [{"instruction": f"Name {n} things.", "output": f"The {n} river otters eat {n} crabs."} for n in range(30)]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    options = [tmp_path / "alpaca.json", "--out", tmp_path / "data", "--tokenizer", folder, "--unit", "4"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, options)])
    prepare.main()
    assert (tmp_path / "data" / "tokenizer.json").read_text() == look(folder, 4).tokenizer.to_json()
    made = trainer(tmp_path / "data", tmp_path / "out", folder)
    assert made.update().isfinite().all()


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_run_does_not_go_on_with_data_in_another_unit(data, folder, tmp_path, lora_rank):
    with pytest.raises(Crash):
        interrupt(trainer(data, tmp_path / "cut", folder, lora=lora_rank), 5, crash)
    other = shutil.copytree(data, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"unit": 4', '"unit": 8'))
    with pytest.raises(ValueError, match="in units of 4 tokens.* in units of 8: .*another --out"):
        trainer(other, tmp_path / "cut", folder, lora=lora_rank).train()


# ---------------------------------------------------------------- all weights


def test_training_begins_with_the_published_weights_and_moves_them_all(data, model_folder, tmp_path):
    made = trainer(data, tmp_path, model_folder)
    before = weights(made.model)
    torch.testing.assert_close(before, weights(load(look(model_folder, 4))), rtol=0, atol=0)
    made.update()
    same = [name for name, p in weights(made.model).items() if torch.equal(p, before[name])]
    assert not same


def test_at_first_only_the_embeddings_of_tags_and_lengths_are_trained(data, model_folder, tmp_path):
    made = trainer(data, tmp_path, model_folder, new_only=2, weight_decay=0.1)
    before, first = weights(made.model), made.tokenizer.pad
    for step in range(3):
        made.update()
        for name, p in weights(made.model).items():
            moved = (p != before[name]).flatten(1).any(1) if p.ndim > 1 else (p != before[name]).any()[None]
            if step == 2:
                assert moved.any(), name
            elif name in ("embedding.weight", "output.weight"):
                assert moved[first:].any() and not moved[:first].any()
            else:
                assert not moved.any(), name


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(data, folder, tmp_path, lora_rank):
    options = dict(new_only=4, lora=lora_rank)
    trainer(data, tmp_path / "whole", folder, **options).train()
    with pytest.raises(Crash):
        interrupt(trainer(data, tmp_path / "cut", folder, **options), 5, crash)
    trainer(data, tmp_path / "cut", folder, **options).train()
    assert_same(losses(tmp_path / "cut"), losses(tmp_path / "whole"))
    ends = [load_file(tmp_path / out / "model.safetensors") for out in ("cut", "whole")]
    torch.testing.assert_close(*ends, rtol=0.01, atol=0.01)


def test_the_trained_model_answers_and_is_evaluated_on_the_data(data, folder, tmp_path):
    trainer(data, tmp_path, folder, recompute=True).train()
    path = tmp_path / "model.safetensors"
    assert {t.dtype for t in load_file(path).values()} == {torch.bfloat16}
    (answer,) = Sampler.load(path, SampleConfig(max_tokens=30)).answer(["the otter"])
    assert answer.phase is None
    report = evaluate(EvalConfig(str(path), str(data), batch=2, draws=1), SampleConfig(max_tokens=20))
    assert report["scores"]["all"]["n"] == 2 and report["span_elbo"] > 0


def test_a_gpu_samples_in_the_16_bits_of_the_model(data, folder, tmp_path, monkeypatch):
    trainer(data, tmp_path, folder, steps=1, validate_every=1).train()
    monkeypatch.setattr("plumbing.device.sampling_dtype", lambda device: torch.float16)
    sampler = Sampler.load(tmp_path / "model.safetensors", SampleConfig())
    assert sampler.model.embedding.weight.dtype == torch.bfloat16


# ---------------------------------------------------------------- adapters


def disturbed(model):
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in lora.trained(model).values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def adapted(folder, rank=2, alpha=8.0):
    pretrained = look(folder)
    model = load(pretrained)
    lora.adapt(model, rank, alpha, pretrained.tokenizer.pad)
    return model, pretrained.tokenizer


def text(tokenizer):
    return torch.tensor([[tokenizer.user, *tokenizer.encode("the otter eats 12 fish"), tokenizer.assistant]])


def test_adapters_change_nothing_at_first(model_folder):
    model, tokenizer = adapted(model_folder)
    plain = load(look(model_folder))
    torch.testing.assert_close(our_logits(model, text(tokenizer)), our_logits(plain, text(tokenizer)))


def test_an_adapted_layer_is_its_matrices_each_with_a_product_of_low_rank(folder):
    """W + alpha / r * B A, for queries, keys and values alone."""
    plain = load(look(folder))
    model, _ = adapted(folder)
    disturbed(model)
    x, layer = torch.randn(3, 32), model.blocks[1].attention.qkv
    weight, parts = plain.blocks[1].attention.qkv.weight.detach().clone(), []
    for a, b, w in zip(layer.a, layer.b, weight.split([32, 16, 16])):
        parts.append(x @ (w + 8 / 2 * b @ a).T)
    expected = torch.cat(parts, 1) + plain.blocks[1].attention.qkv.bias
    torch.testing.assert_close(layer(x), expected)


def test_with_adapters_only_they_and_the_new_tokens_are_trained(data, model_folder, tmp_path):
    made = trainer(data, tmp_path, model_folder, lora=2)
    before = weights(made.model)
    made.update()
    made.update()
    for name, p in weights(made.model).items():
        trained = ".a." in name or ".b." in name or name.endswith(".new")
        assert torch.equal(p, before[name]) != trained, name
    count = sum(p.numel() for p in lora.trained(made.model).values())
    assert count < 0.5 * made.model.n_params()
    assert sum(p.numel() for p in made.optimizer.parts[0].param_groups[0]["params"]) == count


def test_with_adapters_too_the_new_tokens_are_trained_alone_at_first(data, folder, tmp_path):
    made = trainer(data, tmp_path, folder, lora=2, new_only=1)
    before = weights(made.model)
    made.update()
    moved = {name for name, p in weights(made.model).items() if not torch.equal(p, before[name])}
    assert moved == {"embedding.new", "output.new"}


def test_merged_weights_compute_the_same_in_a_plain_model(model_folder):
    model, tokenizer = adapted(model_folder)
    disturbed(model)
    plain = load(look(model_folder))
    merged = lora.merged(model, torch.bfloat16)
    assert {p.dtype for p in merged.values()} == {torch.bfloat16}
    plain.load_state_dict({name: p.float() for name, p in merged.items()})
    exact, near = our_logits(model, text(tokenizer)), our_logits(plain, text(tokenizer))
    assert (exact - near).square().mean() < 1e-3 * (exact - our_logits(load(look(model_folder)), text(tokenizer))).var()


def test_what_stays_is_held_in_16_bits_and_what_is_trained_in_32(folder):
    pretrained = look(folder)
    model = load(pretrained, dtype=torch.bfloat16)
    lora.adapt(model, 2, 8, pretrained.tokenizer.pad)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.bfloat16 if p.ndim == 2 and not p.requires_grad else torch.float32), name
    exact, _ = adapted(folder)
    with torch.autocast("cpu", torch.bfloat16):
        near = our_logits(model, text(pretrained.tokenizer))
        assert (
            model(*[t[:, :1] for t in (text(pretrained.tokenizer),) * 2], torch.ones(1, 1, 3).long()).dtype
            == torch.float32
        )
    far = our_logits(exact, text(pretrained.tokenizer))
    assert (near.float() - far).std() < 0.05 * far.std()


def test_peft_loads_the_adapters_on_the_exported_model_with_the_same_logits(model_folder, tmp_path):
    library("transformers"), library("peft")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, tokenizer = adapted(model_folder)
    export.export(load(look(model_folder)), tokenizer, tmp_path / "base", "float32")
    disturbed(model)
    lora.save_adapter(tmp_path / "adapter", model, str(tmp_path / "base"), 2, 8.0)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            our_logits(model, text(tokenizer)), theirs(text(tokenizer)).logits, atol=1e-4, rtol=1e-4
        )


def test_a_finished_run_leaves_its_adapters_as_peft_has_them_and_a_small_checkpoint(data, folder, tmp_path):
    trainer(data, tmp_path, folder, lora=2).train()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 32.0, "LORA")
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in names
    assert "base_model.model.lm_head.token_adapter.trainable_tokens_delta" in names
    assert len(names) == 2 * 2 * 7 + 2
    held = [name for name in load_file(tmp_path / "checkpoint.safetensors") if name.startswith("model.")]
    assert not [name for name in held if ".base." in name or name.endswith(".old")]
    model, tokenizer, *_ = load_checkpoint(tmp_path / "model.safetensors")
    assert isinstance(model.blocks[0].attention.qkv, torch.nn.Linear)


def test_a_checkpoint_of_adapters_alone_is_sampled_on_what_its_run_began_with(data, folder, tmp_path, monkeypatch):
    made = trainer(data, tmp_path / "run", folder, lora=2)
    disturbed(made.model)
    made.train()
    path, tokens = tmp_path / "run" / "checkpoint.safetensors", text(made.tokenizer)
    model, tokenizer, info = lora.load_adapted(path, "cpu")
    near, far = our_logits(made.model.float(), tokens), our_logits(load(look(folder)), tokens)  # near: from 16 bits
    exact = our_logits(model, tokens)
    assert (exact - near).square().mean() < 1e-3 * (exact - far).var()
    assert (tokenizer.tokens, info["method"]["method"]) == (made.tokenizer.tokens, made.data.method.method)
    sampler = Sampler.load(path, SampleConfig(max_tokens=30))
    assert sampler.answer(["otter"])[0].result()["plan_passes"] > 0
    assert not lora.holds_adapters(tmp_path / "run" / "model.safetensors") and not lora.holds_adapters(tmp_path)
    shutil.move(folder, tmp_path / "away")
    with pytest.raises(ValueError, match="holds adapters for .*, which is not here: docs/your-own-model.md"):
        Sampler.load(path, SampleConfig())
    shutil.move(tmp_path / "away", folder)


def test_a_checkpoint_of_other_adapters_is_refused(data, folder, tmp_path):
    trainer(data, tmp_path, folder, lora=2).train()
    for other in (dict(lora=3), dict(lora=2, lora_alpha=3.0), dict()):
        with pytest.raises(ValueError, match="another --out"):
            trainer(data, tmp_path, folder, **other).train()


# ---------------------------------------------------------------- refused


def test_what_does_not_go_together_is_said_in_a_line(monkeypatch, data, folder, fresh):
    for options, words in each([
    (("--lora", 4, "--init", ""), "--lora 4: expected --init FOLDER"), (("--n_layer", 3), "leave out --n_layer"),
    (("--init", "tests"), "config.json does not exist"),
]):  # fmt: skip
        tmp_path = fresh()
        before = ("--device", "cpu", "--data", data, "--out", tmp_path / "run", "--batch", 2, "--init", folder)
        assert words in said(monkeypatch, *before, *options)
        assert not (tmp_path / "run").exists()
