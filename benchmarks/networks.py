"""The networks that the benchmarks of speed and scale measure, by name, each with the shape of its images.

Nothing but JAX, Flax, Optax and jaxtyping is imported here: a machine that measures needs no more.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn

from fm_jax.conditions import DropCondition
from fm_jax.losses import flow_matching
from fm_jax.models import Compute, LabelEmbedding, linen_apply, make_dit, make_unet
from fm_jax.paths import AffinePath
from fm_jax.types import LossFn


@dataclass(frozen=True)
class Network:
    """What a name stands for.

    Attributes:
        size: name of the size, for `make_unet` or `make_dit`.
        event_shape: shape of one image.
        num_classes: labels of its data set.
        overrides: attributes to change.
    """

    size: str
    event_shape: tuple[int, ...]
    num_classes: int
    overrides: tuple[tuple[str, Any], ...] = ()

    @property
    def is_dit(self) -> bool:
        """Whether it is a transformer: only these have `scan_layers`."""
        return self.size not in ("tiny", "mnist", "cifar10")

    def make(self, compute: Compute, *, scan_layers: bool = False) -> nn.Module:
        """Builds the module, without dropout."""
        options = dict(self.overrides) | {"compute": compute, "dropout": 0.0}
        if not self.is_dit:
            return make_unet(self.size, embed=LabelEmbedding(self.num_classes), **options)
        if scan_layers:
            options["scan_layers"] = True
        return make_dit(self.size, embed=LabelEmbedding(self.num_classes, stddev=0.02), **options)

    def loss(self, model: nn.Module) -> LossFn:
        """Conditional flow matching, with a tenth of the labels dropped."""
        drop = DropCondition(0.1, null_cond=self.num_classes)
        return flow_matching(linen_apply(model), AffinePath(), drop=drop)


LATENTS = (32, 32, 4)
"""Of images of 256x256 pixels, as in Peebles & Xie 2022."""
NETWORKS = {
    "mnist": Network("mnist", (28, 28, 1), 10),
    "cifar10": Network("cifar10", (32, 32, 3), 10),
    **{f"dit_{size.lower()}/2": Network(f"{size}/2", LATENTS, 1000) for size in ("S", "B", "L", "XL")},
    # For smoke runs and tests.
    "small_unet": Network(
        "tiny",
        (8, 8, 1),
        10,
        (("channels", 8), ("channel_mults", (1,)), ("attention_levels", ()), ("num_heads", 1)),
    ),
    "small_dit": Network("S/2", (8, 8, 4), 10, (("hidden", 32), ("num_layers", 2), ("num_heads", 2))),
}
