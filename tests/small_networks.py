"""Every network, small, with what it is told: for the tests of branches and of control."""

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.models import (
    MLP,
    Compute,
    Conditions,
    CrossDiT,
    DiT,
    Flux,
    LabelEmbedding,
    LightningDiT,
    MMDiT,
    SongUNet,
    UNet,
    UNetCondition,
    VideoDiT,
    Wan,
)

SMALL = {"hidden": 16, "num_heads": 2}
LABELS = jnp.array([1, 2])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


TEXT = normal(1, 2, 3, 6)
TOLD = Conditions(tokens=TEXT)
UNETS = {"channels": 8, "channel_mults": (1, 2), "num_blocks": 1}
NETWORKS = {
    "mlp": (lambda **o: MLP(features=(16, 16), time_features=8, embed=LabelEmbedding(3), **o), LABELS),
    "unet": (lambda **o: UNet(**UNETS, num_heads=2, num_groups=4, embed=LabelEmbedding(3), **o), LABELS),
    "song_unet": (lambda **o: SongUNet(**UNETS, **o), None),
    "unet_condition": (
        lambda **o: UNetCondition(
            **{"in_channels": 2, "out_channels": 2, "widths": (8, 16), "num_blocks": 1, "attention_levels": (1,)},
            **{"num_heads": (2, 2), "num_layers": (1, 2), "token_width": 6, "num_groups": 4, "size_features": 8},
            **o,
        ),
        TOLD,
    ),
    "dit": (lambda **o: DiT(num_layers=2, **SMALL, embed=LabelEmbedding(3), **o), LABELS),
    "lightning": (
        lambda **o: LightningDiT(patch_size=2, num_layers=2, **SMALL, embed=LabelEmbedding(3), **o),
        LABELS,
    ),
    "mmdit": (
        lambda **o: MMDiT(
            **SMALL,
            **{"num_layers": 4, "num_dual": 1, "channels": 2, "token_dim": 6, "vector_dim": 5},
            **{"table_size": 4, "table_base": 4, "qk_norm": True},
            **o,
        ),
        Conditions(tokens=TEXT, vector=normal(2, 2, 5)),
    ),
    "flux": (
        lambda **o: Flux(
            **SMALL,
            **{"num_double": 2, "num_single": 2, "channels": 2, "token_dim": 6, "vector_dim": 5},
            **{"axes": (2, 2, 4), "guidance": False},
            **o,
        ),
        Conditions(tokens=TEXT, vector=normal(2, 2, 5)),
    ),
    "crossdit": (
        lambda **o: CrossDiT(
            **SMALL,
            **{"num_layers": 2, "text_features": 6, "sample_size": 4, "in_channels": 2, "out_channels": 2},
            **o,
        ),
        TOLD,
    ),
    "videodit": (
        lambda **o: VideoDiT(
            **SMALL,
            **{"num_layers": 2, "mlp_hidden": 24, "positions": (2, 2, 2), "encoders": (("words", 6),), "channels": 2},
            **o,
        ),
        Conditions(tokens={"words": TEXT}),
    ),
    "wan": (lambda **o: Wan(**SMALL, num_layers=2, mlp_hidden=24, text_features=6, channels=2, **o), TOLD),
}
"""By name: the network of options such as `compute` and `scan_layers`, and what it is told, of 2 examples."""
SCANNED = ("unet_condition", "dit", "lightning", "mmdit", "flux", "crossdit", "videodit", "wan")
BOTH = ("dit", "mmdit", "flux")
"""Those of one, two and both kinds of streams, which are tried without a loop over their blocks too."""
VARIANTS = [(name, True if name in SCANNED else None) for name in NETWORKS] + [(name, False) for name in BOTH]
"""Name of the network, and whether its blocks are in a loop, `None` for those that cannot be."""
T = jnp.array([0.2, 0.7])


def variant_id(variant):
    return variant[0] + {None: "", False: "-unrolled", True: "-scan"}[variant[1]]


def make(name, scan, **options):
    """The network, and what it is told."""
    network, told = NETWORKS[name]
    return network(**options | ({} if scan is None else {"scan_layers": scan})), told


def state(name):
    """A state that the network takes: an image, or a video of two frames."""
    return normal(3, 2, *((2,) if name in ("videodit", "wan") else ()), 4, 4, 2)


def drawn(shapes, seed=0):
    """Parameters as after training: nothing is zero, and activations stay of order one."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape)
        name = path[-1].key
        if name == "kernel":
            values = values / np.sqrt(np.prod(leaf.shape[-3:-1] if len(leaf.shape) > 2 else leaf.shape[:-1]))
        elif name != "table":
            values = 0.2 * values + (name == "scale")
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def shapes_of(module, x, cond):
    return jax.eval_shape(module.init, jax.random.key(0), T, x, cond)["params"]


def bfloat16():
    return Compute("bfloat16")
