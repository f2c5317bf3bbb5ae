"""The U-Net over sequences: what it promises of its conditions, its size, and a law that it learns."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import optimised

from fm_jax import oracles
from fm_jax.conditions import DropConditions
from fm_jax.losses import flow_matching
from fm_jax.models import Compute, Conditions, LabelEmbedding, VectorEmbedding, init_params, linen_apply, num_params
from fm_jax.models.conditioning import RECTIFIED
from fm_jax.models.sequence_unet import SequenceBlock, SequenceUNet, make_sequence_unet, upsample
from fm_jax.paths import AffinePath
from fm_jax.schedules import Linear

SMALL = {"channels": (8, 12), "kernel_size": 3, "num_groups": 4, "time_channels": 8}
BOTH = SequenceUNet(**SMALL, vector_dim=3, local_dim=2)
LENGTH = 160
T = jnp.array([0.3, 0.8])
KEYS = jax.random.split(jax.random.key(0), 4)
X, LOCAL = (jax.random.normal(key, (2, LENGTH, 2)) for key in KEYS[:2])
VECTOR = jax.random.normal(KEYS[2], (2, 3))
NOTHING = Conditions(vector=jnp.zeros((2, 3)), local=jnp.zeros((2, LENGTH, 2)))


def random_params(module, cond=None, event=(16, 2)):
    template = jax.eval_shape(lambda: module.init(jax.random.key(0), T, jnp.zeros((2, *event)), cond)["params"])
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1]))), "float32")

    return jax.tree.map(draw, template)


@pytest.fixture(scope="module")
def field():
    """Random parameters, and the compiled network."""
    params = random_params(BOTH)
    f = jax.jit(lambda x, cond, params=params: BOTH.apply({"params": params}, T, x, cond))
    return params, f


def window(values, start, size=8):
    """Zeros but for a window."""
    inside = (jnp.arange(LENGTH) >= start) & (jnp.arange(LENGTH) < start + size)
    return jnp.where(inside[None, :, None], jnp.roll(values, start - 76, axis=1), 0.0)


@pytest.mark.slow
def test_shifts_with_state_and_local_condition(field):
    """Away from the borders, whatever they do: state and condition are zero there. By the stride of the two levels."""
    _, f = field
    out = f(window(X, 76), Conditions(vector=VECTOR, local=window(LOCAL, 76)))
    shifted = f(window(X, 90), Conditions(vector=VECTOR, local=window(LOCAL, 90)))
    scale = float(jnp.abs(out).max())
    np.testing.assert_allclose(shifted[:, 54:126], out[:, 40:112], rtol=0, atol=2e-5 * scale)
    alone = f(window(X, 90), Conditions(vector=VECTOR, local=window(LOCAL, 76)))
    assert jnp.abs(alone[:, 54:126] - out[:, 40:112]).max() > 1e-2 * scale


def test_a_local_condition_acts_most_where_it_is(field):
    _, f = field
    out = f(X, NOTHING._replace(local=LOCAL))
    change = jnp.abs(f(X, NOTHING._replace(local=LOCAL.at[:, 100].add(1.0))) - out).max(axis=(0, 2))
    assert abs(int(change.argmax()) - 100) <= 2
    # Norms see the whole sequence, so that a little of it is everywhere.
    assert change[96:105].mean() > 10 * jnp.concatenate([change[:60], change[140:]]).mean()


def test_a_global_condition_is_the_same_for_all_positions(field):
    """What it does to a state that is alike everywhere is alike everywhere but at the borders."""
    _, f = field
    flat = jnp.ones_like(X)
    difference = f(flat, NOTHING._replace(vector=5 * VECTOR)) - f(flat, NOTHING)
    middle = difference[:, 60:100:2]
    assert jnp.abs(middle).max() > 1e-2
    np.testing.assert_allclose(middle, jnp.broadcast_to(middle[:, :1], middle.shape), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_what_is_left_out_is_zeros_and_frames_are_repeated(field):
    """Those of a spectrogram stand for as many samples each: WaveNet's local condition."""
    _, f = field
    frames = LOCAL[:, : LENGTH // 8]
    expected = f(X, NOTHING._replace(local=jnp.repeat(frames, 8, axis=1)))
    np.testing.assert_allclose(f(X, Conditions(local=frames)), expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def fresh():
    """A network as it starts but for its last layer, the same without a local condition, and what both are told."""
    module = BOTH.clone(channels=(8,))
    params, told = init_params(module, jax.random.key(0), (16, 2)), Conditions(vector=VECTOR, local=LOCAL[:, :16])
    return module, module.clone(local_dim=None), params, X[:, :16], told


@pytest.mark.slow
def test_starts_at_zero_and_a_local_condition_starts_as_nothing(fresh):
    """And is learned from the first step on."""
    module, plain, params, x, told = fresh
    apply = jax.jit(lambda params, cond: module.apply({"params": params}, T, x, cond))
    np.testing.assert_array_equal(apply(params, told), jnp.zeros_like(x))

    params = params | {"out": {"kernel": jax.random.normal(KEYS[3], (1, 8, 2)), "bias": jnp.zeros(2)}}
    base = {name: leaf for name, leaf in params.items() if not name.startswith("local")}
    alone = jax.jit(lambda params, cond: plain.apply({"params": params}, T, x, cond))
    expected = alone(base, Conditions(vector=VECTOR))
    assert jnp.abs(expected).max() > 0.1
    np.testing.assert_allclose(apply(params, told), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(apply(params, told), apply(params, told._replace(local=7 * told.local)))
    gradient = jax.jit(jax.grad(lambda params: (apply(params, told) ** 2).sum()))(params)
    for name in ("local_down", "local_up"):
        assert jnp.abs(gradient[name]["skip"]["kernel"]).max() > 1e-3
        assert jnp.abs(gradient[name]["norm_out"]["scale"]).max() > 1e-3


@pytest.mark.slow
def test_operation_by_operation_a_local_condition_starts_as_nothing_to_the_bit(fresh):
    """Compiled, two programs differ by what is fused."""
    module, plain, params, x, told = fresh
    params = params | {"out": {"kernel": jax.random.normal(KEYS[3], (1, 8, 2)), "bias": jnp.zeros(2)}}
    base = {name: leaf for name, leaf in params.items() if not name.startswith("local")}
    with jax.disable_jit():
        found = module.apply({"params": params}, T, x, told)
        expected = plain.apply({"params": base}, T, x, told._replace(local=None))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_the_local_condition_joins_both_ways(field):
    """On the way down alone with `local_up=False`, and with it in full resolution behind all blocks."""
    params, f = field
    told = NOTHING._replace(local=LOCAL)
    quiet = params | {"local_down": jax.tree.map(jnp.zeros_like, params["local_down"])}
    up = f(X, told, quiet)
    assert jnp.abs(f(X, told._replace(local=LOCAL + 1), quiet) - up).max() > 1e-2
    down = BOTH.clone(local_up=False)
    assert "local_up" not in random_params(down)
    rest = {name: leaf for name, leaf in params.items() if name != "local_up"}
    found = jax.jit(lambda: down.apply({"params": rest}, T, X, told))()
    without_up = params | {"local_up": jax.tree.map(jnp.zeros_like, params["local_up"])}
    np.testing.assert_allclose(found, f(X, told, without_up), rtol=0, atol=1e-5)


class Grown(nn.Module):
    """The transposed convolution alone."""

    @nn.compact
    def __call__(self, x):
        return upsample(x, "transposed", jnp.float32, "up")


def test_a_transposed_convolution_is_the_gradient_of_a_strided_one():
    """Closed form: `y[o] = sum_i x[i] k[o + 1 - 2 i]`, every weight where it belongs."""
    x, kernel = X[:, :6], np.random.default_rng(0).normal(size=(4, 2, 2))  # size, out, in
    params = {"up": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(2)}}
    out = Grown().apply({"params": params}, x)
    expected = np.zeros((2, 12, 2))
    for i in range(6):
        for tap in range(4):
            o = 2 * i + tap - 1
            if 0 <= o < 12:
                expected[:, o] += np.asarray(x[:, i]) @ kernel[tap].T
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_film_scales_and_shifts_behind_the_first_convolution():
    """A scale of zero leaves the shift alone; and the scale starts at one where nothing is said."""
    block = SequenceBlock(features=4, kernel_size=3, film=True, dropout=0.0, num_groups=2)
    x, emb = X[:, :8], jnp.zeros((2, 3))  # mish(0) = 0: the biases speak
    params = jax.jit(lambda: block.init(jax.random.key(1), x, emb, False)["params"])()
    np.testing.assert_array_equal(params["embed"]["bias"], [1.0] * 4 + [0.0] * 4)
    params["embed"]["bias"] = jnp.array([0.0] * 4 + [0.7, -1.0, 2.0, 0.1])
    f = jax.jit(lambda params, x: block.apply({"params": params}, x, emb, False))
    one, other = f(params, x), f(params, x + jnp.sin(x))
    skip = params["skip"]["kernel"][0]
    np.testing.assert_allclose(other - one, jnp.sin(x) @ skip, rtol=1e-4, atol=1e-5)


def conv(n_in, n_out, size):
    return size * n_in * n_out + n_out


def block_count(n_in, n_out, emb, size, *, film=True, always=False):
    skip = conv(n_in, n_out, 1) if always or n_in != n_out else 0
    return conv(n_in, n_out, size) + conv(n_out, n_out, size) + 4 * n_out + conv(emb, n_out * (1 + film), 1) + skip


def closed_form_count(channels, size, time, vector, local, n, *, film=True, up=4):
    emb = time + vector
    total = conv(time, 4 * time, 1) + conv(4 * time, time, 1)
    for level, (n_in, n_out) in enumerate(zip((n, *channels[:-1]), channels, strict=True)):
        total += block_count(n_in, n_out, emb, size, film=film) + block_count(n_out, n_out, emb, size, film=film)
        if level:
            total += block_count(2 * n_out, n_in, emb, size, film=film) + block_count(n_in, n_in, emb, size, film=film)
            total += conv(n_in, n_in, 3) + conv(n_in, n_in, up)
    total += 2 * block_count(channels[-1], channels[-1], emb, size, film=film)
    total += 2 * block_count(local, channels[0], emb, size, film=film, always=True) if local else 0
    return total + conv(channels[0], channels[0], size) + 2 * channels[0] + conv(channels[0], n, 1)


@pytest.mark.slow_but_one
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("policy", {"vector_dim": 10}, 65_353_218),
        ("policy", {"vector_dim": 40}, 65_783_298),
        ("policy", {"film": False}, None),
        ("policy_image", {"vector_dim": 132}, None),
        ("tiny", {"vector_dim": 3, "local_dim": 5}, None),
        ("tiny", {"resample": "nearest"}, None),
    ],
)
def test_parameter_counts(name, options, expected):
    module = make_sequence_unet(name, **options)
    template = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(1), jnp.zeros((1, 16, 2)))["params"])
    dims, up = (module.vector_dim or 0, module.local_dim or 0), 4 if module.resample == "transposed" else 3
    size, time = module.kernel_size, module.time_channels
    count = closed_form_count(module.channels, size, time, *dims, 2, film=module.film, up=up)
    assert num_params(template) == count
    assert expected in (None, count)


