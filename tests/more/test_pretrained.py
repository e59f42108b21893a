"""Published weights: the same logits as the `transformers` library gives, in both directions; and what is refused."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import each, small_model
from naive_model import naive_forward
from published import AWKWARD, KINDS, SIZES, library, published, published_tensors
from safetensors.torch import load_file, save_file

from model import ModelConfig
from plumbing.settings import ROOT, command
from pretrained import export, llama
from pretrained.llama import load, look
from tokenizer import MAX_LENGTH
from training.checkpoint import load_checkpoint, save_checkpoint


def causal(token):
    """Token, position and ranges of a text."""
    n = token.shape[1]
    ranges = torch.stack([torch.arange(1, n + 1), *torch.zeros(2, n, dtype=torch.long)], dim=-1)
    return token, torch.arange(n)[None], ranges[None]


@torch.no_grad()
def our_logits(model, token):
    return model.logits(model(*causal(token)))


def some_text(tokenizer, length=90):
    """(1, length) text tokens: more than llama3's original context."""
    return torch.randint(0, tokenizer.pad, (1, length), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- in


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(fresh, kind):
    for shards in each([1, 3]):
        tmp_path = fresh()
        library("transformers")
        from transformers import AutoModelForCausalLM

        pretrained = look(published(tmp_path, kind, shards=shards))
        token, rows = some_text(pretrained.tokenizer), torch.tensor(pretrained.rows[: pretrained.tokenizer.pad])
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(rows[token]).logits[..., rows]
        assert theirs.std() > 0.5
        ours = our_logits(load(pretrained), token)[..., : pretrained.tokenizer.pad]
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_without_that_library_logits_are_those_of_a_naive_model_with_the_published_tensors(fresh):
    """Queries, keys and values apart, as they are in the file."""
    for kind in each(KINDS):
        tmp_path = fresh()
        pretrained, tensors = look(published(tmp_path, kind)), published_tensors(KINDS[kind])
        model = load(pretrained)
        for n, block in enumerate(model.blocks):
            parts = block.attention.qkv.weight.split([size * model.config.head_dim for size in (4, 2, 2)])
            for part, letter in zip(parts, "qkv"):
                assert torch.equal(part, tensors[f"model.layers.{n}.self_attn.{letter}_proj.weight"])
            gate, up = block.gate_up.weight.chunk(2)
            assert torch.equal(gate, tensors[f"model.layers.{n}.mlp.gate_proj.weight"])
            assert torch.equal(block.attention.out.weight, tensors[f"model.layers.{n}.self_attn.o_proj.weight"])
        token = some_text(pretrained.tokenizer, 20)
        with torch.no_grad():
            fast = model(*causal(token))[0]
            naive = naive_forward(model.double(), *(x[0] for x in causal(token)))
        torch.testing.assert_close(fast, naive.float(), atol=1e-4, rtol=1e-4)


def test_the_config_is_read_as_both_versions_of_transformers_write_it():
    scaling = KINDS["llama3"]["rope_scaling"]
    old = SIZES | KINDS["llama3"]
    new = {name: value for name, value in old.items() if name not in ("rope_theta", "rope_scaling")}
    new |= {"rope_parameters": {"rope_theta": 5e5, **scaling}, "dtype": "float16"}
    configs = [llama.model_config(config, 400) for config in (old, new)]
    assert [c.half for c in configs] == ["bfloat16", "float16"]
    for config in configs:
        assert config.rope_theta == 5e5 and config.rope_scaling == scaling and config.norm_eps == 1e-6
        assert (config.tied, config.qk_norm, config.qkv_bias, config.head_dim) == (True, False, False, 8)


def test_what_a_config_leaves_out_is_what_transformers_takes():
    sizes = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "rms_norm_eps")}
    for kind, head_dim, shared in each((("llama", 8, 4), ("qwen2", 8, 32), ("qwen3", 128, 32))):
        wide = sizes | {"hidden_size": 8 * 64, "num_attention_heads": 64} if shared == 32 else sizes
        made = llama.model_config(wide | {"model_type": kind}, 400)
        assert (made.head_dim, made.n_kv_head, made.norm_eps, made.rope_theta) == (head_dim, shared, 1e-6, 1e4)
        same = llama.model_config(wide | {"model_type": kind, "num_key_value_heads": None, "rms_norm_eps": 3e-5}, 400)
        assert (same.n_kv_head, same.norm_eps) == (same.n_head, 3e-5)


