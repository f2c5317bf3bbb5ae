"""What the peers do when `benchmarks.lab.Peer` asks them: PyTorch, `torchcfm`, `flow_matching` with `torchdiffeq`.

Run by the benchmarks, in an interpreter with `benchmarks/requirements-peers.txt`; nothing of JAX is needed. Reads one
JSON object a line and answers with one. `{"do": NAME, "name": ..., "threads": n, ...}` makes a closure of the function
NAME of this file, `{"do": "run", "name": ...}` calls it and says the seconds.
"""

import itertools
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

Once = Callable[[], dict[str, Any]]


class Block(nn.Module):
    """A block of the diffusion transformer, with adaLN-Zero (Peebles & Xie 2022, section 3.2)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(emb)[:, None].chunk(6, dim=-1)
        batch, tokens, width = x.shape
        h = self.norm(x) * (1 + scale_a) + shift_a
        q, k, v = self.qkv(h).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        h = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + gate_a * self.out(h)
        return x + gate_m * self.mlp(self.norm(x) * (1 + scale_m) + shift_m)


class DiT(nn.Module):
    """The diffusion transformer with patches of 2x2, called `(t, x, y)` as TorchCFM's U-Net is."""

    def __init__(self, shape: tuple[int, ...], width: int, layers: int, heads: int, num_classes: int):
        super().__init__()
        channels, self.height, self.width = shape
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(num_classes + 1, width)
        self.patches = nn.Linear(4 * channels, width)
        self.register_buffer("position", torch.randn(1, self.height * self.width // 4, width))
        self.register_buffer("frequencies", 1000 * 10_000 ** (-torch.arange(128) / 128))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation, self.out = nn.Linear(width, 2 * width), nn.Linear(width, 4 * channels)
        nn.init.zeros_(self.out.weight)

    def forward(self, t: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        angles = t.expand(len(x))[:, None] * self.frequencies
        emb = nn.functional.silu(self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.labels(y))
        h = self.patches(nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)) + self.position
        for block in self.blocks:
            h = block(h, emb)
        shift, scale = self.modulation(emb)[:, None].chunk(2, dim=-1)
        h = self.out(self.norm(h) * (1 + scale) + shift).transpose(1, 2)
        return nn.functional.pixel_shuffle(h.unflatten(2, (self.height // 2, self.width // 2)), 2)


class Points(nn.Module):
    """TorchCFM's 3 x 64 network on points, called `(t, x, y)`."""

    def __init__(self):
        super().__init__()
        from torchcfm.models.models import MLP

        self.net = MLP(dim=2, w=64, time_varying=True)

    def forward(self, t: torch.Tensor, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return self.net(torch.cat([x, t.expand(len(x))[:, None]], dim=1))


DITS = {"dit_s/2": (384, 12, 6), "dit_b/2": (768, 12, 12), "dit_xl/2": (1152, 28, 16)}


def build(model: str) -> tuple[nn.Module, tuple[int, ...], int]:
    """A network of as many parameters as ours of that name, the shape of its data and the number of its classes."""
    if model == "points":
        return Points(), (2,), 0
    if model in DITS:
        return DiT((4, 32, 32), *DITS[model], num_classes=1000), (4, 32, 32), 1000
    from torchcfm.models.unet import UNetModel

    # The eleventh label is ours for "no class".
    shape: tuple[int, ...] = (3, 32, 32) if model == "cifar10" else (1, 28, 28)
    options: dict[str, Any] = {"num_channels": 32, "num_res_blocks": 1, "num_heads": 4, "attention_resolutions": "7"}
    if model == "torchcfm_mnist":  # as in its own example: this stands for attention at 28x28
        options = {"num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "16"}
    if model == "cifar10":
        options = {"num_channels": 128, "num_res_blocks": 2, "channel_mult": [1, 2, 2, 2], "num_head_channels": 64}
        options |= {"num_heads": 4, "attention_resolutions": "16"}
    return UNetModel(dim=shape, num_classes=11, class_cond=True, **options), shape, 10


def draw(batch: int, shape: tuple[int, ...], classes: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Random data and labels."""
    return torch.randn(batch, *shape), torch.arange(batch) % classes if classes else None


def train(model: str, batch: int, steps: int, compiled: bool = False, fused: bool = False) -> Once:
    """Steps of conditional flow matching: Adam, gradients clipped to 1, one average, a tenth of the labels dropped."""
    net, shape, classes = build(model)
    params = list(net.parameters())
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.Adam(params, lr=1e-3, fused=fused)
    data, labels = draw(batch, shape, classes)
    angles = torch.arange(8) * torch.pi / 4
    centres = 5 * torch.stack([angles.cos(), angles.sin()], dim=1)

    def loss_fn(x1: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        x0, t = torch.randn_like(x1), torch.rand(batch)
        if y is not None:
            y = torch.where(torch.rand(batch) < 0.1, classes, y)
        s = t.view(-1, *[1] * len(shape))
        return ((net(t, (1 - s) * x0 + s * x1, y) - (x1 - x0)) ** 2).mean()

    loss_of = torch.compile(loss_fn) if compiled else loss_fn

    def once() -> dict[str, Any]:
        loss = torch.zeros(())
        for _ in range(steps):
            x1 = centres[torch.randint(8, (batch,))] + torch.randn(batch, 2) if model == "points" else data
            optimizer.zero_grad()
            loss = loss_of(x1, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            torch._foreach_lerp_(average, params, 1e-3)
        return {"loss": loss.item(), "parameters": sum(p.numel() for p in params)}

    return once


def _network(model: str, batch: int, compiled: bool) -> tuple[Callable[..., torch.Tensor], torch.Tensor, Any, int]:
    """A network of random weights none of which is zero, so that it is a field worth solving, and its input."""
    net, shape, classes = build(model)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    x, y = draw(batch, shape, classes)
    return torch.compile(net.eval()) if compiled else net.eval(), x, y, classes


def forward(model: str, batch: int, compiled: bool = False) -> Once:
    """One evaluation."""
    net, x, y, _ = _network(model, batch, compiled)
    t = torch.full((batch,), 0.5)

    def once() -> dict[str, Any]:
        with torch.inference_mode():
            net(t, x, y)
        return {}

    return once


def sample(model: str, batch: int, method: str, steps: int = 0, guided: bool = False, compiled: bool = False) -> Once:
    """Euler's method in a plain loop (`"loop"`), or a method of `flow_matching`'s solver, fixed or adaptive (1e-5)."""
    net, x0, y, classes = _network(model, batch, compiled)
    calls = [0]

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if not guided:
            return net(t, x, y)
        both = net(t, torch.cat([x, x]), torch.cat([y, torch.full_like(y, classes)]))
        with_label, without = both.chunk(2)
        return without + 2.0 * (with_label - without)

    def once() -> dict[str, Any]:
        calls[0] = 0
        with torch.no_grad():
            if method == "loop":
                x = x0
                for i in range(steps):
                    x = x + velocity(x, torch.tensor(i / steps)) / steps
            else:
                from flow_matching.solver import ODESolver

                step_size = 1 / steps if steps else None
                ODESolver(velocity).sample(x_init=x0, step_size=step_size, method=method)
        return {"nfe": calls[0] * (2 if guided else 1)}

    return once


def likelihood(model: str, batch: int, steps: int, method: str, exact: bool, compiled: bool = False) -> Once:
    """`flow_matching`'s log-likelihood, exact or by one probe of Hutchinson's."""
    from flow_matching.solver import ODESolver

    net, x1, y, _ = _network(model, batch, compiled)
    calls = [0]

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return net(t, x, y)

    def log_p0(x: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)

    def once() -> dict[str, Any]:
        calls[0] = 0
        step_size = 1 / steps if steps else None
        ODESolver(velocity).compute_likelihood(x1, log_p0, step_size, method=method, exact_divergence=exact)
        return {"nfe": calls[0]}

    return once


def save(numbers: int, folder: str) -> Once:
    """`torch.save` of so many float32 numbers in four tensors, as parameters, average and Adam's moments, to disk."""
    tensors = [torch.randn(numbers // 4) for _ in range(4)]

    def once() -> dict[str, Any]:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".pt") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())
        return {}

    return once


def load(numbers: int, folder: str) -> Once:
    """`torch.load` of what `save` writes."""
    path = Path(folder) / "peer.pt"
    torch.save([torch.randn(numbers // 4) for _ in range(4)], path)

    def once() -> dict[str, Any]:
        torch.load(path)
        return {}

    return once


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


def batches(path: str, flip: bool, dequantize: bool, batch_size: int, num: int, workers: int, batched: bool) -> Once:
    """`num` more batches of a `DataLoader` whose workers live on; `batched` asks the data for whole batches."""
    data = Images(path, flip, dequantize)
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    if batched:
        options |= {"sampler": BatchSampler(RandomSampler(data), batch_size, drop_last=True), "batch_size": None}
    else:
        options |= {"batch_size": batch_size, "shuffle": True, "drop_last": True}
    loader = DataLoader(data, **options)
    endless = itertools.chain.from_iterable(itertools.repeat(loader))

    def once() -> dict[str, Any]:
        for _ in range(num):
            x, _ = next(endless)
        return {"shape": list(x.shape), "dtype": str(x.dtype)}

    return once


def record() -> dict[str, Any]:
    """Versions of what is installed, and the most memory taken until now."""
    packages = {name: version(name) for name in ("torch", "torchcfm", "flow_matching", "torchdiffeq")}
    peak, status = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Path("/proc/self/status")
    if status.exists():  # what getrusage says begins, on Linux, at the size of the process that started this one
        peak = int(status.read_text().split("VmHWM:")[1].split()[0])
    return {**packages, "peak_rss_bytes": 1024 * peak, "compiler": shutil.which("g++")}


def main() -> None:
    """Answers until there are no more questions."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.manual_seed(0)
    makers = {f.__name__: f for f in (train, forward, sample, likelihood, save, load, batches)}
    made: dict[str, tuple[int, Once]] = {}
    for line in sys.stdin:
        question = json.loads(line)
        do, name = question.pop("do"), question.pop("name", "")
        try:
            if do == "record":
                answer = record()
            elif do == "run":
                threads, once = made[name]
                torch.set_num_threads(threads)
                start, cpu_start = time.perf_counter(), time.process_time()
                answer = once()
                answer |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
            else:
                threads = question.pop("threads", torch.get_num_threads())
                if question.get("compiled") and shutil.which("g++") is None:
                    raise RuntimeError("torch.compile needs a C++ compiler, and there is none.")
                torch.set_num_threads(threads)
                made[name], answer = (threads, makers[do](**question)), {}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
