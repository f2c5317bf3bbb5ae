"""PyTorch references of DiT, SiT and LightningDiT, in the key names of the authors' files, written from the papers."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
nn, F = torch.nn, torch.nn.functional


def features(s: torch.Tensor, dim: int = 256) -> torch.Tensor:
    w = torch.exp(-math.log(10_000) * torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))
    return torch.cat([torch.cos(s[:, None] * w), torch.sin(s[:, None] * w)], 1)


class Numbered(nn.Module):
    """Submodules under the numbers that nn.Sequential would give them."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name.strip("_"), module)

    def __getitem__(self, name: str) -> nn.Module:
        return self._modules[name]


class TimeEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = Numbered(_0=nn.Linear(256, width), _2=nn.Linear(width, width))

    def forward(self, s):
        return self.mlp["2"](F.silu(self.mlp["0"](features(s))))


class Labels(nn.Module):
    def __init__(self, num: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num + 1, width)


class Patches(nn.Module):
    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Rms(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, turn=lambda x: x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(turn(q) @ turn(k).transpose(-1, -2) / math.sqrt(d // self.heads), -1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGlu(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, lightning: bool) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = SwiGlu(width, int(8 / 3 * width)) if lightning else Mlp(width)
        norms = [Rms(width) if lightning else nn.LayerNorm(width, 1e-6, elementwise_affine=False) for _ in range(2)]
        self.norm1, self.norm2 = norms
        self.adaLN_modulation = Numbered(_1=nn.Linear(width, 6 * width))

    def forward(self, x, emb, turn):
        s1, c1, g1, s2, c2, g2 = self.adaLN_modulation["1"](F.silu(emb))[:, None].chunk(6, -1)
        x = x + g1 * self.attn(self.norm1(x) * (1 + c1) + s1, turn)
        return x + g2 * self.mlp(self.norm2(x) * (1 + c2) + s2)


class Final(nn.Module):
    def __init__(self, width: int, features: int, lightning: bool) -> None:
        super().__init__()
        self.norm_final = Rms(width) if lightning else nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, features)
        self.adaLN_modulation = Numbered(_1=nn.Linear(width, 2 * width))

    def forward(self, x, emb):
        shift, scale = self.adaLN_modulation["1"](F.silu(emb))[:, None].chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Transformer(nn.Module):
    """DiT and SiT; `lightning` for LightningDiT. The table is of a square; a rectangle takes it cut to its top left."""

    def __init__(self, width, depth, heads, patch, channels, out_channels, classes, size, lightning=False) -> None:
        super().__init__()
        self.patch, self.heads, self.lightning, self.grid = patch, heads, lightning, size // patch
        self.x_embedder = Patches(channels, width, patch)
        self.t_embedder, self.y_embedder = TimeEmbedder(width), Labels(classes, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, lightning) for _ in range(depth))
        self.final_layer = Final(width, patch**2 * out_channels, lightning)

    def forward(self, x, s, y, outputs=None):
        b, _, height, width = x.shape
        rows, columns = height // self.patch, width // self.patch
        table = self.pos_embed.reshape(self.grid, self.grid, -1)[:rows, :columns].reshape(1, rows * columns, -1)
        h = self.x_embedder(x) + table
        emb = self.t_embedder(s) + self.y_embedder.embedding_table(y)
        for i, block in enumerate(self.blocks):
            h = block(h, emb, self.turn(rows, columns, h) if self.lightning else lambda x: x)
            if outputs is not None:
                outputs[f"blocks.{i}"] = h.numpy()
        h = self.final_layer(h, emb).reshape(b, rows, columns, self.patch, self.patch, -1)
        return torch.einsum("brcpqd->brpcqd", h).reshape(b, height, width, -1)

    def turn(self, rows, columns, h):
        half = h.shape[-1] // self.heads // 2
        w = 10_000 ** (-np.arange(0, half, 2) / half)
        row, column = np.divmod(np.arange(rows * columns), columns)
        angles = torch.tensor(np.concatenate([np.outer(row, w), np.outer(column, w)], 1), dtype=torch.float32)

        def turned(x):
            z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
            return torch.view_as_real(z * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

        return turned