def test_every_row_of_the_embedding_is_its_tokens_and_a_sequence_begins_and_ends_as_it_did(tmp_path):
    pretrained, tensors = look(published(tmp_path, "llama")), published_tensors(KINDS["llama"])
    model, tokenizer = load(pretrained), pretrained.tokenizer
    for ours, theirs in ((model.embedding, "model.embed_tokens.weight"), (model.output, "lm_head.weight")):
        assert torch.equal(ours.weight[: tokenizer.pad], tensors[theirs][pretrained.rows[: tokenizer.pad]])
        assert torch.equal(ours.weight[[tokenizer.user, tokenizer.eos]], tensors[theirs][[1, 2]])
    assert len(model.embedding.weight) == tokenizer.vocab_size == model.config.vocab_size


def test_a_tag_past_the_embedding_begins_as_a_new_token(tmp_path):
    """As where [PAD] was added to a tokenizer, and no row to the model."""
    folder = published(tmp_path)
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    for row, new in each([(399, False), (400, True)]):  # of 400
        added = [*saved["added_tokens"], saved["added_tokens"][0] | {"id": row, "content": "[PAD]"}]
        path.write_text(json.dumps(saved | {"added_tokens": added}))
        pretrained = look(folder)
        assert pretrained.rows[pretrained.tokenizer.pad] == (None if new else row)
        weight = load(pretrained).embedding.weight[pretrained.tokenizer.pad]
        assert torch.equal(weight, published_tensors(KINDS["qwen2"])["model.embed_tokens.weight"][399]) != new


def test_new_tokens_begin_near_the_mean_of_the_pieces_of_their_names_each_elsewhere(tmp_path):
    pretrained = look(published(tmp_path))
    tokenizer, weight = pretrained.tokenizer, load(pretrained).embedding.weight.detach()
    scale = weight[: tokenizer.pad].std()
    for token, words in [(tokenizer.topic, "topic"), (tokenizer.topic_end, "topic"), (tokenizer.length_id(12), "12"),
                         (tokenizer.pad, "PAD"), (tokenizer.sync, "sync")]:  # fmt: skip
        distance = (weight[token] - weight[tokenizer.encode(words)].mean(0)).std()
        assert 0.05 * scale < distance < 0.2 * scale
    new = weight[tokenizer.pad :]
    assert len(new) == 10 + MAX_LENGTH and torch.cdist(new, new).fill_diagonal_(9).min() > 0.1 * scale


