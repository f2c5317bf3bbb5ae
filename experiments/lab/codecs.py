"""Autoencoders for experiments: opened and known by their parameters; pictures to latents and back in batches."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab.processes import everywhere, gathered, is_first, spread
from fm_jax.data.lazy import watched
from fm_jax.latents import LatentSpace
from fm_jax.models.autoencoder import AUTOENCODER_CONFIGS, Autoencoder, latent_space, make_autoencoder
from fm_jax.models.tiny_autoencoder import TINY_AUTOENCODER_CONFIGS, TinyAutoencoder, make_tiny_autoencoder
from fm_jax.types import Array, Params
from fm_jax.weights import WeightsError, load, open_model, open_tensors
from fm_jax.weights.autoencoder import autoencoder_rules
from fm_jax.weights.rules import Rules
from fm_jax.weights.tiny_autoencoder import tiny_autoencoder_rules

BATCH = 64
"""Pictures that are encoded or decoded at once."""


@dataclass(frozen=True, eq=False)
class Codec:
    """An autoencoder with its parameters, float32, and the pictures that it is to code.

    Attributes:
        module: an `Autoencoder` or a `TinyAutoencoder`.
        params: its parameters.
        image_shape: of a picture, (h, w, c). Its edges are continued to sides that the autoencoder halves, and what is
            decoded is cut again; grey pictures are given to an autoencoder of three channels in all of them, and what
            it decodes is averaged.
        path: where it is from.

    Raises:
        ValueError: if the autoencoder takes other channels.
    """

    module: Any
    params: Params
    image_shape: tuple[int, ...]
    path: Path

    def __post_init__(self) -> None:
        own, given = self.module.image_channels, self.image_shape[-1]
        if given not in (own, 1):
            raise ValueError(
                f"The autoencoder {self.path} codes pictures of {own} channels, and these are {self.image_shape}."
            )

    @property
    def space(self) -> LatentSpace:
        """What its authors make of its latents."""
        return latent_space(self.module, self.params)

    def encoder(self) -> Callable[[np.ndarray], tuple[Array, Array | None]]:
        """`encode(x) -> (mean, deviation)` of pictures [n, *image_shape] in [-1, 1], over all devices."""
        params = everywhere(self.params)

        @jax.jit
        def encode(params: Params, x: Array) -> Any:
            found: Any = self.module.apply({"params": params}, x, method="encode")
            if isinstance(self.module, TinyAutoencoder):
                return found, None
            mean, log_variance = found
            return mean, jnp.exp(log_variance / 2)

        def of_pictures(x: np.ndarray) -> tuple[Array, Array | None]:
            mean, std = encode(params, spread(self._widened(x)))
            return mean[: len(x)], None if std is None else std[: len(x)]

        return of_pictures

    def decode(self, z: np.ndarray, batch_size: int = BATCH, progress: bool | None = None) -> np.ndarray:
        """Pictures float32 [n, *image_shape], clipped to [-1, 1], of the autoencoder's own latents [n, h, w, c].

        All devices of all processes share a batch; each process has all pictures afterwards.
        """
        params, z = everywhere(self.params), np.asarray(z)
        starts = range(0, len(z), batch_size)
        found = []
        show = progress if is_first() else False
        for start in watched(starts, len(starts), f"batches of {batch_size}", show, ("decoding", "Decoded")):
            part = z[start : start + batch_size]
            whole = np.resize(part, (batch_size, *z.shape[1:])) if len(part) < batch_size else part  # one compilation
            found.append(self._narrowed(gathered(self._decode(params, spread(whole)))[: len(part)]))
        return np.concatenate(found)

    @property
    def _decode(self) -> Any:
        return _decoder(self.module)

    def _widened(self, x: np.ndarray) -> np.ndarray:
        edges = [(0, 0), *(_edges(n, self.module.factor) for n in x.shape[1:3]), (0, 0)]
        x = np.pad(x, edges, mode="edge") if any(map(any, edges)) else x
        return np.repeat(x, self.module.image_channels, axis=-1) if x.shape[-1] != self.module.image_channels else x

    def _narrowed(self, x: np.ndarray) -> np.ndarray:
        (top, _), (left, _) = (_edges(n, self.module.factor) for n in self.image_shape[:2])
        x = x[:, top : top + self.image_shape[0], left : left + self.image_shape[1]]
        x = x.mean(axis=-1, keepdims=True) if x.shape[-1] != self.image_shape[-1] else x
        return np.clip(x, -1, 1).astype(np.float32)


_DECODERS: dict[Any, Any] = {}


def _decoder(module: nn.Module) -> Any:
    """The jitted decoder of a module, compiled once."""
    if module not in _DECODERS:
        _DECODERS[module] = jax.jit(lambda params, z: module.apply({"params": params}, z, method="decode"))
    return _DECODERS[module]


def _edges(size: int, factor: int) -> tuple[int, int]:
    """How much is added in front of and behind a side, to make it a multiple."""
    missing = -size % factor
    return missing // 2, missing - missing // 2


def open_codec(path: Path, image_shape: tuple[int, ...], option: str = "--autoencoder") -> Codec:
    """Opens an autoencoder.

    Args:
        path: a folder that `fm_jax.weights.open_model` opens; a run of `experiments.autoencoder`; or a file of
            safetensors that holds the parameters of a published one, of whose two halves either stands for both.
        image_shape: of the pictures, (h, w, c).
        option: that the path was given by.

    Raises:
        WeightsError: for what is none; of a pickle it says how to convert it.
        ValueError: if it codes pictures of other channels.
    """
    if path.is_dir():
        inside = path / "autoencoder"
        module, params = open_model(inside if (inside / "config.json").is_file() else path, dtype=jnp.float32)
    elif path.exists():
        module, params = _of_file(path, option)
    else:
        raise FileNotFoundError(f"{option} {path} does not exist: give a folder or a file of safetensors.")
    if not isinstance(module, Autoencoder | TinyAutoencoder):
        raise WeightsError(f"{option} {path} is a {type(module).__name__}, and no autoencoder of pictures.")
    return Codec(module, params, image_shape, path)


def _of_file(path: Path, option: str) -> tuple[nn.Module, Params]:
    """A published autoencoder from one file, or from its two halves."""
    shapes = {key: value.shape for key, value in open_tensors(path).items()}
    for name, module in _tiny():
        for half, other in (("encoder", "decoder"), ("decoder", "encoder")):
            rules = {half: tiny_autoencoder_rules(module, "official", half) for half in ("encoder", "decoder")}
            if rules[half].shapes != shapes:
                continue
            beside = path.with_name(path.name.replace(half, other))
            if beside == path or not beside.is_file():
                raise WeightsError(
                    f"{option} {path} is the {half} of {name} alone: put its {other} beside it, under a name with "
                    f"{other} in place of {half}."
                )
            both = [load(file, rules[which], dtype=jnp.float32) for file, which in ((path, half), (beside, other))]
            return module, both[0] | both[1]
    found = [(name, module, rules) for name, module, rules in _published() if rules.shapes == shapes]
    if len(found) == 1:
        return found[0][1], load(path, found[0][2], dtype=jnp.float32)
    if found:
        names = " and ".join(name for name, _, _ in found)
        raise WeightsError(
            f"{option} {path} could be {names}, whose parameters are of the same shapes: give the folder with its "
            "config.json."
        )
    raise WeightsError(
        f"{option} {path} holds the parameters of no published autoencoder: give the folder with its config.json."
    )


def _tiny() -> Iterator[tuple[str, TinyAutoencoder]]:
    for name in TINY_AUTOENCODER_CONFIGS:
        yield f"the tiny autoencoder {name}", make_tiny_autoencoder(name)


def _published() -> Iterator[tuple[str, Any, Rules]]:
    for name, tiny in _tiny():
        for layout in ("diffusers", "official"):
            yield name, tiny, tiny_autoencoder_rules(tiny, layout)  # type: ignore[arg-type]
    for name in AUTOENCODER_CONFIGS:
        module = make_autoencoder(name)
        for layout in ("diffusers", "diffusers_old", "ldm"):
            yield f"the autoencoder {name}", module, autoencoder_rules(module, layout)  # type: ignore[arg-type]


def sha256_of(params: Params) -> str:
    """SHA-256 of parameters: of the path, the dtype, the shape and the bytes of each, in the order of paths.

    Example:
        >>> sha256_of({"a": np.zeros(2, np.float32)})[:8]
        '86aa2fbc'
    """
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in sorted((jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves):
        x = np.asarray(leaf)
        digest.update(f"{path} {x.dtype} {x.shape} ".encode())
        digest.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
