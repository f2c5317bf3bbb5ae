"""One attention for all networks: against NumPy in float64; masks to the bit; rotary positions; what cuDNN refuses."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models.attention import (
    Rotation,
    apply_rope,
    attend,
    from_heads,
    layer_norm,
    rms_norm,
    rope_angles,
    rotation,
    to_heads,
)

B, N, M, H, D = 2, 5, 7, 3, 8


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


Q, K, V = normal(0, B, N, H, D), normal(1, B, M, H, D), normal(2, B, M, H, D)
BIAS = normal(3, 1, H, N, M)
KEYS = np.arange(M) < np.asarray([[M], [4]])
PAIRS = np.random.default_rng(4).random((B, H, N, M)) < 0.6
PAIRS[..., 0] = True


def softmax_attention(q, k, v, *, mask=None, bias=0.0, scale=None):
    """In float64, by the definition."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) * (1 / np.sqrt(q.shape[-1]) if scale is None else scale) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * (1 if mask is None else mask)
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v)


CASES = {
    "plain": ({}, {}),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
    "keys": ({"mask": KEYS}, {"mask": KEYS[:, None, None]}),
    "keys of each head": ({"mask": PAIRS[:, :, :1]}, {"mask": PAIRS[:, :, :1]}),
    "pairs": ({"mask": PAIRS}, {"mask": PAIRS}),
    "lengths": ({"lengths": np.asarray([M, 4], np.int32)}, {"mask": KEYS[:, None, None]}),
    "bias": ({"bias": BIAS}, {"bias": BIAS.astype(np.float64)}),
    "causal": ({"causal": True}, {"mask": np.tri(N, M)}),
    "all": (
        {"mask": KEYS, "bias": BIAS, "causal": True, "scale": 0.5},
        {"mask": KEYS[:, None, None] * np.tri(N, M), "bias": BIAS.astype(np.float64), "scale": 0.5},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_softmax(name):
    options, wanted = CASES[name]
    arrays = {key: value for key, value in options.items() if isinstance(value, np.ndarray)}
    others = {key: value for key, value in options.items() if key not in arrays}
    with jax.default_matmul_precision("highest"):
        found = jax.jit(lambda arrays: attend(Q, K, V, **arrays, **others))(arrays)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, softmax_attention(Q, K, V, **wanted), atol=1e-6)


def test_bfloat16_has_a_softmax_in_float32():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (8 * Q, K, V))
    found = attend(q, k, v)
    wanted = softmax_attention(*(np.asarray(x, np.float64) for x in (q, k, v)))
    assert found.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(found, np.float64) - wanted) < 2e-2 * np.linalg.norm(wanted)


LENGTHS = np.asarray([M, 4], np.int32)


@pytest.mark.parametrize("options", [{"mask": KEYS}, {"lengths": LENGTHS}], ids=["mask", "lengths"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_masked_has_no_influence_to_the_bit(options, dtype):
    run = jax.jit(lambda q, k, v: attend(*(x.astype(dtype) for x in (q, k, v)), **options))
    k, v = K.copy(), V.copy()
    k[1, 4:], v[1, 4:] = 50 * normal(5, M - 4, H, D), 50 * normal(6, M - 4, H, D)
    np.testing.assert_array_equal(run(Q, k, v), run(Q, K, V))
    grads = jax.jit(jax.grad(lambda k, v: run(Q, k, v).astype(jnp.float32).sum(), argnums=(0, 1)))(k, v)
    assert all(not grad[1, 4:].any() and grad[1, :4].any() for grad in grads)


@pytest.mark.slow
def test_padding_changes_nothing():
    """From 8 to 64 keys."""
    k, v = normal(7, B, 64, H, D), normal(8, B, 64, H, D)
    lengths = np.asarray([8, 3], np.int32)
    short = attend(Q, k[:, :8], v[:, :8], lengths=lengths)
    np.testing.assert_allclose(attend(Q, k, v, lengths=lengths), short, atol=1e-6)
    np.testing.assert_allclose(attend(Q, k, v, mask=jnp.asarray(np.arange(64) < lengths[:, None])), short, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"mask": np.zeros((B, M), bool)}, {"lengths": np.zeros(B, np.int32)}], ids=["mask", "lengths"]
)
def test_where_nothing_is_seen_it_is_zero(options):
    wanted = np.zeros(Q.shape)
    np.testing.assert_allclose(attend(Q, K, V, **options), wanted, atol=1e-6)


