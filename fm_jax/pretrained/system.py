"""A published system as a value: a network, what it is told, how it is sampled, and what its latents are decoded by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_integer, check_key, check_number, shown
from fm_jax.guidance import Extrapolate, Rule, classifier_free_batched
from fm_jax.latents import LatentSpace
from fm_jax.nfe import Counted
from fm_jax.parameterization import velocity_fn
from fm_jax.pretrained.steps import Steps
from fm_jax.samplers import sample
from fm_jax.schedules import coefficients
from fm_jax.shapes import expand_time
from fm_jax.types import Array, Key, ModelFn, Params

_EXTRAPOLATE = Extrapolate()


class Request(NamedTuple):
    """What is asked for.

    Attributes:
        prompts: texts, or numbers of classes, one for each picture.
        negative: texts to be guided away from, as many; `None` for none, which is what the system takes for none.
        height, width: of the pictures, in pixels.
        guidance: scale of guidance.
    """

    prompts: Sequence[Any]
    negative: Sequence[str] | None
    height: int
    width: int
    guidance: float


class Drawn(NamedTuple):
    """What was drawn.

    Attributes:
        images: float32 [batch, height, width, 3] in [0, 1].
        latents: the network's last state, [batch, h, w, c].
        nfe: evaluations of the network.
        trajectory: the states at all times, [num + 1, batch, h, w, c], if asked for.
        times: the times, [num + 1].
    """

    images: Array
    latents: Array
    nfe: int | None
    trajectory: Array | None
    times: Array


@dataclass(frozen=True, eq=False)
class System:
    """A published text-to-image or class-to-image system; `open_pretrained` makes one of a folder.

    Attributes:
        name: class of its pipeline.
        module, params: the network.
        steps: kind of its prediction, schedule, sampler and times.
        conditions: `conditions(request) -> (cond, null)`: what the network is told; `null` is `None` where there is no
            guidance by a second evaluation.
        autoencoder, autoencoder_params: what decodes latents.
        latents: what the network sees of them.
        channels: of the network's state.
        factor: pixels of a side of the picture for one of the state.
        patch_size: of the network: pixels of the state in a token's side.
        sizes: height and width of a picture by default, in pixels; `None` where the folder does not say.
        num_steps, guidance: by default.
        rule: of guidance.
        told: whether the network is told the scale of guidance, in place of a second evaluation.
    """

    name: str
    module: nn.Module
    params: Params
    steps: Steps
    conditions: Callable[[Request], tuple[Any, Any]]
    autoencoder: nn.Module
    autoencoder_params: Params
    latents: LatentSpace
    channels: int
    factor: int
    patch_size: int
    sizes: tuple[int, int] | None
    num_steps: int
    guidance: float
    rule: Rule = _EXTRAPOLATE
    told: bool = False

    def state_shape(self, num: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape of the state for pictures of a size in pixels.

        Raises:
            ValueError: if a side is no multiple of what a token covers.
        """
        least = self.factor * self.patch_size
        for name, side in (("height", height), ("width", width)):
            check_integer(name, side)
            if side % least:
                raise ValueError(f"{name} must be a multiple of {least} for {self.name}, got {side}.")
        return num, height // self.factor, width // self.factor, self.channels

    def draw(
        self,
        prompts: Sequence[Any] | str | int,
        *,
        key: Key | None = None,
        noise: Any = None,
        negative: str | Sequence[str] | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        trajectory: bool = False,
    ) -> Drawn:
        """Draws a picture for every prompt.

        Args:
            prompts: texts, or numbers of classes.
            key: of the noise; or
            noise: the noise itself, standard normal [batch, h, w, c].
            negative: texts to be guided away from, one or as many as prompts.
            num_steps: how many steps; by default the system's.
            guidance: its scale; by default the system's.
            height: in pixels; by default the system's size.
            width: in pixels; by default the system's size.
            trajectory: whether to keep the states at all times.

        Returns:
            Pictures, latents and what they cost.

        Raises:
            ValueError: for both or neither of `key` and `noise`, a size that the network does not take, a prompt that
                is too long, guidance below 1, which is none, or an option without effect; if the result is not finite.
        """
        many = [prompts] if isinstance(prompts, str | int | np.integer) else prompts
        if not isinstance(many, Sequence | np.ndarray) or len(many) == 0:
            raise ValueError(f"prompts must be one or a list of at least one, got {shown(prompts)}.")
        many = list(many)
        if self.sizes is None and (height is None or width is None):
            raise ValueError(f"height and width must be given: the folder of this {self.name} does not say its size.")
        default = self.sizes or (0, 0)
        height, width = default[0] if height is None else height, default[1] if width is None else width
        num_steps = self.num_steps if num_steps is None else num_steps
        guidance = self.guidance if guidance is None else guidance
        check_integer("num_steps", num_steps)
        check_number("guidance", guidance, "[0, inf)" if self.told else "[1, inf)")
        shape = self.state_shape(len(many), height, width)
        if (key is None) == (noise is None):
            raise ValueError("key or noise must be given, and not both.")
        if key is not None:
            check_key(key)
            noise = jax.random.normal(key, shape)
        if not hasattr(noise, "shape") or noise.shape != shape:
            raise ValueError(f"noise must be {list(shape)}, got {shown(noise)}.")
        if negative is not None and (not isinstance(negative, Sequence) or isinstance(negative, bytes)):
            raise ValueError(f"negative must be one text or a list of them, got {shown(negative)}.")
        negatives = (
            None if negative is None else [negative] * len(many) if isinstance(negative, str) else list(negative)
        )
        if negatives is not None and len(negatives) != len(many):
            raise ValueError(f"negative must be one text or {len(many)}, as there are prompts, got {len(negatives)}.")
        if negatives is not None and guidance == 1:
            raise ValueError("negative has no effect with guidance 1: give another scale, or leave it out.")
        cond, null = self.conditions(Request(many, negatives, height, width, guidance))
        tokens = shape[1] * shape[2] // self.patch_size**2
        times = self.steps.grid(num_steps, tokens)
        sampled, decoded = self._programs
        start, scale = self.steps.start(times) * noise, jnp.float32(guidance)
        solution = sampled(self.params, start, cond, null, scale, np.asarray(times), trajectory=trajectory)
        images = decoded(self.autoencoder_params, solution.x)
        for what, value in (("latents", solution.x), ("images", images)):
            if not bool(jnp.isfinite(value).all()):
                by = "network" if what == "latents" else "autoencoder"
                raise ValueError(
                    f"The {what} of {self.name} are not finite: the parameters of its {by} are not, or overflow in "
                    "their dtype."
                )
        return Drawn(images, solution.x, int(solution.nfe), solution.trajectory, times)

    @cached_property
    def _programs(self) -> tuple[Callable[..., Any], Callable[..., Array]]:
        """Sampling and decoding, compiled once for all drawings of one size."""
        return jax.jit(self._sample, static_argnames=("trajectory",)), jax.jit(self._decode)

    def model_fn(self, params: Params) -> tuple[ModelFn, Any]:
        """The network as a function, and the kind of its prediction."""
        schedule = self.steps.schedule

        def predict(t: Array, x: Array, cond: Any) -> Array:
            out: Any = self.module.apply({"params": params}, t, x, cond)
            out = out[..., : self.channels]
            if self.steps.kind != "v":
                return out
            level = coefficients(schedule, t)
            return expand_time(level.alpha, x) * out + expand_time(level.sigma, x) * x

        return Counted(predict, 1), "noise" if self.steps.kind == "v" else self.steps.kind

    def _sample(
        self, params: Params, x0: Array, cond: Any, null: Any, guidance: Array, times: Any, trajectory: bool
    ) -> Any:
        model_fn, kind = self.model_fn(params)
        schedule = self.steps.schedule
        if null is None:
            v = velocity_fn(model_fn, kind, schedule, cond)
        else:
            v = classifier_free_batched(model_fn, kind, schedule, cond, null, guidance, rule=self.rule)
        return sample(v, x0, self.steps.sampler, times=times, trajectory=trajectory)

    def _decode(self, params: Params, x: Array) -> Array:
        z = self.latents.to_latent(x)
        decoded = self.autoencoder.apply({"params": params}, z, method="decode")
        return jnp.clip(decoded / 2 + 0.5, 0, 1)
