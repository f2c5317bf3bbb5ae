"""Movie Gen's video transformer in PyTorch, written independently of the network of the package.

Polyak et al. 2024, "Movie Gen: A Cast of Media Foundation Models", sections 3.1.3 and 3.1.4. Videos: [b, c, f, h, w].
"""

import math

import pytest

torch = pytest.importorskip("torch")  # what collects doctests imports this file too
nn, F = torch.nn, torch.nn.functional


def linear(features_in, features_out):
    return nn.Linear(features_in, features_out, bias=False)


class RootMeanSquare(nn.Module):
    def __init__(self, width, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x):
        y = x.float()
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + self.epsilon)
        return (y * self.weight.float()).to(x.dtype)


class Heads(nn.Module):
    """Attention with the softmax written out."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (linear(width, width) for _ in range(4))

    def forward(self, x, context, seen=None):
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1))
            for f, y in zip((self.query, self.key, self.value), (x, context, context))
        )
        products = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])
        if seen is not None:
            products = products.masked_fill(~seen[:, None, None, :], -math.inf)
        weights = products.float().softmax(-1).to(v.dtype)
        return self.out(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads, inner, epsilon):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, width))
        self.norm_attention, self.norm_mlp = RootMeanSquare(width, epsilon), RootMeanSquare(width, epsilon)
        self.attention, self.cross = Heads(width, heads), Heads(width, heads)
        self.mlp_gate, self.mlp_in, self.mlp_out = linear(width, inner), linear(width, inner), linear(inner, width)

    def forward(self, x, place, time, text, seen):
        """`time` is [b, 6, d]: the shift, scale and gate of attention, then those of the MLP."""
        time = time + self.table
        x = x + place
        y = self.norm_attention(x) * (1 + time[:, 1:2]) + time[:, 0:1]
        x = x + time[:, 2:3] * self.attention(y, y)
        x = x + self.cross(x, text, seen)
        y = self.norm_mlp(x) * (1 + time[:, 4:5]) + time[:, 3:4]
        return x + time[:, 5:6] * self.mlp_out(F.silu(self.mlp_gate(y)) * self.mlp_in(y))


class Positions(nn.Module):
    def __init__(self, sizes, width):
        super().__init__()
        self.frames, self.rows, self.columns = (nn.Embedding(size, width) for size in sizes)

    def forward(self, frames, rows, columns):
        places = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).reshape(-1, 3)
        return self.frames(places[:, 0]) + self.rows(places[:, 1]) + self.columns(places[:, 2])


class Text(nn.Module):
    def __init__(self, features, width, epsilon):
        super().__init__()
        self.linear, self.norm = linear(features, width), nn.LayerNorm(width, eps=epsilon)

    def forward(self, x):
        return self.norm(self.linear(x))


class MovieGen(nn.Module):
    def __init__(
        self, *, hidden, num_layers, num_heads, mlp_hidden, channels, epsilon, patch_size, positions, encoders
    ):
        super().__init__()
        self.patch_size, self.channels = patch_size, channels
        self.patches = nn.Conv3d(channels, hidden, patch_size, patch_size, bias=False)
        self.time = nn.Sequential(linear(256, hidden), nn.SiLU(), linear(hidden, hidden))
        self.modulation = linear(hidden, 6 * hidden)
        self.text = nn.ModuleDict({name: Text(features, hidden, epsilon) for name, features in encoders.items()})
        self.positions = Positions(positions, hidden)
        self.blocks = nn.ModuleList(Block(hidden, num_heads, mlp_hidden, epsilon) for _ in range(num_layers))
        self.norm, self.table = RootMeanSquare(hidden, epsilon), nn.Parameter(torch.zeros(2, hidden))
        self.out = linear(hidden, math.prod(patch_size) * channels)

    def forward(self, t, x, text, seen):
        """`t` [b] from noise to data; `text` and `seen` dicts by encoder."""
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        angles = 1000 * t[:, None] * frequencies
        emb = self.time(torch.cat([angles.cos(), angles.sin()], 1).to(self.table.dtype))
        time = self.modulation(F.silu(emb)).unflatten(-1, (6, -1))
        words = torch.cat([module(text[name]) for name, module in self.text.items()], 1)
        known = {name: seen.get(name, torch.ones(text[name].shape[:2], dtype=torch.bool)) for name in self.text}
        seen = torch.cat(list(known.values()), 1)

        h = self.patches(x)
        grid = h.shape[2:]
        h, place = h.flatten(2).transpose(1, 2), self.positions(*grid)
        for block in self.blocks:
            h = block(h, place, time, words, seen)
        shift, scale = (self.table + emb[:, None]).unbind(1)
        h = self.out(self.norm(h) * (1 + scale[:, None]) + shift[:, None])
        h = h.reshape(len(x), *grid, *self.patch_size, self.channels)  # b f h w s p q c
        return torch.einsum("bfhwspqc->bcfshpwq", h).reshape(len(x), self.channels, *x.shape[2:])
