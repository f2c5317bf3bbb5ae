"""Losses of a variational autoencoder: what first makes the latents that a model of images is trained on."""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from fm_jax.checks import (
    check_array,
    check_data,
    check_function,
    check_holds,
    check_key,
    check_member,
    check_number,
    check_real,
    check_same_shape,
    check_shape,
    shown,
)
from fm_jax.losses.matching import check_weight
from fm_jax.shapes import mean_over_event
from fm_jax.types import Array, Batch, Key, LossFn, Metrics, Params, PerExample, Scalar, State

EncodeFn: TypeAlias = Callable[[Params, State], tuple[Array, Array]]
"""`encode_fn(params, x) -> (mean, log_variance)`: the Gaussians of the latents, each [batch, ...]."""
DecodeFn: TypeAlias = Callable[[Params, Array], Any]
"""`decode_fn(params, z) -> x`."""
Features: TypeAlias = Callable[[State], Any]
"""`features(x)`: a pytree of [batch, ...], by which images are compared besides their pixels."""
Error = Literal["l1", "l2"]

_ENCODE = "a function encode_fn(params, x) -> (mean, log_variance)"


def gaussian_kl(mean: State, log_variance: State) -> PerExample:
    """The Kullback-Leibler divergence KL(N(mean, variance) || N(0, I)) of diagonal Gaussians, in nats an example.

    `1/2 sum(mean^2 + variance - 1 - log variance)` over all axes but the first.

    Args:
        mean: [batch, ...].
        log_variance: logarithms of the variances, alike.

    Returns:
        [batch], float32 or better.

    Raises:
        ValueError: if they are not real floating-point arrays of one shape.

    Example:
        >>> gaussian_kl(jnp.ones((2, 3)), jnp.zeros((2, 3)))
        Array([1.5, 1.5], dtype=float32)

    References:
        Kingma & Welling 2014 (arXiv:1312.6114), appendix B.
    """
    check_data("mean", mean)
    check_data("log_variance", log_variance)
    check_same_shape(mean=mean, log_variance=log_variance)
    dtype = jnp.promote_types(mean.dtype, jnp.float32)
    mean, log_variance = mean.astype(dtype), log_variance.astype(dtype)
    # expm1: where the variance is nearly 1 the rest is a difference of nearly equal numbers.
    each = mean**2 + jnp.expm1(log_variance) - log_variance
    return mean_over_event(each) * (math.prod(mean.shape[1:]) / 2)


