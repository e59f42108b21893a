"""All that a user would run on a GPU, as it would run there: the kernel (emulated), its types, and graphs (a stand-in)."""

import json
from functools import partial

import pytest
from conftest import random_example, small_model

from config import MethodConfig, SampleConfig
from data import write_dataset
from kernels.graphs import Replayed
from measure import bench
from measure.eval import EvalConfig, evaluate, lines
from sample import Sampler
from tokenizer import Tokenizer
from training.checkpoint import save_checkpoint

SHAPE = {"n_layer": 1, "d_model": 32, "n_head": 1, "n_kv_head": 1, "d_ff": 32}  # a head of 32, the kernel's smallest


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A data set, and checkpoints of an untrained planned and an autoregressive model for it."""
    folder = tmp_path_factory.mktemp("gpu")
    examples = [random_example(seed, tokenizer, rounds=2, spans=2) for seed in range(8)]
    write_dataset(folder, {"train": examples, "val": examples[:2], "test": examples[:2]}, 400, 4)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    for method in ("planned", "ar"):
        info = {"method": vars(MethodConfig(method))}
        save_checkpoint(folder / f"{method}.safetensors", small_model(tokenizer.vocab_size, **SHAPE), tokenizer, info)
    return folder


@pytest.mark.parametrize("settings", [dict(), dict(threshold=0.5, temperature=0.7), dict(ahead=2)])
def test_sampling(emulated_kernel, recordings, folder, settings):
    config = SampleConfig(max_tokens=40, **settings)
    sampler = Sampler.load(folder / "planned.safetensors", config)
    assert sampler.passes.replayed is Replayed
    answers = sampler.answer(["the otter", "", "fish and crabs"])
    assert recordings and all(json.dumps(answer.result()) and answer.phase is None for answer in answers)


@pytest.mark.parametrize("settings", [{}, {"ahead": 2, "temperature": 0.7}])
def test_evaluation(emulated_kernel, folder, settings):
    config = EvalConfig(str(folder / "planned.safetensors"), str(folder), batch=2, draws=1)
    report = evaluate(config, SampleConfig(max_tokens=30, **settings))
    assert report["scores"]["all"]["n"] == 2 and report["span_elbo"] > 0 and list(lines(report))


def test_benchmark_of_sampling(emulated_kernel, folder, monkeypatch, capsys):
    files = [
        "--planned",
        str(folder / "planned.safetensors"),
        "--ar",
        str(folder / "ar.safetensors"),
        "--data",
        str(folder),
    ]
    few = ["--part", "sampling", "--repeats", "2", "--prompts", "1", "--batch", "1"]
    monkeypatch.setattr("sys.argv", ["bench.py", *files, *few])
    monkeypatch.setattr("measure.bench.SampleConfig", partial(SampleConfig, max_tokens=20))
    bench.main()
    assert capsys.readouterr().out.count("planned, threshold 0.9") == 2  # a row of each table