def test_labels_beside_and_instead():
    """`embed` reads what the network does not; alone, it takes labels as they are."""
    labelled = SequenceUNet(**SMALL, embed=LabelEmbedding(4))
    labels = jnp.array([1, 4])
    programs = [jax.make_jaxpr(labelled.init)(KEYS[0], T, X, cond) for cond in (labels, Conditions(label=labels))]
    assert str(programs[0]) == str(programs[1])
    beside = labelled.clone(vector_dim=3)
    told = Conditions(label=labels, vector=VECTOR)
    assert jax.eval_shape(beside.init_with_output, KEYS[0], T, X[:, :16], told)[0].shape == (2, 16, 2)


@pytest.mark.slow
def test_options_change_what_they_say():
    """Remat and bfloat16 the numbers alone, the border time and sign, dropout training."""
    x, told = X[:, :16], Conditions(vector=VECTOR, local=LOCAL[:, :4])
    params = random_params(BOTH)
    call = lambda module, t=T, **options: module.apply({"params": params}, t, x, told, **options)  # noqa: E731
    outs = jax.jit(
        lambda: (
            call(BOTH),
            call(BOTH.clone(compute=Compute(remat=True))),
            call(BOTH.clone(compute=Compute("bfloat16"))),
            call(BOTH.clone(border=RECTIFIED), 1 - T),
            call(BOTH.clone(dropout=0.5)),
            call(BOTH.clone(dropout=0.5), train=True, rngs={"dropout": KEYS[0]}),
        )
    )()
    out, remat, low, turned, still, dropped = outs
    scale = float(jnp.abs(out).max())
    np.testing.assert_allclose(remat, out, atol=1e-5 * scale)
    np.testing.assert_allclose(turned, -out, atol=1e-3 * scale)
    np.testing.assert_allclose(still, out, atol=1e-5 * scale)
    assert low.dtype == jnp.float32
    assert 1e-4 < float(jnp.linalg.norm(low - out) / jnp.linalg.norm(out)) < 5e-2
    assert jnp.abs(dropped - out).max() > 1e-2 * scale