def kl_autoencoder(
    encode_fn: EncodeFn,
    decode_fn: DecodeFn,
    *,
    beta: float = 1e-6,
    error: Error = "l1",
    features: Features | None = None,
    feature_weight: float = 1.0,
) -> LossFn:
    """The loss of latent diffusion's autoencoder, but for its discriminator.

    With latents `z = mean + exp(log_variance / 2) noise` of an image x of D numbers, and `y = decode_fn(params, z)`:

        mean |x - y| + beta KL / D + feature_weight mean |features(x) - features(y)|^2

    The KL is in nats an image, `gaussian_kl`. So a `beta` means what it does where the absolute differences of an image
    are summed and the KL is added, as published ones are: 1e-6 of latent diffusion. It leaves the latents nearly
    unregularised, at any scale: measure it, and bring them to unit variance (`fm_jax.latents.LatentSpace`).

    Args:
        encode_fn: `encode_fn(params, x) -> (mean, log_variance)`.
        decode_fn: `decode_fn(params, z) -> x`.
        beta: weight of the KL, 0 or more.
        error: of a pixel, `"l1"` (absolute) or `"l2"` (squared).
        features: a frozen function of images [batch, ...] to a pytree of [batch, ...], such as maps within a
            classifier; the mean squared differences of its leaves are averaged. `None` compares pixels alone.
        feature_weight: of that.

    Returns:
        `loss_fn(params, key, batch) -> (loss, metrics)`, pure, for `jax.value_and_grad(loss_fn, has_aux=True)`. The
        batch is a dict: `x1` [batch, ...]; optional `noise` in the shape of the latents (drawn if absent) and `weight`
        [batch], what each example counts for. Metrics, without weights of examples, are `error` (a number of the
        image), `kl` (nats an image) and `features`, beside the `loss`. With `key=None`, `noise` must be in the batch.

    Raises:
        ValueError: for an argument that is not what its name says; when the loss is traced, if the batch has no `x1`,
            is not floating point or its shapes do not fit, or what the functions return is not what they should.

    Example:
        >>> loss_fn = kl_autoencoder(lambda w, x: (w * x, jnp.zeros_like(x)), lambda w, z: z / w, beta=0.5)
        >>> batch = {"x1": jnp.ones((2, 3)), "noise": jnp.full((2, 3), 0.2)}
        >>> loss, metrics = loss_fn(2.0, None, batch)  # |0.2 / 2|, and half of half of 2^2
        >>> round(float(loss), 6), round(float(metrics["kl"]), 6)
        (1.1, 6.0)

    References:
        Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1 and appendix G.
    """
    _check_functions(encode_fn, decode_fn)
    check_number("beta", beta, "[0, inf)")
    check_member("error", error, get_args(Error))
    if features is not None:
        check_function("features", features, "a function features(x) of a batch of images, or None", 1)
    check_number("feature_weight", feature_weight, "[0, inf)")

    def loss_fn(
        params: Params, key: Key | None, batch: Batch, *, target_params: Params | None = None
    ) -> tuple[Scalar, Metrics]:
        del target_params  # for losses with a second network
        x, kl, y = _restored(encode_fn, decode_fn, params, key, batch)
        check_shape("what decode_fn returns", y, x)
        differences = x - y.astype(x.dtype)
        each = mean_over_event(jnp.abs(differences) if error == "l1" else differences**2)
        total = each + beta / math.prod(x.shape[1:]) * kl
        metrics = {"error": each.mean(), "kl": kl.mean()}
        if features is not None:
            distance = _feature_distance(features, x, y)
            total, metrics["features"] = total + feature_weight * distance, distance.mean()
        return _mean(total, batch, metrics)

    return loss_fn


def negative_elbo(
    encode_fn: EncodeFn, decode_fn: DecodeFn, *, variance: float | None = None, beta: float = 1.0
) -> LossFn:
    """The negative evidence lower bound of a variational autoencoder with a Gaussian decoder, in nats an example.

    `E[-log N(x; y, variance)] + beta KL` with `z = mean + exp(log_variance / 2) noise`, one draw an example, and
    `y = decode_fn(params, z)`. With `beta = 1` it is an upper bound of `-log p(x)`, which a linear autoencoder reaches:
    see `fm_jax.oracles.ppca`.

    Args:
        encode_fn: `encode_fn(params, x) -> (mean, log_variance)`.
        decode_fn: `decode_fn(params, z) -> x`, or without `variance` `-> (x, log_variance)`, where the logarithm of the
            decoder's variance is a scalar, or an array that broadcasts to x.
        variance: of every number given its latents; `None` where the decoder gives it, which learns it.
        beta: weight of the KL, 0 or more.

    Returns:
        `loss_fn(params, key, batch) -> (loss, metrics)`, with the batch of `kl_autoencoder`. Metrics are `nll`, the
        first term, and `kl`, both in nats an example without weights of examples, beside the `loss`.

    Raises:
        ValueError: as `kl_autoencoder`; where the decoder gives a variance and has one given, or neither.

    Example:
        >>> loss_fn = negative_elbo(lambda w, x: (w * x, jnp.zeros_like(x)), lambda w, z: z, variance=1.0)
        >>> batch = {"x1": jnp.zeros((2, 1)), "noise": jnp.ones((2, 1))}
        >>> loss, metrics = loss_fn(1.0, None, batch)  # log sqrt(2 pi) + 1 / 2
        >>> round(float(loss), 4)
        1.4189

    References:
        Kingma & Welling 2014 (arXiv:1312.6114), section 2.3; Lucas et al. 2019 (arXiv:1911.02469).
    """
    _check_functions(encode_fn, decode_fn)
    if variance is not None:
        check_number("variance", variance, "(0, inf)")
    check_number("beta", beta, "[0, inf)")

    def loss_fn(
        params: Params, key: Key | None, batch: Batch, *, target_params: Params | None = None
    ) -> tuple[Scalar, Metrics]:
        del target_params
        x, kl, decoded = _restored(encode_fn, decode_fn, params, key, batch)
        y, log_variance = _decoded(decoded, x, variance)
        each = log_variance + (x - y) ** 2 * jnp.exp(-log_variance) + math.log(2 * math.pi)
        nll = mean_over_event(each) * (math.prod(x.shape[1:]) / 2)
        return _mean(nll + beta * kl, batch, {"nll": nll.mean(), "kl": kl.mean()})

    return loss_fn


