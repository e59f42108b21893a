"""Downloading (from a server of the test's own), computed memory, and the commands of docs/your-own-model.md."""

import contextlib
import json
import os
import re
import runpy
import shlex
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import each, small_model
from published import published
from safetensors.torch import save

from config import TrainConfig
from loss import JointLoss
from measure import memory
from model import ModelConfig
from plumbing.settings import ROOT
from pretrained import download
from pretrained.llama import load, look
from pretrained.lora import adapt
from training.optim import Optimizer

# ---------------------------------------------------------------- download


class Quiet(SimpleHTTPRequestHandler):
    tokens = []  # that came with requests

    def do_GET(self):
        Quiet.tokens.append(self.headers["Authorization"])
        self.answer()

    def answer(self):
        super().do_GET()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(handler):
    """The address of a server of its own."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server of models, and the folder whose `owner/model/resolve/main` it serves."""
    with serving(partial(Quiet, directory=str(tmp_path))) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("no_proxy", "*")
        yield tmp_path


@pytest.mark.parametrize("shards", [1, 2])
def test_what_is_downloaded_is_the_model(hub, tmp_path, shards):
    there = published(hub / "owner" / "model" / "resolve" / "main", shards=shards)
    (there / "pytorch_model.bin").write_bytes(b"never asked for")
    download.download("owner/model", tmp_path / "here")
    here = load(look(tmp_path / "here")).state_dict()
    torch.testing.assert_close(here, load(look(there)).state_dict(), rtol=0, atol=0)
    assert not (tmp_path / "here" / "pytorch_model.bin").exists()


def test_a_download_goes_on_with_the_files_that_are_missing(hub, tmp_path, capsys):
    published(hub / "owner" / "model" / "resolve" / "main")
    for _ in range(2):
        download.download("owner/model", tmp_path / "here")
    (tmp_path / "here" / "tokenizer.json").unlink()
    download.download("owner/model", tmp_path / "here")
    files = re.findall(r"^(\S+): ", capsys.readouterr().out, re.M)
    assert files == ["config.json", "tokenizer.json", "model.safetensors", "tokenizer.json"]


def test_what_the_hub_lacks_and_a_hub_that_cannot_be_reached_are_said(hub, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="owner/none has no config.json"):
        download.download("owner/none", tmp_path / "here")
    for name in ("model", "an owner/model", "owner/model/more"):
        with pytest.raises(ValueError, match=f"{name}: expected owner/model"):
            download.download(name, tmp_path / "here")
    there = published(hub / "owner" / "model" / "resolve" / "main")
    (there / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model.safetensors on the hub"):
        download.download("owner/model", tmp_path / "here")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="cannot be reached.*on a machine with a network.*copy the folder here"):
        download.download("owner/other", tmp_path / "there")