def test_derivatives_pass_forwards():
    tangent = normal(9, *Q.shape)
    _, found = jax.jvp(lambda q: attend(q, K, V, mask=KEYS), (Q,), (tangent,))
    with jax.enable_x64(True):
        wide = [x.astype(np.float64) for x in (Q, K, V)]
        mask = KEYS[:, None, None]
        ahead, behind = (softmax_attention(wide[0] + s * tangent, *wide[1:], mask=mask) for s in (1e-5, -1e-5))
    np.testing.assert_allclose(found, (ahead - behind) / 2e-5, atol=1e-5)


# cuDNN: what it does not take runs on XLA, and says so once.


def half(*arrays):
    return [jnp.asarray(x, jnp.bfloat16) for x in arrays]


WIDE = [normal(seed, B, M, 1, 136) for seed in range(3)]


@pytest.mark.parametrize(
    ("arrays", "options", "why"),
    [
        ((Q, K, V), {}, "float32"),
        (half(*WIDE), {}, "heads of 136 channels"),
        (half(*(x[..., :6] for x in (Q, K, V))), {}, "heads of 6 channels"),
        (half(Q, K, V), {"bias": BIAS}, "a bias"),
    ],
)
def test_what_cudnn_does_not_take_runs_on_xla_with_one_warning(arrays, options, why):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = jax.jit(lambda *arrays: attend(*arrays, mask=KEYS, implementation="cudnn", **options))
        found = [run(*arrays) for _ in range(2)][-1]
    messages = [str(each.message) for each in caught if "cuDNN" in str(each.message)]
    assert len(messages) == 1
    assert messages[0].startswith(f"cuDNN's attention does not take {why}")
    assert messages[0].endswith("XLA's is used.")
    wanted = jax.jit(lambda *arrays: attend(*arrays, mask=KEYS, implementation="xla", **options))(*arrays)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q": Q[0]}, "q must be [batch, tokens, heads, head_dim], got shape (5, 3, 8)."),
        ({"k": K[:, :3]}, "q, k and v must agree but for their tokens"),
        ({"q": Q[:1]}, "q, k and v must agree but for their tokens, got (1, 5, 3, 8), (2, 7, 3, 8) and (2, 7, 3, 8)."),
        ({"q": Q[..., :4]}, "q, k and v must agree but for their tokens"),
        ({"q": Q[:, :, :1]}, "q, k and v must agree but for their tokens"),
        ({"mask": KEYS.astype(np.float32)}, "mask must be bool, true where a key is seen, got float32 of shape"),
        ({"mask": KEYS[:, :5]}, "mask must be [batch, keys] = (2, 7) or broadcast to (2, 3, 5, 7), got shape (2, 5)."),
        ({"mask": PAIRS[0]}, "mask must be [batch, keys] = (2, 7) or broadcast to (2, 3, 5, 7), got shape (3, 5, 7)."),
        (
            {"mask": PAIRS[:, :2]},
            "mask must be [batch, keys] = (2, 7) or broadcast to (2, 3, 5, 7), got shape (2, 2, 5, 7).",
        ),
        ({"bias": BIAS[..., :4]}, "bias must broadcast to (2, 3, 5, 7), got shape (1, 3, 5, 4)."),
        ({"bias": BIAS[0]}, "bias must broadcast to (2, 3, 5, 7), got shape (3, 5, 7)."),
        ({"lengths": np.asarray([3.0, 4.0])}, "lengths must be integers [batch] = (2,), got float64 of shape (2,)."),
        ({"lengths": np.asarray([3])}, "lengths must be integers [batch] = (2,), got int64 of shape (1,)."),
        ({"implementation": "flash"}, "implementation must be one of 'xla', 'cudnn', got 'flash'."),
    ],
)
def test_refuses(options, message):
    arrays = {name: options.pop(name, value) for name, value in {"q": Q, "k": K, "v": V}.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        attend(**arrays, **options)


# Rotary positions.


def test_angles():
    ids = np.asarray([[0, 3, 5], [2, 0, 7]])
    found = rope_angles(ids, (2, 4, 6), theta=100.0)
    wanted = [
        [0, 3, 0.3, 5, 5 * 100 ** (-1 / 3), 5 * 100 ** (-2 / 3)],
        [2, 0, 0, 7, 7 * 100 ** (-1 / 3), 7 * 100 ** (-2 / 3)],
    ]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted, rtol=1e-14)
    traced = jax.jit(lambda ids: rope_angles(ids, (2, 4, 6), theta=100.0))(ids)
    np.testing.assert_allclose(traced, wanted, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_products_depend_on_differences_of_positions_alone():
    rng = np.random.default_rng(0)
    dims, places = (4, 6, 6), 9
    q, k = (rng.standard_normal((1, places, 2, sum(dims))) for _ in range(2))
    ids = rng.integers(0, 50, (places, 3)).astype(np.float64)

    def products(ids):
        angles = rope_angles(ids, dims)
        return jnp.einsum("bnhd,bmhd->bhnm", *(apply_rope(jnp.asarray(x), angles) for x in (q, k)))

    found = products(ids)
    np.testing.assert_allclose(products(ids + np.asarray([3.0, -17.0, 40.5])), found, rtol=0, atol=1e-12)
    assert jnp.abs(products(ids * np.asarray([1, 1, 2])) - found).max() > 1e-2
    # The same positions: the product without any.
    np.testing.assert_allclose(products(0 * ids + 7), np.einsum("bnhd,bmhd->bhnm", q, k), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_pairs_side_by_side_or_in_halves_are_one_permutation_apart():
    rng = np.random.default_rng(1)
    x, angles = rng.standard_normal((2, 5, 3, 8)), rng.standard_normal((5, 4))
    first, second = x[..., 0::2], x[..., 1::2]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    halves = np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    found = apply_rope(jnp.asarray(x), angles)
    order = np.r_[0:8:2, 1:8:2]
    np.testing.assert_allclose(found[..., order], halves, rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-12)


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)], ids=["shared", "of each example"])
def test_a_rotation_is_that_by_its_angles(shape):
    x, angles = normal(0, 2, 5, 3, 8), np.random.default_rng(1).standard_normal(shape)
    wanted = apply_rope(x, angles)
    np.testing.assert_array_equal(apply_rope(x, rotation(angles)), wanted)
    np.testing.assert_allclose(apply_rope(x, jnp.asarray(angles)), wanted, atol=1e-6)
    lead = (None,) * (3 - len(shape))
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[lead][:, :, None]
    np.testing.assert_allclose(wanted[..., 0::2] + 1j * wanted[..., 1::2], turned, atol=1e-6)