def test_all_memory_but_one_tensor_is_in_the_type_that_is_asked_for(tmp_path):
    model = load(look(published(tmp_path)), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------- out


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_is_exported_with_the_same_logits_and_tokens(tmp_path, kind):
    library("transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pretrained = look(published(tmp_path / "in", kind))
    model, tokenizer = load(pretrained), pretrained.tokenizer
    export.export(model, tokenizer, tmp_path / "out", "float32")
    token = torch.tensor([[tokenizer.user, *tokenizer.encode("it's 12 rivers"), tokenizer.assistant, tokenizer.topic]])
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("<user>it's 12 rivers<assistant><topic>").input_ids == token[0].tolist()
    assert (again.eos_token, again.pad_token_id, len(again)) == ("<eos>", tokenizer.pad, tokenizer.vocab_size)
    for text in {text.strip() for text in AWKWARD} - {"<eos>", "[PAD]"}:  # special tokens of the published model, too
        assert again(text).input_ids == tokenizer.encode(text), repr(text)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(token).logits
    torch.testing.assert_close(our_logits(model, token), theirs, atol=1e-4, rtol=1e-4)


def test_a_model_of_this_project_is_exported_by_the_command_and_loaded_by_transformers(tmp_path, tok):
    library("transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = small_model(tok.vocab_size)
    save_checkpoint(tmp_path / "c.safetensors", model, tok, {})
    command = [sys.executable, export.__file__, "--model", tmp_path / "c.safetensors", "--out", tmp_path / "out"]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    token = torch.tensor([tok.encode("The otter eats\nfish")])
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("The otter eats\nfish").input_ids == token[0].tolist()
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(token).logits
    torch.testing.assert_close(our_logits(model, token), theirs, atol=1e-4, rtol=1e-4)


def test_what_transformers_would_do_otherwise_is_told(tmp_path, monkeypatch, capsys):
    """It gives a Qwen2 folder an unknown token, unless it is null, and cuts texts as Qwen2 does."""
    for cut in each(("qwen", "smollm")):
        folder = published(tmp_path / cut, "qwen2", cut)
        monkeypatch.setattr(sys, "argv", ["export.py", "--model", str(folder), "--out", str(tmp_path / "out")])
        export.main()
        assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["unk_token"] is None
        assert ("PreTrainedTokenizerFast" in capsys.readouterr().out) == (cut == "smollm")


def test_a_weight_that_the_type_cannot_hold_is_not_exported(tmp_path, tok):
    model = small_model(tok.vocab_size)
    model.blocks[1].down.weight.data[3, 2] = 1e5
    with pytest.raises(ValueError, match="model.layers.1.mlp.down_proj.weight is not finite in float16"):
        export.export(model, tok, tmp_path, "float16")
    assert not list(tmp_path.iterdir())
    for dtype in each(("bfloat16", "float32")):
        export.export(model, tok, tmp_path, dtype)


def test_what_is_exported_is_read_again_exactly_tags_included(fresh):
    for kind in each(KINDS):
        tmp_path = fresh()
        pretrained = look(published(tmp_path / "in", kind))
        model = load(pretrained)
        export.export(model, pretrained.tokenizer, tmp_path / "out", "float32")
        again = look(tmp_path / "out")
        assert again.config == pretrained.config or again.config.half != pretrained.config.half
        assert again.tokenizer.to_json() == pretrained.tokenizer.to_json()
        torch.testing.assert_close(load(again).state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_holds_a_pretrained_model(tmp_path):
    pretrained = look(published(tmp_path / "in", "llama3"))
    model = load(pretrained)
    save_checkpoint(tmp_path / "c", model, pretrained.tokenizer, {}, dtype=torch.bfloat16)
    again, tokenizer, *_ = load_checkpoint(tmp_path / "c")
    assert again.config == model.config and tokenizer.to_json() == pretrained.tokenizer.to_json()
    token = some_text(tokenizer, 10)
    torch.testing.assert_close(our_logits(again, token), our_logits(model, token), atol=0.2, rtol=0.1)


def test_shipped_checkpoints_have_the_options_that_they_always_had():
    config = load_checkpoint(ROOT / "checkpoints/tasks/joint.safetensors")[0].config
    assert (config.tied, config.qkv_bias, config.rope_scaling, config.half) == (True, False, None, "float16")
    assert config.head_dim == config.d_model // config.n_head and config.norm_eps == 1e-5


def test_a_config_that_makes_no_sense_is_refused():
    for options in each([{"half": "int8"}, {"rope_scaling": {"rope_type": "llama3"}}, {"rope_scaling": [1]},
                                     {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "x": 1}}]):  # fmt: skip
        with pytest.raises((TypeError, ValueError)):
            ModelConfig(**options)


def test_what_no_published_architecture_has_is_not_exported(tok):
    config = small_model(tok.vocab_size, qkv_bias=True).config
    with pytest.raises(ValueError, match="cannot be exported"):
        llama.transformers_config(config, tok, "float32", 100)


# ---------------------------------------------------------------- refused


def refused(folder):
    """The one line in which a folder is refused; it names it."""
    with pytest.raises(ValueError) as error:
        load(look(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


REFUSED = [
    ({"model_type": "gpt2"}, "model_type 'gpt2': expected one of llama"), ({"model_type": None}, "model_type"),
    ({"hidden_act": "gelu"}, "hidden_act"), ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"use_sliding_window": True}, "sliding"), ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn': expected default, linear or llama3"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"partial_rotary_factor": 0.5}, "partial_rotary"),
    ({"hidden_size": None}, "config.json"), ({"num_attention_heads": 0}, "config.json"), ({"num_hidden_layers": "x"}, "config"),
    ({"hidden_size": 64}, "[400, 64]"), ({"num_hidden_layers": 3}, "no tensor model.layers.2"),
    ({"num_hidden_layers": 1}, "model.layers.1"), ({"intermediate_size": 50}, "gate_proj.weight has the shape"),
    ({"tie_word_embeddings": "false"}, 'tie_word_embeddings "false": expected true'),
    ({"num_key_value_heads": 3}, "num_attention_heads 4: expected a multiple of num_key_value_heads 3"),
    ({"rope_scaling": [1]}, "expected an object"), ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"vocab_size": 328}, "vocab_size 328, but tokenizer.json has a token 328: it is of another model"),
    ({"vocab_size": 329}, "its config.json asks for [329, 32]"),
    ({"vocab_size": 401}, "its config.json asks for [401, 32]"), ({"bos_token_id": "1"}, 'bos_token_id "1": expected'),
    ({"eos_token_id": 400}, "eos_token_id 400: expected a whole number below vocab_size 400"),
    ({"eos_token_id": [-1]}, "eos_token_id -1: expected"), ({"eos_token_id": 2.5}, "eos_token_id 2.5: expected"),
    ({"model_type": "llama"}, "k_proj.bias"), ({"model_type": "qwen3"}, "bias"), ({"tie_word_embeddings": False}, "lm_head"),
]  # fmt: skip


def test_a_config_that_is_not_this_models_is_refused_by_name(fresh):
    for change, words in each(REFUSED):
        tmp_path = fresh()
        folder = published(tmp_path, "qwen2")
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        assert words in refused(folder)


def test_each_number_of_a_config_is_what_it_may_be_or_refused_by_name():
    whole, llama3 = SIZES | KINDS["llama3"] | {"head_dim": 8, "rope_theta": 1e4}, KINDS["llama3"]["rope_scaling"]
    huge, nan = 10**400, float("nan")
    bad = dict.fromkeys(SIZES, ["8", 8.5, -8, 0, True, 2**63, huge, nan, [8]])
    bad |= {"head_dim": [*bad["hidden_size"], 7], "rms_norm_eps": ["1e-6", -1, 0, nan, huge, float("inf"), True]}
    bad |= {"rope_theta": ["1e4", 0, 1, -2.0, nan, huge]} | dict.fromkeys(llama3, ["8", 0, -2, nan, huge, True])
    for name in each(sorted({*bad} - {"rope_type"})):
        for value in each(bad[name]):
            change = {"rope_scaling": llama3 | {name: value}} if name in llama3 else {name: value}
            with pytest.raises(ValueError, match=rf"^{name} .*: expected a (whole )?number"):
                llama.number(whole | change, "vocab_size"), llama.model_config(whole | change, 400)
    for name in each(("hidden_size", "num_hidden_layers", "vocab_size")):  # required
        with pytest.raises(ValueError, match=f"^{name} null: expected"):
            llama.number({name: None}, name)
    with pytest.raises(ValueError, match="high_freq_factor 1.0: expected more than low_freq_factor"):
        llama.model_config(whole | {"rope_scaling": llama3 | {"high_freq_factor": 1.0}}, 400)


def test_a_folder_without_config_weights_or_a_shard_is_refused(tmp_path):
    assert "config.json does not exist" in refused(tmp_path)
    folder = published(tmp_path / "model", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors does not exist, but its index names it" in refused(folder)
    for files in each(({"a": "../other.safetensors"}, {"a": ".."}, {"a": ""}, {"a": 3}, {}, [1], 3, None)):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        assert "weight_map" in refused(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "expected model.safetensors" in refused(folder)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path):
    folder = published(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "executes code" in refused(folder) and "save_pretrained" in refused(folder)


def test_weights_that_are_cut_garbage_or_of_another_tokenizer_are_refused(tmp_path):
    folder = published(tmp_path / "model")
    path = folder / "model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    for content in (b"", b"hello", whole[:100], whole[:-1]):
        path.write_bytes(content)
        assert "copy it again" in refused(folder)
    save_file(tensors | {"model.embed_tokens.weight": torch.zeros(300, 32)}, path)
    assert "has the shape [300, 32], its config.json asks for [400, 32]" in refused(folder)
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, path)
    assert "model.norm.weight holds NaN or infinity" in refused(folder)


def test_a_config_that_is_no_object_is_refused(fresh):
    for text in each(["", "[]", "{", "3", "[" * 100_000]):
        tmp_path = fresh()
        folder = published(tmp_path / "model")
        (folder / "config.json").write_text(text)
        refused(folder)


def test_the_command_says_what_is_wrong_in_a_line(monkeypatch, tmp_path):
    for options, named in each(((["--model", tmp_path, "--out", tmp_path / "out"], "config.json"),
                                (["--model", "x"], "--out FOLDER"))):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, options)])
        with pytest.raises(SystemExit, match=rf"^export.py: [^\n]*{named}[^\n]*$"):
            command(export.main)
