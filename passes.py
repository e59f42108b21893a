"""What the device computes in a pass: some entries of several layouts at once, with keys and values of all before."""

import torch

from kernels.graphs import Replayed, bucket
from model import KVCache
from plumbing import device as devices
from plumbing.linear import pack


class Passes:
    """Forward passes of a model over a KV cache. On a GPU shapes are rounded up, and passes replayed as graphs."""

    def __init__(self, model):
        self.model, self.device, self.cache = model, model.embedding.weight.device, None
        model.attend_by("auto", model.embedding.weight.dtype, sampling=True)
        graphs = devices.has_graphs(self.device)
        self.rounded, self.replayed = (bucket, Replayed) if graphs else (int, lambda function: function)
        if self.device.type == "cpu":
            devices.keep_freed_memory()

    def reserve(self, batch, length):
        """Have a KV cache for that many answers and entries: the last one if it is large enough, since graphs know it."""
        pack(self.model)
        if self.cache is None or self.cache.batch < batch or self.cache.junk < length:
            dtype = self.model.embedding.weight.dtype
            self.cache = KVCache(self.model.config, self.rounded(batch), self.rounded(length), self.device, dtype)
            self.compute = self.replayed(self.one_pass)

    def forward(self, layouts, entries, readings, rows):
        """Hidden states (B, R, D) of the entries that are read, of a pass over all `entries`; the rest is padding.

        One layout, list of entries and list of readings (decode.Reading) per answer; `rows`: where it is in the cache.
        """
        size, width = self.rounded(len(rows)), self.rounded(max(map(len, entries)))
        table = torch.zeros(6, size, width, dtype=torch.long)
        table[2], table[5] = 1, self.cache.junk  # padding sees one entry, and writes to one that nothing sees
        for row, (y, computed) in enumerate(zip(layouts, entries)):
            columns = [[column[i] for i in computed] for column in (y.token, y.position, y.prefix, y.begin, y.end)]
            table[:, row, : len(computed)] = torch.tensor([*columns, computed])
        n_keys = self.rounded(int(table[2:5].max()))  # here: later the host would have to wait for the device
        rows = [*rows, *[row for row in range(self.cache.batch) if row not in rows][: size - len(rows)]]
        inputs = [table, torch.tensor(rows)]
        if width > 1:
            inputs.append(self.columns_read(entries, readings, size))
        inputs = [tensor.to(self.device) for tensor in inputs]
        return self.compute(*inputs, n_keys=n_keys, first=rows == list(range(size)))

    def columns_read(self, entries, readings, size):
        """(B, R) where in a pass the entries are that are read."""
        read = []
        for computed, mine in zip(entries, readings):
            column = {entry: n for n, entry in enumerate(computed)}
            read.append([column[entry] for reading in mine for entry in reading.entries])
        columns = torch.zeros(size, self.rounded(max(map(len, read))), dtype=torch.long)
        for row, mine in enumerate(read):
            columns[row, : len(mine)] = torch.tensor(mine)
        return columns

    def one_pass(self, table, rows, columns=None, *, n_keys, first):
        """What the device does in a pass."""
        self.cache.select(rows, first)
        token, position, ranges, entry = table[0], table[1], table[2:5].movedim(0, -1), table[5]
        return self.model(token, position, ranges, self.cache, entry, n_keys, columns)
