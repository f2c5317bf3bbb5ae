"""TAESD and TAEF2 in PyTorch, from what is known of them, with the names of their published files; [0, 1] images."""

from collections.abc import Iterator, Sequence

import pytest

torch = pytest.importorskip("torch")  # what collects doctests imports this file too
nn = torch.nn


def conv(inputs: int, outputs: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)  # type: ignore[arg-type]


class Residual(nn.Module):
    """Three convolutions beside the identity; where the image is pooled, that comes first."""

    def __init__(self, width: int, pooled: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [conv(width, width), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])
        if pooled:
            wide = 4 * width
            into, out = nn.Conv2d(width, wide, 1, bias=False), nn.Conv2d(wide, width, 1, bias=False)
            self.pool = nn.Sequential(into, nn.GroupNorm(4, wide), nn.ReLU(), out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return torch.relu(x + self.conv(x))


class Squash(nn.Module):
    """Latents into (-3, 3)."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(z / 3)


def encoder(width: int, blocks: Sequence[int], latents: int, pooled: bool) -> nn.Sequential:
    def layers() -> Iterator[nn.Module]:
        yield conv(3, width)
        for level, num in enumerate(blocks):
            if level:
                yield conv(width, width, stride=2, bias=False)
            for _ in range(num):
                yield Residual(width, pooled and level == len(blocks) - 1)
        yield conv(width, latents)

    return nn.Sequential(*layers())


def decoder(width: int, blocks: Sequence[int], latents: int, pooled: bool) -> nn.Sequential:
    def layers() -> Iterator[nn.Module]:
        yield from (Squash(), conv(latents, width), nn.ReLU())
        for i, num in enumerate(blocks):
            for _ in range(num):
                yield Residual(width, pooled and i == 0)
            if i < len(blocks) - 1:
                yield from (nn.Upsample(scale_factor=2), conv(width, width, bias=False))
        yield conv(width, 3)

    return nn.Sequential(*layers())


class Tiny(nn.Module):
    """Both halves."""

    def __init__(
        self, width: int, encoder_blocks: Sequence[int], decoder_blocks: Sequence[int], latents: int, pooled: bool
    ) -> None:
        super().__init__()
        self.encoder = encoder(width, encoder_blocks, latents, pooled)
        self.decoder = decoder(width, decoder_blocks, latents, pooled)
