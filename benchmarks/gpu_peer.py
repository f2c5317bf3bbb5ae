"""PyTorch's training step of a diffusion transformer: the peer of `benchmarks.gpu`, compiled by `torch.compile`.

The network of `fm_jax.models.DiT`, with the same widths, conditioning, loss, bfloat16 (autocast), clipped fused AdamW
and one average; attention is `scaled_dot_product_attention`, whose fused kernels PyTorch chooses itself.
"""

import math
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"dit_s/2": (384, 12, 6), "dit_b/2": (768, 12, 12), "dit_xl/2": (1152, 28, 16), "small": (32, 2, 2)}
"""Width, blocks and heads: Peebles & Xie 2022, table 1."""
SIDE, CHANNELS, PATCH, CLASSES = 32, 4, 2, 1000


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shifts and scales tokens [batch, tokens, d]."""
    return h * (1 + scale) + shift


class Block(nn.Module):
    """A transformer block with adaLN-Zero."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(emb))[:, None].chunk(6, dim=-1)
        batch, tokens, width = x.shape
        qkv = self.qkv(modulate(self.norm(x), shift_a, scale_a)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + gate_a * self.out(h)
        h = F.gelu(self.mlp_in(modulate(self.norm(x), shift_m, scale_m)), approximate="tanh")
        return x + gate_m * self.mlp_out(h)


class DiT(nn.Module):
    """A transformer over the patches of latents."""

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH * CHANNELS, width)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(CLASSES + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, PATCH * PATCH * CHANNELS)
        position = torch.randn((SIDE // PATCH) ** 2, width)  # any fixed numbers cost the same
        self.register_buffer("position", position)
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        self.register_buffer("frequencies", frequencies)

    def forward(self, t: Tensor, x: Tensor, label: Tensor) -> Tensor:
        batch, rows = len(x), SIDE // PATCH
        angles = 1000 * t[:, None] * self.frequencies
        emb = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.label(label)
        cut = x.view(batch, rows, PATCH, rows, PATCH, CHANNELS).permute(0, 1, 3, 2, 4, 5)
        h = self.patches(cut.reshape(batch, rows * rows, -1)) + self.position
        for block in self.blocks:
            h = block(h, emb)
        shift, scale = self.modulation(F.silu(emb))[:, None].chunk(2, dim=-1)
        h = self.out(modulate(self.norm(h), shift, scale))
        return h.view(batch, rows, rows, PATCH, PATCH, CHANNELS).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)


def train(name: str, batch: int, smoke: bool) -> dict[str, Any]:
    """Times the compiled step; images a second, and the peak of memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = DiT(*SIZES["small" if smoke else name]).to(device)
    average = [p.detach().clone() for p in model.parameters()]
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=device == "cuda")
    x1 = torch.randn(batch, SIDE, SIDE, CHANNELS, device=device)
    label = torch.arange(batch, device=device) % CLASSES
    compiled = model if smoke else torch.compile(model)

    def step() -> Tensor:
        t, x0 = torch.rand(batch, device=device), torch.randn_like(x1)
        at = t[:, None, None, None]
        given = torch.where(torch.rand(batch, device=device) < 0.1, CLASSES, label)
        with torch.autocast(device, torch.bfloat16):
            v = compiled(t, at * x1 + (1 - at) * x0, given)
        loss = (v.float() - (x1 - x0)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1e-4)
        return loss

    def timed(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            loss = step()
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(f"the loss of {name} must be finite, got {value}.")
        return time.perf_counter() - start

    first = timed(2)
    count = 2 if smoke else 20
    rates = [count * batch / timed(count) for _ in range(3)]
    return {
        "network": name,
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in parameters),
        "batch": batch,
        "images_per_second": {"min": min(rates), "median": statistics.median(rates), "max": max(rates)},
        "compile_seconds": first,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }
