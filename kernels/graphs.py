"""CUDA graphs: what a GPU has done once, it does again without the host's work.

Launching the hundreds of small kernels of a pass takes the host longer than a GPU needs to compute them. A graph
records them once and launches them together. It is of fixed shapes and addresses: so there is one for each shape,
shapes are rounded up (`bucket`) to have few, and what goes in and comes out lies in tensors that stay.
"""

from functools import cache

import torch


def bucket(n):
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is n or more: at most a third of it is wasted."""
    power = 1 << max(n - 1, 0).bit_length()  # the first power of two that is large enough
    return power * 3 // 4 if power * 3 // 4 >= n else power


@cache
def memory():
    """All graphs share it: none is repeated before what another left was used."""
    return torch.cuda.graph_pool_handle()


def record(function):
    """Run a function of no arguments on the GPU. Returns a function that repeats it in place, and its output."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what is done only once, such as building a kernel, is not to be recorded
        function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory()):
        output = function()
    return graph.replay, output


class Replayed:
    """A function of tensors and constants that returns a tensor, recorded once for each shape and constants.

    Its output lasts until the next call of this or another one. All else that the function reads has to stay in place.
    """

    def __init__(self, function):
        self.function, self.recorded = function, {}

    def __call__(self, *tensors, **constants):
        key = (*(tensor.shape for tensor in tensors), *constants.items())
        if key not in self.recorded:
            inputs = [tensor.clone() for tensor in tensors]
            self.recorded[key] = inputs, *record(lambda: self.function(*inputs, **constants))
        inputs, replay, output = self.recorded[key]
        for mine, given in zip(inputs, tensors):
            mine.copy_(given)
        replay()
        return output
