"""How many CPU threads compute: few by default, as many as OMP_NUM_THREADS says."""

import pytest
import torch
from conftest import each

from plumbing import device


@pytest.fixture
def chosen(monkeypatch):
    """A function (parameters, cores, variables) -> the number of threads that use_threads takes."""

    def choose(parameters: int, cores: int, **variables: str) -> list[int]:
        took = []
        monkeypatch.setattr(torch, "set_num_threads", took.append)
        monkeypatch.setattr(device.os, "sched_getaffinity", lambda process: range(cores), raising=False)
        monkeypatch.setattr(device.os, "environ", variables)
        device.use_threads(parameters)
        return took

    return choose


def test_training_and_large_models_take_half_of_the_cores_from_one_to_four(chosen):
    for parameters in each([0, device.SMALL + 1]):
        assert [chosen(parameters, cores) for cores in (1, 2, 3, 4, 7, 8, 64)] == [[1], [1], [1], [2], [3], [4], [4]]


def test_a_small_model_is_sampled_by_one_thread(chosen):
    for cores in each([1, 2, 64]):
        assert chosen(3_000_000, cores) == [1]


def test_omp_num_threads_wins(chosen):
    for parameters in each([0, 3_000_000, device.SMALL + 1]):
        assert chosen(parameters, 64, OMP_NUM_THREADS="7") == []