def _check_functions(encode_fn: EncodeFn, decode_fn: DecodeFn) -> None:
    check_function("encode_fn", encode_fn, _ENCODE, 2)
    check_function("decode_fn", decode_fn, "a function decode_fn(params, z) -> x", 2)


def _restored(
    encode_fn: EncodeFn, decode_fn: DecodeFn, params: Params, key: Key | None, batch: Batch
) -> tuple[State, PerExample, Any]:
    """The data in float32 or better, the KL of their latents, and what is decoded of a draw of them."""
    check_holds(batch, "x1")
    x, noise = batch["x1"], batch.get("noise")
    check_data("x1", x)
    check_weight(batch, x)
    if key is not None:
        check_key(key)
    elif noise is None:
        raise ValueError("without a key the batch must hold 'noise'.")
    moments = encode_fn(params, x)
    if not isinstance(moments, tuple) or len(moments) != 2:
        raise ValueError(f"what encode_fn returns must be (mean, log_variance), got {shown(moments)}.")
    mean, log_variance = moments
    kl = gaussian_kl(mean, log_variance)
    if kl.shape != x.shape[:1]:
        raise ValueError(f"what encode_fn returns must be [batch, ...] with batch = {len(x)}, got shape {mean.shape}.")
    if noise is None:
        noise = jax.random.normal(key, mean.shape, mean.dtype)  # type: ignore[arg-type]
    check_shape("noise", noise, mean, "the latents")
    z = mean + jnp.exp(log_variance / 2) * noise.astype(mean.dtype)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)), kl, decode_fn(params, z)


def _decoded(decoded: Any, x: State, variance: float | None) -> tuple[State, Array]:
    """What is decoded, and the logarithm of its variance, in the shape of x."""
    pair = isinstance(decoded, tuple) and len(decoded) == 2
    if pair != (variance is None):
        wanted = (
            "(x, log_variance), as no variance is given" if variance is None else "x alone, as its variance is given"
        )
        raise ValueError(f"what decode_fn returns must be {wanted}, got {_kind(decoded)}.")
    y, log_variance = (decoded, jnp.log(jnp.asarray(variance, x.dtype))) if variance is not None else decoded
    check_shape("what decode_fn returns", y, x)
    check_real("the log_variance of decode_fn", log_variance)
    try:
        fits = jnp.broadcast_shapes(log_variance.shape, x.shape) == x.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"the log_variance of decode_fn must broadcast to x, {x.shape}, got {log_variance.shape}.")
    return y.astype(x.dtype), jnp.broadcast_to(log_variance.astype(x.dtype), x.shape)


def _kind(decoded: Any) -> str:
    return f"a tuple of {len(decoded)}" if isinstance(decoded, tuple) else shown(decoded)


def _feature_distance(features: Features, x: State, y: State) -> PerExample:
    """Mean squared differences of the features of two batches of images, averaged over the leaves, [batch]."""
    pairs = list(zip(*(jax.tree.leaves(features(each)) for each in (x, y)), strict=True))
    if not pairs:
        raise ValueError("what features returns must be a pytree of [batch, ...], got one without arrays.")
    for a, b in pairs:
        check_array("what features returns", a, "a pytree of arrays [batch, ...]")
        if a.shape[:1] != x.shape[:1] or a.shape != b.shape:
            raise ValueError(f"what features returns must be [batch, ...] with batch = {len(x)}, got shape {a.shape}.")
    distances = [mean_over_event((a.astype(x.dtype) - b.astype(x.dtype)) ** 2) for a, b in pairs]
    return sum(distances[1:], distances[0]) / len(distances)


def _mean(total: PerExample, batch: Batch, metrics: dict[str, Scalar]) -> tuple[Scalar, Metrics]:
    weight = batch.get("weight")
    loss = (total if weight is None else weight * total).mean()
    return loss, {"loss": loss, **metrics}