RAW = {  # answers of a server that are not what was asked for
    "shorter than announced": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
    "cut in a chunk": b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{"a"',
    "cut, without a length": b'HTTP/1.1 200 OK\r\n\r\n{"a": [1, ',
    "without a number": b'HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n{"a": [1, ',
    "a page to log in": b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n<html></html>",
    "garbage": b"\x1b[31mhello\r\n\r\n{}",
    "nothing": b"",
}


def test_what_comes_cut_or_as_something_else_is_said_in_a_line_and_not_kept(fresh, monkeypatch):
    class Raw(Quiet):
        pass

    with serving(Raw) as address:
        monkeypatch.setenv("HF_ENDPOINT", address), monkeypatch.setenv("no_proxy", "*")
        cut = save({"a": torch.zeros(9)})[:-1]
        for file, answer in each([*(("config.json", answer) for answer in RAW.values()),
                                  ("model.safetensors", b"HTTP/1.1 200 OK\r\n\r\n" + cut)]):  # fmt: skip
            Raw.answer = lambda self, answer=answer: self.wfile.write(answer)
            folder = fresh()
            with pytest.raises(
                ValueError, match=rf"main/{file} [^\n\x1b]*broke off[^\n\x1b]*give the same command again"
            ):
                download.fetch("owner/model", file, folder)
            assert not list(folder.iterdir())


def test_an_index_names_files_of_the_folder_or_is_refused(hub, fresh):
    there = published(hub / "owner" / "model" / "resolve" / "main")
    for index in each([{}, {"weight_map": [1]}, {"weight_map": 3}, {"weight_map": None}, [], None,
                       {"weight_map": {"a": "sub/model.safetensors"}}, {"weight_map": {"a": ".."}}]):  # fmt: skip
        (there / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="index.json: expected (an object|a 'weight_map' .* in this folder)"):
            download.download("owner/model", fresh() / "here")


def test_the_token_is_sent_to_the_hub_and_not_to_where_it_redirects(hub, tmp_path, monkeypatch):
    there, elsewhere = published(hub / "owner" / "model" / "resolve" / "main"), os.environ["HF_ENDPOINT"]

    class Redirecting(Quiet):
        def answer(self):
            self.send_response(302)
            self.send_header("Location", elsewhere + self.path)
            self.end_headers()

    monkeypatch.setattr(Quiet, "tokens", [])
    with serving(Redirecting) as address:
        monkeypatch.setenv("HF_ENDPOINT", address), monkeypatch.setenv("HF_TOKEN", "secret")
        assert download.fetch("owner/model", "config.json", tmp_path / "here")
    assert (tmp_path / "here" / "config.json").read_bytes() == (there / "config.json").read_bytes()
    assert Quiet.tokens == ["Bearer secret", None]


# ---------------------------------------------------------------- memory

WIDE = dict(d_model=64, n_head=4, n_kv_head=2, d_ff=192)
VOCABULARY = 256 + 74  # of the batch that is measured


@pytest.mark.parametrize("qk_norm", [False, True])
def test_activations_are_about_what_a_block_keeps(qk_norm):
    """In float32, where attention keeps queries, keys, values and its output."""
    batch, sizes = memory.some_batch(64), []  # few, as the mask of a CPU's attention is not counted
    for n_layer in (1, 3):
        model, kept = small_model(VOCABULARY, n_layer=n_layer, qk_norm=qk_norm, **WIDE), {}
        note = lambda x: kept.update({x.untyped_storage().data_ptr(): (x, x.untyped_storage().nbytes())}) or x
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            hidden = model(batch.token, batch.position, batch.ranges)
        assert hidden.requires_grad
        sizes.append(sum(size for place, (_, size) in kept.items() if place not in own))
    counted = (sizes[1] - sizes[0]) / 2 / batch.token.numel()
    assert memory.activations(model.config, 4) == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize("lora", [0, 4])
def test_weights_gradients_and_optimizer_are_counted_exactly(lora):
    config = ModelConfig(vocab_size=VOCABULARY, n_layer=3, tied=False, qk_norm=False, **WIDE)
    model = small_model(VOCABULARY, n_layer=3, tied=False, qk_norm=False, **WIDE)
    if lora:
        adapt(model, lora, 1.0, config.vocab_size - memory.NEW)
    optimizer, batch = Optimizer(model, TrainConfig(steps=2)), memory.some_batch(128)
    JointLoss(model, 257)(batch).sum().backward()
    optimizer.step(0)
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors if t is not None and t.ndim)
    parts = memory.memory(config, 128, lora, half=4)
    assert parts["weights"] == size(model.parameters())
    assert parts["gradients"] == size(p.grad for p in model.parameters())
    assert parts["optimizer"] == pytest.approx(
        size(optimizer.state().values()), rel=0.01
    )  # norms have two moments, too


def test_the_table_says_that_7b_fits_one_gpu_by_adapters_alone():
    peak = lambda name, **way: (
        memory.memory(ModelConfig(**memory.SHAPES[name], qk_norm=False), 4096, **way)["peak"] / 2**30
    )
    assert peak("Qwen2.5-7B") > 80 > 40 > peak("Qwen2.5-7B", lora=16, recompute=True) > 14
    sizes = [memory.empty(ModelConfig(**shape, qk_norm=False), 0).n_params() for shape in memory.SHAPES.values()]
    assert [round(size / 1e8) for size in sizes] == [1, 4, 15, 76]


# ---------------------------------------------------------------- the page


def commands():
    """The commands of docs/your-own-model.md, in their order."""
    page = (ROOT / "docs" / "your-own-model.md").read_text(encoding="utf-8")
    lines = re.sub(r" \\\n +", " ", page).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("    python ")]


def test_the_commands_of_the_page_work_on_small_files(hub, tmp_path, monkeypatch):
    """In a folder of their own, with few updates."""
    published(hub / "HuggingFaceTB" / "SmolLM2-135M" / "resolve" / "main", "llama", "smollm")
    published(tmp_path / "work" / "models" / "SmolLM2", "llama", "smollm")  # in place of what gguf.py makes
    rows = [{"instruction": f"Name {n} facts.", "input": "", "output": "Facts:\n" + "".join(
        f"- Food {i}: the otter number {n} eats {i} fish in the sea\n" for i in range(3))} for n in range(40)]  # fmt: skip
    work = tmp_path / "work"
    (work / "alpaca.json").write_text(json.dumps(rows))
    (work / "models" / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(work)
    small = {
        "train.py": ["--steps", "2", "--batch", "2", "--accumulate", "1", "--device", "cpu", "--new_only", "1"],
        "sample.py": ["--device", "cpu", "--max_tokens", "40"],
        "eval.py": ["--device", "cpu", "--max_tokens", "30", "--limit", "1", "--draws", "1"],
    }
    seen = []
    for _, script, *options in commands():
        name = script.rpartition("/")[2]
        if name in ("memory.py", "gguf.py", "own.py") or "checkpoints/smollm2/parallel-ar.safetensors" in options:
            continue  # the table is computed above, a GGUF is read and the adapter sampled in test_pretrained_gguf.py
        monkeypatch.setattr(sys, "argv", [script, *options, *small.get(name, [])])
        runpy.run_path(str(ROOT / script), run_name="__main__")  # ends the test with SystemExit if something is wrong
        seen.append(name)
    assert set(seen) >= {"download.py", "prepare.py", "train.py", "sample.py", "eval.py", "export.py"}
    assert (work / "exported" / "config.json").exists()