@pytest.mark.slow
def test_forward_derivative(field):
    params, _ = field
    x, told = X[:, :16], Conditions(vector=VECTOR, local=LOCAL[:, :16])
    f = jax.jit(lambda x: BOTH.apply({"params": params}, T, x, told))
    _, tangent = jax.jvp(f, (x,), (jnp.cos(x),))
    numeric = (f(x + 1e-2 * jnp.cos(x)) - f(x - 1e-2 * jnp.cos(x))) / 2e-2
    assert jnp.linalg.norm(tangent - numeric) < 1e-2 * jnp.linalg.norm(tangent)


SEQUENCE = jnp.zeros((2, 16, 2))
WANTED = r"cond must be Conditions\(vector=..., local=...\), got"


@pytest.mark.parametrize(
    ("options", "x", "cond", "message"),
    [
        ({}, SEQUENCE[:, :15], None, "length must be divisible by 2, got 15"),
        ({}, SEQUENCE[:, :0], None, r"an event that is not empty, got shape \(2, 0, 2\)"),
        ({}, jnp.zeros((2, 16)), None, r"x must be \[batch, length, channels\], got shape \(2, 16\)"),
        ({}, SEQUENCE.astype(int), None, "x must be floating point, got int32"),
        ({"in_channels": 3}, SEQUENCE, None, r"x must have 3 channels, got shape \(2, 16, 2\)"),
        ({}, SEQUENCE, VECTOR, rf"{WANTED} float32 of shape \(2, 3\)"),
        ({}, SEQUENCE, Conditions(vector=VECTOR[:1]), r"vector must be .* = \(2, 3\), got shape \(1, 3\)"),
        ({}, SEQUENCE, Conditions(vector=VECTOR[:, :2]), r"cond.vector must be .* = \(2, 3\), got shape \(2, 2\)"),
        ({}, SEQUENCE, Conditions(vector=jnp.ones((2, 3), int)), "cond.vector must be floating point, got int32"),
        ({}, SEQUENCE, Conditions(local=LOCAL[:, :6]), "a divisor of the length 16, got shape .2, 6, 2."),
        ({}, SEQUENCE, Conditions(local=LOCAL[:, :32]), "a divisor of the length 16, got shape .2, 32, 2."),
        ({}, SEQUENCE, Conditions(local=LOCAL[:, :16, :1]), r"cond.local must be \[2, l, 2\] .*, got shape .2, 16, 1."),
        ({}, SEQUENCE, Conditions(local=LOCAL[:, 0]), r"cond.local must be \[2, l, 2\] .*, got shape .2, 2."),
        ({}, SEQUENCE, Conditions(label=jnp.ones(2, int)), "cond must have no label: the model is unconditional"),
        ({"local_dim": None}, SEQUENCE, Conditions(local=LOCAL), "cond must have no local: the model is unconditional"),
        ({"embed": VectorEmbedding(3)}, SEQUENCE, None, r"embed must not read the vector, which the network reads"),
        ({"kernel_size": 4}, SEQUENCE, None, "kernel_size must be odd, so that lengths stay, got 4"),
        ({"channels": ()}, SEQUENCE, None, r"channels must be a tuple of at least one positive integer, got \(\)"),
        ({"resample": "pool"}, SEQUENCE, None, "resample must be one of 'transposed', 'nearest', got 'pool'"),
        ({"time_channels": 7}, SEQUENCE, None, "time_channels must be even .*, got 7"),
        ({"vector_dim": 0}, SEQUENCE, None, "vector_dim must be at least 1, got 0"),
        ({"local_up": 1}, SEQUENCE, None, "local_up must be True or False, got 1"),
    ],
)
def test_refuses(options, x, cond, message):
    options = SMALL | {"vector_dim": 3, "local_dim": 2} | options
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: SequenceUNet(**options).init(jax.random.key(0), T, x, cond))


