"""Diffusion Policy's U-Net over sequences in PyTorch, written from its description: names of parameters and formulas.

It shares no code with the network that it checks: convolutions are sums over shifted copies, normalisation and
activations are spelled out, and the way up is a recursion.
"""

import math

import pytest

torch = pytest.importorskip("torch")  # what collects doctests imports this file too
nn = torch.nn


def mish(x):
    return x * torch.tanh(torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0))


class Kernel(nn.Module):
    """Weights and biases of a convolution."""

    def __init__(self, *shape, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(*shape)), nn.Parameter(torch.empty(outputs))

    def forward(self, x, stride=1):
        """Every tap sees its own copy of the padded sequence."""
        size, length = self.weight.shape[2], x.shape[2]
        x = torch.nn.functional.pad(x, (size // 2, size // 2))
        taps = [x[:, :, k : k + length : stride] for k in range(size)]
        return sum(self.weight[:, :, k] @ tap for k, tap in enumerate(taps)) + self.bias[:, None]


def kernel(inputs, outputs, size):
    return Kernel(outputs, inputs, size, outputs=outputs)


class Down(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = kernel(width, width, 3)

    def forward(self, x):
        return self.conv(x, stride=2)


class Up(nn.Module):
    """Every element spreads four weights onto the finer sequence around it."""

    def __init__(self, width):
        super().__init__()
        self.conv = Kernel(width, width, 4, outputs=width)

    def forward(self, x):
        length = x.shape[2]
        out = torch.zeros(*x.shape[:2], 2 * length + 2)
        for k in range(4):
            out[:, :, k : k + 2 * length : 2] += self.conv.weight[:, :, k].T @ x
        return out[:, :, 1:-1] + self.conv.bias[:, None]


class Norm(nn.Module):
    def __init__(self, groups, width):
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, x):
        grouped = x.reshape(x.shape[0], self.groups, -1)
        centred = grouped - grouped.mean(dim=2, keepdim=True)
        normed = centred / torch.sqrt(centred.square().mean(dim=2, keepdim=True) + 1e-5)
        return normed.reshape(x.shape) * self.weight[:, None] + self.bias[:, None]


class Convolved(nn.Module):
    def __init__(self, inputs, outputs, size, groups):
        super().__init__()
        self.block = nn.ModuleList([kernel(inputs, outputs, size), Norm(groups, outputs)])

    def forward(self, x):
        return mish(self.block[1](self.block[0](x)))


class Block(nn.Module):
    def __init__(self, inputs, outputs, told, size, groups, film):
        super().__init__()
        self.blocks = nn.ModuleList(
            [Convolved(inputs, outputs, size, groups), Convolved(outputs, outputs, size, groups)]
        )
        self.cond_encoder = nn.ModuleDict({"1": nn.Linear(told, outputs * (1 + film))})
        self.residual_conv = None if inputs == outputs else kernel(inputs, outputs, 1)
        self.film = film

    def forward(self, x, told):
        h, said = self.blocks[0](x), self.cond_encoder["1"](mish(told))[:, :, None]
        if self.film:
            width = h.shape[1]
            h = said[:, :width] * h + said[:, width:]
        else:
            h = h + said
        return self.blocks[1](h) + (x if self.residual_conv is None else self.residual_conv(x))


class SequenceUNet(nn.Module):
    def __init__(self, inputs, outputs, widths, size, groups, time, vector, local, local_up, film):
        super().__init__()
        options = (time + vector, size, groups, film)
        self.time = time
        encoder = {"1": nn.Linear(time, 4 * time), "3": nn.Linear(4 * time, time)}
        self.diffusion_step_encoder = nn.ModuleDict(encoder)
        if local:
            self.local_cond_encoder = nn.ModuleList(Block(local, widths[0], *options) for _ in range(1 + local_up))
        before = [inputs, *widths[:-1]]
        self.down_modules = nn.ModuleList()
        for i, (old, new) in enumerate(zip(before, widths, strict=True)):
            level = [Block(old, new, *options), Block(new, new, *options)]
            self.down_modules.append(nn.ModuleList([*level, *([Down(new)] if i + 1 < len(widths) else [])]))
        self.mid_modules = nn.ModuleList(Block(widths[-1], widths[-1], *options) for _ in range(2))
        self.up_modules = nn.ModuleList()
        for i in range(len(widths) - 1, 0, -1):
            wide, narrow = widths[i], widths[i - 1]
            level = [Block(2 * wide, narrow, *options), Block(narrow, narrow, *options), Up(narrow)]
            self.up_modules.append(nn.ModuleList(level))
        final = [Convolved(widths[0], widths[0], size, groups), kernel(widths[0], outputs, 1)]
        self.final_conv = nn.ModuleList(final)

    def steps(self, n):
        """What is said of the step: sines before cosines, from frequency 1 to exactly 1 / 10000."""
        half = self.time // 2
        angles = n[:, None] * torch.exp(torch.arange(half) * (-math.log(10_000) / (half - 1)))
        h = self.diffusion_step_encoder["1"](torch.cat([angles.sin(), angles.cos()], dim=1))
        return self.diffusion_step_encoder["3"](mish(h))

    def forward(self, x, n, vector=None, local=None):
        told = self.steps(n) if vector is None else torch.cat([self.steps(n), vector], dim=1)

        def level(i, h):
            first, second, *down = self.down_modules[i]
            h = first(h, told)
            if i == 0 and local is not None:
                h = h + self.local_cond_encoder[0](local, told)
            h = second(h, told)
            if not down:
                h_below = h
                for middle in self.mid_modules:
                    h_below = middle(h_below, told)
            else:
                h_below = level(i + 1, down[0](h))
            if i == 0:
                return h_below
            first, second, up = self.up_modules[len(self.down_modules) - 1 - i]
            return up(second(first(torch.cat([h_below, h], dim=1), told), told))

        h = level(0, x)
        if local is not None and len(self.local_cond_encoder) > 1:
            h = h + self.local_cond_encoder[1](local, told)
        return self.final_conv[1](self.final_conv[0](h))
