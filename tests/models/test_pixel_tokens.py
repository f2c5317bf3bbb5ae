"""An image network of levels: what comes out, what is refused, and that all of it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import losses, schedules, sources
from fm_jax.models import LabelEmbedding, PixelTokens, init_params, linen_apply, make_dit, make_unet
from fm_jax.paths import MixturePath

KEY = jax.random.key(0)
SMALL = {"channels": 8, "channel_mults": (1,), "attention_levels": (), "num_blocks": 1, "num_groups": 4}
K, MASK = 4, 3


def network(channels=1, **options):
    return PixelTokens(make_unet("tiny", out_channels=K * channels, **SMALL, **options), K, mask=MASK, width=6)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2])
def test_even_at_first_and_never_the_mask(channels):
    module = network(channels)
    x = jax.random.randint(KEY, (2, 4, 4, channels), 0, K)
    params = init_params(module, KEY, (4, 4, channels))
    logits = module.apply({"params": params}, 0.3, x)
    assert logits.shape == (2, 4, 4, channels, K)
    np.testing.assert_array_equal(logits[..., :MASK], 0)
    assert np.isneginf(logits[..., MASK]).all()


@pytest.mark.slow
@pytest.mark.parametrize("make", [losses.masked_elbo, losses.cross_entropy])
def test_all_parameters_learn(make):
    module = network(embed=LabelEmbedding(2))
    params, path = init_params(module, KEY, (4, 4, 1)), MixturePath(schedules.Linear(), sources.Masked(K, MASK))
    batch = {"x1": jax.random.randint(KEY, (4, 4, 4, 1), 0, MASK), "cond": jnp.array([0, 1, 0, 1])}
    params = jax.tree.map(lambda p: p + 0.05, params)
    grads = jax.jit(jax.grad(make(linen_apply(module), path), has_aux=True))(params, KEY, batch)[0]
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


@pytest.mark.slow
def test_a_transformer_does_as_well():
    module = PixelTokens(
        make_dit("tiny", hidden=16, num_layers=1, num_heads=1, patch_size=2, out_channels=K),
        K,
        mask=MASK,
        width=6,
    )
    params = init_params(module, KEY, (4, 4, 1))
    assert module.apply({"params": params}, 0.3, jnp.zeros((1, 4, 4, 1), int)).shape == (1, 4, 4, 1, K)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PixelTokens(make_unet("tiny"), K, mask=K), "mask must be from 0 to 3"),
        (lambda: PixelTokens(make_unet("tiny"), 1), "num_tokens must be at least 2"),
        (
            lambda: network().apply({"params": {}}, 0.0, jnp.zeros((2, 4), int)),
            r"x must be tokens \[batch, height, width",
        ),
        (lambda: network().apply({"params": {}}, 0.0, jnp.zeros((2, 4, 4, 1))), "x must be tokens"),
        (lambda: network().apply({"params": {}}, 0.0, jnp.full((2, 4, 4, 1), K)), "x must be tokens from 0 to 3"),
        (
            lambda: init_params(PixelTokens(make_unet("tiny", out_channels=3, **SMALL), K), KEY, (4, 4, 1)),
            "network must return 1 x 4 channels, as by out_channels, got shape",
        ),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