def test_make_sequence_unet_lists_its_names():
    with pytest.raises(ValueError, match="name must be one of 'tiny', 'policy', 'policy_image', got 'big'"):
        make_sequence_unet("big")


def noisy_tracks(key, num):
    """Sequences around their local condition, x1 = cond + noise / 2; the condition is a wave of its own."""
    key_wave, key_noise = jax.random.split(key)
    phase, rate = jax.random.uniform(key_wave, (2, num, 1, 1), minval=0.2, maxval=1.2)
    local = jnp.sin(rate * jnp.arange(16.0)[None, :, None] + 6 * phase)
    return {"x1": local + 0.5 * jax.random.normal(key_noise, local.shape), "cond": Conditions(local=local)}


@pytest.mark.slow
def test_learns_sequences_around_their_local_condition():
    """N(cond, 1/4) at every position: the velocity is known, and its own where the condition is dropped is not it."""
    module = SequenceUNet(channels=(16, 16), kernel_size=3, time_channels=16, local_dim=1)
    drop = DropConditions({"local": 0.1}, Conditions(local=0.0))
    loss_fn = flow_matching(linen_apply(module), AffinePath(), drop=drop)
    params, optimizer = (
        init_params(module, jax.random.key(0), (16, 1)),
        optax.adam(optax.cosine_decay_schedule(1e-2, 400)),
    )

    @optimised
    def train(params):
        def step(carry, key):
            params, state = carry
            key_data, key_loss = jax.random.split(key)
            gradient = jax.grad(loss_fn, has_aux=True)(params, key_loss, noisy_tracks(key_data, 64))[0]
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), 400))[0][0]

    params, batch = train(params), noisy_tracks(jax.random.key(2), 256)
    t = jnp.linspace(0.05, 0.95, 256)
    local = batch["cond"].local
    x = AffinePath().sample(None, t, jax.random.normal(jax.random.key(3), local.shape), batch["x1"]).x_t
    law = oracles.gaussian_mixture([[0.0]], 0.5)
    t_each, centred = jnp.repeat(t, 16), (x - t[:, None, None] * local).reshape(-1, 1)
    exact = oracles.velocity(law, Linear())(t_each, centred).reshape(x.shape) + local
    found = jax.jit(lambda cond: module.apply({"params": params}, t, x, cond))
    rms = lambda a: float(jnp.sqrt(jnp.mean(a**2)))  # noqa: E731
    assert rms(found(batch["cond"]) - exact) < 0.2
    assert rms(found(None) - exact) > 0.5
    assert rms(exact) > 0.9