def test_constants_are_turned_in_double_precision():
    """At place 10,000 an angle in float32 is off by half a thousandth; the cosine of a constant is not."""
    ids = np.full((1, 1), 10_001.0)
    turn = rotation(rope_angles(ids, (4,), theta=7.0))
    angles = np.asarray([10_001.0, 10_001.0 / np.sqrt(7)])
    np.testing.assert_allclose(turn.cos[0], np.cos(angles), atol=6e-8)
    np.testing.assert_allclose(turn.sin[0], np.sin(angles), atol=6e-8)
    assert turn.cos.dtype == jnp.float32


def test_low_precision_is_turned_in_float32():
    x, angles = normal(0, 1, 5, 2, 8), 30 * normal(1, 5, 4).astype(np.float64)
    found = apply_rope(jnp.asarray(x, jnp.bfloat16), angles)
    assert found.dtype == jnp.bfloat16
    wanted = apply_rope(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), angles)
    np.testing.assert_array_equal(found, wanted.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: rope_angles(np.zeros((5, 2)), (4, 3)), "dims must be even, as channels turn in pairs, got (4, 3)."),
        (lambda: rope_angles(np.zeros((5, 2)), (4,)), "ids must have 1 axes, as dims has, got shape (5, 2)."),
        (lambda: rope_angles(np.zeros((5, 1)), (4.0,)), "dims[0] must be an integer, got 4.0."),
        (lambda: rope_angles(np.zeros((5, 1)), (0,)), "dims[0] must be at least 2, got 0."),
        (lambda: rope_angles(np.zeros((5, 1)), (4,), theta=0.0), "theta must be positive and finite, got 0.0."),
        (lambda: apply_rope(Q, np.zeros((N, D))), "angles must be [tokens, head_dim / 2] = (5, 4), got shape (5, 8)."),
        (lambda: apply_rope(Q, np.zeros((N - 1, D // 2))), "= (5, 4), got shape (4, 4)."),
        (lambda: apply_rope(Q, np.zeros((3, N, D // 2))), "= (5, 4), got shape (3, 5, 4)."),
        (lambda: apply_rope(Q, Rotation(*[np.zeros((N, 3))] * 2)), "= (5, 4), got shape (5, 3)."),
    ],
)
def test_refuses_positions(function, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        function()


# Normalisation.


@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_norms_have_two_passes(mean):
    """Far from zero, the difference of two means of squares would be mostly rounding."""
    x = mean + normal(0, 4, 64)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    found = layer_norm(jnp.float32, "norm").apply({}, x)
    wanted = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    assert np.linalg.norm(found - wanted) < 5e-5 * np.linalg.norm(wanted)


def test_epsilons_and_scales():
    x, scale, shift = 1e-3 * normal(0, 4, 16), normal(1, 16), normal(2, 16)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    norm = layer_norm(jnp.float32, "norm", affine=True, epsilon=1e-5)
    wanted = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + shift
    np.testing.assert_allclose(norm.apply({"params": {"scale": scale, "bias": shift}}, x), wanted, rtol=2e-5, atol=1e-6)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * scale
    found = rms_norm(jnp.float32, "norm").apply({"params": {"scale": scale}}, x)
    np.testing.assert_allclose(found, wanted, rtol=2e-6)
    half = rms_norm(jnp.bfloat16, "norm").apply({"params": {"scale": scale}}, jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(half, np.float64) - wanted) < 1e-2 * np.linalg.norm(wanted)


@pytest.mark.parametrize("use_bias", [True, False])
def test_projections_to_and_from_heads(use_bias):
    x, y = normal(0, B, N, 6), normal(1, B, N, H, D)
    there, back = to_heads(H, D, None, "q", use_bias=use_bias), from_heads(6, None, "out", use_bias=use_bias)
    kernel, other = normal(2, 6, H, D), normal(3, H, D, 6)
    bias = {"bias": np.ones((H, D), np.float32)} if use_bias else {}
    wanted = np.einsum("bni,ihd->bnhd", x, kernel) + use_bias
    np.testing.assert_allclose(there.apply({"params": {"kernel": kernel} | bias}, x), wanted, atol=1e-5)
    bias = {"bias": np.ones(6, np.float32)} if use_bias else {}
    wanted = np.einsum("bnhd,hdo->bno", y, other) + use_bias
    np.testing.assert_allclose(back.apply({"params": {"kernel": other} | bias}, y), wanted, atol=1e-5)
