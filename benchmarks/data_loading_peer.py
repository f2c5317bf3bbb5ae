"""PyTorch's `DataLoader` on the arrays of `benchmarks.data_loading`, run by an interpreter that has torch.

Each line on standard input is a request as JSON, each line on standard output its answer; the first line says versions.
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler


class Images(Dataset):
    """One image at an index, or a batch at a list of them: float32 in [-1, 1], mirrored or dequantised."""

    def __init__(self, path: str, flip: bool, dequantize: bool):
        self._images = torch.from_numpy(np.load(path))
        self._flip, self._dequantize = flip, dequantize

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> tuple[torch.Tensor, Any]:
        x = self._images[index]
        if self._flip:
            if x.ndim == 3:
                x = x.flip(1) if torch.rand(()) < 0.5 else x
            else:
                x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(2), x)
        x = x.float()
        if self._dequantize:
            return x.add_(torch.rand_like(x)).mul_(2 / 256).sub_(1), index
        return x.div_(127.5).sub_(1), index


def endless(
    path: str, flip: bool, dequantize: bool, batch_size: int, workers: int, batched: bool
) -> Iterator[tuple[torch.Tensor, Any]]:
    """Batches without end, by workers that live on; `batched` asks the data for whole batches."""
    data = Images(path, flip, dequantize)
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    if batched:
        options |= {"sampler": BatchSampler(RandomSampler(data), batch_size, drop_last=True), "batch_size": None}
    else:
        options |= {"batch_size": batch_size, "shuffle": True, "drop_last": True}
    loader = DataLoader(data, **options)
    while True:
        yield from loader


def main() -> None:
    """Answers until standard input ends."""
    torch.set_num_threads(1)  # more do not help at these sizes, and workers have one each in any case
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    running: dict[str, Iterator[Any]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        num = request.pop("num")
        if (name := json.dumps(request)) not in running:
            running[name] = endless(**request)
            next(running[name])  # starts the workers
        start = time.perf_counter()
        for _ in range(num):
            x, _ = next(running[name])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "shape": list(x.shape), "dtype": str(x.dtype)}), flush=True)


if __name__ == "__main__":
    main()
