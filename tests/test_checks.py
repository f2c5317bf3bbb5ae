"""Each shared refusal: what passes, what does not with its whole message, and that a traced value passes."""

import dataclasses
import inspect
import math
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import checks
from fm_jax.couplings import ExactOT, independent
from fm_jax.models import PlainMLP
from fm_jax.models.adapters import linen_apply
from fm_jax.schedules import Linear
from fm_jax.sources import Normal

NAN, INF = float("nan"), float("inf")
X = jnp.ones((2, 3))


class Wrapped:
    """Has its attributes from another object, which no look at its class finds."""

    def __init__(self, value):
        self.value = value

    def __getattr__(self, name):
        return getattr(self.value, name)


class Broken:
    """Has a property that fails."""

    @property
    def shape(self):
        raise AttributeError("of something else")


class Lines:
    def __repr__(self):
        return "two\n  lines"


def velocity(t, x):
    return -x


@pytest.mark.parametrize(
    ("within", "good", "bad", "words"),
    [
        ("(0, inf)", [1e-9, 1.0, 1e9], [0.0, -1.0, INF, NAN], "positive and finite"),
        ("[0, inf)", [0.0, 1e9], [-1e-9, INF, NAN], "finite and not negative"),
        ("(-inf, inf)", [-1e9, 0.0, 1e9], [INF, -INF, NAN], "a finite number"),
        ("(0, inf]", [1e-9, INF], [0.0, -INF, NAN], r"in \(0, inf\]"),
        ("[0, 1]", [0, 0.5, 1], [-0.1, 1.1, NAN], r"in \[0, 1\]"),
        ("(0, 1]", [1e-9, 1], [0, 1.1, NAN], r"in \(0, 1\]"),
        ("[0, 1)", [0, 0.9], [-1, 1, NAN], r"in \[0, 1\)"),
        ("(0, 0.5)", [0.4], [0, 0.5, NAN], r"in \(0, 0.5\)"),
    ],
)
def test_numbers(within, good, bad, words):
    for value in good:
        for each in (value, np.float64(value), np.asarray(value), jnp.asarray(value)):
            checks.check_number("sigma", each, within)
    for value in bad:
        with pytest.raises(ValueError, match=f"^sigma must be {words}, got {value}.$"):
            checks.check_number("sigma", value, within)


NO_NUMBERS = ["0.5", b"1", None, True, np.True_, np.ones(2), [1.0], [[1.0], [1.0, 2.0]], {}, 1j, np.complex64(1), int]


@pytest.mark.parametrize(
    "value", [*NO_NUMBERS, pytest.param(10**400, id="10**400"), jnp.ones(1), jax.random.key(0)], ids=repr
)
def test_what_is_no_number(value):
    assert math.isnan(checks.as_number(value))
    with pytest.raises(ValueError, match=r"^sigma must be positive and finite, got "):
        checks.check_number("sigma", value, "(0, inf)")


@pytest.mark.parametrize("value", [2, 2.0, np.int32(2), np.float32(2), np.array(2), jnp.array(2.0), Fraction(4, 2)])
def test_what_is_a_number(value):
    assert checks.as_number(value) == 2.0
    assert isinstance(checks.as_number(value), float)


def test_real_dtypes():
    for dtype in (np.float16, jnp.bfloat16, np.float64, np.int8, np.uint32, X.dtype):
        assert checks.is_real(dtype)
    for dtype in (np.bool_, np.complex64, np.str_, object, jax.random.key(0).dtype):
        assert not checks.is_real(dtype)


def test_integers():
    for value in (1, 5, np.int32(3), np.uint8(1)):
        checks.check_integer("num", value)
    checks.check_integer("num", 0, least=0)
    for value in (2, 4):
        checks.check_integer("num", value, least=2, most=4)
    for value in (1.0, NAN, True, "1", None, np.float32(2), np.bool_(True), jnp.ones(1)):
        with pytest.raises(ValueError, match=f"^num must be an integer, got {re.escape(checks.shown(value))}.$"):
            checks.check_integer("num", value)
    with pytest.raises(ValueError, match=r"^num must be at least 1, got 0.$"):
        checks.check_integer("num", 0)
    with pytest.raises(ValueError, match=r"^num must be at least 3, got 2.$"):
        checks.check_integer("num", 2, least=3)
    for value in (1, 5):
        with pytest.raises(ValueError, match=f"^num must be from 2 to 4, got {value}.$"):
            checks.check_integer("num", value, least=2, most=4)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "'a'"),
        (None, "None"),
        (0.5, "0.5"),
        (Linear, "the class Linear"),
        (Linear(), "Linear(sigma_min=0.0)"),
        (X, "float32 of shape (2, 3)"),
        (np.zeros(2), "float64 of shape (2,)"),
        (np.float32(0.5), "np.float32(0.5)"),
        (jnp.float32(0.5), "the float32 array 0.5"),
        (jax.random.split(jax.random.key(0)), "key<fry> of shape (2,)"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), "float32 of shape (2,)"),
        (Lines(), "two lines"),
        ("a" * 98, repr("a" * 98)),
        ("a" * 99, "'" + "a" * 96 + "..."),
    ],
    ids=str,
)
def test_a_value_is_quoted_in_short(value, text):
    assert checks.shown(value) == text


RANGE = "0 <= t_min < t_max <= 1 must hold, got "
INCREASING = "0 < sigma_min < sigma_max < inf must hold, got "
TYPED = "key must be one typed key, as from jax.random.key(0), got "
LIST_OF_KEYS = jax.random.split(jax.random.key(0))
NOISE = "diffusion must be finite and not negative, got "
COND = "must be [batch, ...] with batch = 2, got shape "
VELOCITY = "v must be a velocity function v(t, x), got "
NETWORK = "apply_fn must be a function apply_fn(params, t, x, cond, train=, rngs=), got "
COUPLING = "coupling must be a coupling, such as ExactOT() or fm_jax.couplings.independent, got "
UNIT = ((0.0, 1.0), "the domain")
GOOD = [
    (checks.check_member, ("kind", "a", ("a", "b"))),
    (checks.check_seed, ("seed", 0)),
    (checks.check_seed, ("seed", 2**32 - 1)),
    (checks.check_seed, ("seed", np.uint32(7))),
    (checks.check_range, (0.0, 1.0)),
    (checks.check_range, (0, np.float32(0.5))),
    (checks.check_ends, (1.0, 0.0)),
    (checks.check_ends, (-1, np.float32(2.0))),
    (checks.check_key, (jax.random.key(0),)),
    (checks.check_key, (jax.random.key(0, impl="rbg"), "key_x0")),
    (checks.check_array, ("x", X)),
    (checks.check_array, ("x", np.array("text"))),
    (checks.check_array, ("x", np.float32(1.0))),
    (checks.check_array, ("x", jax.ShapeDtypeStruct((2,), jnp.int32))),
    (checks.check_state, (X,)),
    (checks.check_state, (X.astype(jnp.bfloat16),)),
    (checks.check_state, (X[:0],)),
    (checks.check_event, (X[:0],)),
    (checks.check_event, (jnp.zeros(3),)),
    (checks.check_tokens, ("x1", X.astype(int))),
    (checks.check_tokens, ("x1", np.array([0, 4], np.uint8), 5)),
    (checks.check_tokens, ("x1", X[:0].astype(int), 5)),
    (checks.check_tokens, ("like", jax.ShapeDtypeStruct((2,), jnp.int32), 5)),
    (checks.check_where, ("keep", jnp.ones(3, bool), X)),
    (checks.check_where, ("keep", np.ones((2, 1), bool), X)),
    (checks.check_logits, ("logits", jnp.zeros((2, 3, 5)), X.astype(int), 5)),
    (checks.check_logits, ("logits", np.zeros((2, 3, 5), int), X.astype(int), 5)),
    (checks.check_estimate, (jnp.full((2, 3, 4), 0.25), X.astype(int), 4)),
    (checks.check_estimate, (np.zeros((2, 3, 4), np.float16), X.astype(int), 4)),
    (checks.check_data, ("x1", X)),
    (checks.check_data, ("x1", np.ones(1, np.float16))),
    (checks.check_shape, ("v(t, x)", X, X)),
    (checks.check_shape, ("v(t, x)", X.astype(int), X)),
    (checks.check_shape, ("v(t, x)", jax.ShapeDtypeStruct((2, 3), jnp.bfloat16), X)),
    (checks.check_real, ("x", np.arange(3))),
    (checks.check_known, ("eta", jnp.float32(0.5))),
    (checks.check_numbers_of, ("scale", 2.0, X)),
    (checks.check_numbers_of, ("scale", jnp.float32(2.0), X)),
    (checks.check_numbers_of, ("scale", np.arange(2), X)),
    (checks.check_times, ("t", 0, *UNIT)),
    (checks.check_times, ("t", 1 + 1e-7, *UNIT)),
    (checks.check_times, ("t", -1e-7, *UNIT)),
    (checks.check_times, ("t", np.linspace(0, 1, 5), *UNIT)),
    (checks.check_times, ("t", jnp.ones(2, jnp.bfloat16), *UNIT)),
    (checks.check_times, ("t", [0.25, 1.0], *UNIT)),
    (checks.check_finite, ("scale", np.ones(3))),
    (checks.check_finite, ("scale", 1.0)),
    (checks.check_finite, ("scale", [1, 2])),
    (checks.check_finite, ("scale", X.astype(jnp.bfloat16))),
    (checks.check_diffusion, (0.0,)),
    (checks.check_diffusion, (lambda t: t,)),
    (checks.check_tolerances, (0.0, 1e-3, 1)),
    (checks.check_tolerances, (1e-3, 1e-9, 1)),
    (checks.check_has, ("it", X, ("shape", "dtype"), "an array")),
    (checks.check_has, ("it", Wrapped(X), ("shape", "dtype"), "an array")),
    (checks.check_has, ("it", Broken(), ("shape",), "an array")),
    (checks.check_bool, ("sde", False)),
    (checks.check_schedule, (Linear(),)),
    (checks.check_source, (Normal(),)),
    (checks.check_function, ("f", velocity, "a function")),
    (checks.check_function, ("f", jax.jit(velocity), "a function")),
    (checks.check_velocity, (velocity,)),
    (checks.check_network, ("model_fn", lambda t, x, cond=None: x, "a model")),
    (checks.check_network, ("model_fn", PlainMLP().bind({}), "a model")),
    (checks.check_function, ("cost", lambda x0, x1: 0, "a cost", 2)),
    (checks.check_function, ("cost", lambda *args: 0, "a cost", 2)),
    (checks.check_function, ("cost", max, "a cost", 2)),
    (checks.check_network, ("apply_fn", linen_apply(PlainMLP()))),
    (checks.check_coupling, (independent,)),
    (checks.check_coupling, (ExactOT(),)),
    (checks.check_holds, ({"x1": X},)),
    (checks.check_holds, ({"x1": X, "cond": None}, "x1", "cond")),
    (checks.check_condition, (X, None)),
    (checks.check_condition, (X, {"label": np.zeros(2), "text": np.zeros((2, 7))})),
]
BAD = [
    (checks.check_member, ("kind", "c", ("a", "b")), "kind must be one of 'a', 'b', got 'c'."),
    (checks.check_member, ("kind", None, ("a", "b")), "kind must be one of 'a', 'b', got None."),
    (checks.check_member, ("kind", X, ("a", "b")), "kind must be one of 'a', 'b', got float32 of shape (2, 3)."),
    (checks.check_seed, ("seed", -1), "seed must be from 0 to 4294967295, got -1."),
    (checks.check_seed, ("seed", 2**32), "seed must be from 0 to 4294967295, got 4294967296."),
    (checks.check_seed, ("seed", 1.0), "seed must be an integer, got 1.0."),
    (checks.check_seed, ("seed", None), "seed must be an integer, got None."),
    (checks.check_range, (0.5, 0.5), f"{RANGE}t_min=0.5 and t_max=0.5."),
    (checks.check_range, (-0.1, 0.5), f"{RANGE}t_min=-0.1 and t_max=0.5."),
    (checks.check_range, (0.1, 1.5), f"{RANGE}t_min=0.1 and t_max=1.5."),
    (checks.check_range, (NAN, 1.0), f"{RANGE}t_min=nan and t_max=1.0."),
    (checks.check_range, (0.0, NAN), f"{RANGE}t_min=0.0 and t_max=nan."),
    (checks.check_range, ("0", 1.0), f"{RANGE}t_min='0' and t_max=1.0."),
    (checks.check_ends, (0.5, 0.5), "t0 and t1 must differ, both are 0.5."),
    (checks.check_ends, (NAN, 0.5), "t0 must be a finite number, got nan."),
    (checks.check_ends, (0.0, INF), "t1 must be a finite number, got inf."),
    (checks.check_ends, (0.0, None), "t1 must be a finite number, got None."),
    (checks.check_key, (0,), f"{TYPED}0."),
    (checks.check_key, (None,), f"{TYPED}None."),
    (checks.check_key, (jax.random.PRNGKey(0),), f"{TYPED}uint32 of shape (2,)."),
    (checks.check_key, (LIST_OF_KEYS,), f"{TYPED}key<fry> of shape (2,)."),
    (checks.check_key, (jnp.zeros(()), "key_x0"), f"key_x0{TYPED[3:]}the float32 array 0.0."),
    (checks.check_array, ("x", [1.0]), "x must be an array, as jnp.asarray makes, got a list."),
    (checks.check_array, ("x", (X,)), "x must be an array, as jnp.asarray makes, got a tuple."),
    (checks.check_array, ("x", {"x": X}), "x must be an array, as jnp.asarray makes, got a dict."),
    (checks.check_array, ("x", 1.0), "x must be an array, as jnp.asarray makes, got 1.0."),
    (checks.check_array, ("x", None), "x must be an array, as jnp.asarray makes, got None."),
    (checks.check_array, ("x", np.float32), "x must be an array, as jnp.asarray makes, got the class float32."),
    (checks.check_state, ([1.0],), "x0 must be an array, as jnp.asarray makes, got a list."),
    (checks.check_state, (X.astype(int),), "x0 must be floating point, got int32."),
    (checks.check_state, (X.astype(complex), "x1"), "x1 must be floating point, got complex64."),
    (checks.check_state, (jnp.float32(1.0),), "x0 must be [batch, ...], got a scalar."),
    (checks.check_event, (X[:, :0],), "x must be [batch, ...] with an event that is not empty, got shape (2, 0)."),
    (checks.check_event, (X.astype(int), "x0"), "x0 must be floating point, got int32."),
    (checks.check_tokens, ("x1", X), "x1 must be tokens, integers from 0 on, got float32."),
    (checks.check_tokens, ("x1", X > 0, 5), "x1 must be tokens, integers from 0 to 4, got bool."),
    (checks.check_tokens, ("x1", [1], 5), "x1 must be an array, as jnp.asarray makes, got a list."),
    (checks.check_tokens, ("x1", jnp.int32(1), 5), "x1 must be [batch, ...], got a scalar."),
    (checks.check_tokens, ("x1", np.array([0, 5]), 5), "x1 must be tokens from 0 to 4, got some from 0 to 5."),
    (checks.check_tokens, ("x1", np.array([-1, 2])), "x1 must be tokens from 0 on, got some from -1 to 2."),
    (checks.check_where, ("keep", None, X), "keep must be an array, as jnp.asarray makes, got None."),
    (
        checks.check_where,
        ("keep", X, X),
        "keep must be bool and broadcast to the state (2, 3), got float32 of shape (2, 3).",
    ),
    (
        checks.check_where,
        ("keep", np.ones(2, bool), X),
        "keep must be bool and broadcast to the state (2, 3), got bool of shape (2,).",
    ),
    (checks.check_logits, ("logits", None, X, 5), "logits must be an array, as jnp.asarray makes, got None."),
    (checks.check_logits, ("f", X, X, 5), "f must be [2, 3, 5], one for each token, got shape (2, 3)."),
    (checks.check_logits, ("f", jnp.ones((2, 3, 5), bool), X, 5), "f must be real numbers, got bool."),
    (checks.check_estimate, (X, X, 5), "estimate must be [2, 3, 5], one for each token, got shape (2, 3)."),
    *(
        (
            checks.check_estimate,
            (value * np.ones((2, 3, 2), np.float32), X, 2),
            "estimate must be probabilities of the tokens, or zeros, got float32 of shape (2, 3, 2).",
        )
        for value in (1, np.array([1.5, -0.5], np.float32), NAN, -np.inf)
    ),
    (checks.check_data, ("x1", None), "x1 must be an array, as jnp.asarray makes, got None."),
    (checks.check_data, ("x1", X.astype(int)), "x1 must be floating point, got int32."),
    (
        checks.check_data,
        ("x1", X.astype(jnp.uint8)),
        "x1 must be floating point, got uint8; fm_jax.data.images.to_float brings pixels to [-1, 1].",
    ),
    (checks.check_data, ("x1", X[:0]), "x1 must be [batch, ...], not empty, got shape (0, 3)."),
    (checks.check_data, ("x1", X[0, 0]), "x1 must be [batch, ...], got a scalar."),
    (checks.check_shape, ("v(t, x)", X[:, :1], X), "v(t, x) must have the shape of x, (2, 3), got (2, 1)."),
    (checks.check_shape, ("z", X[0], X, "x1"), "z must have the shape of x1, (2, 3), got (3,)."),
    (checks.check_shape, ("v", (X, X), X), "v must be an array of the shape of x, (2, 3), got a tuple."),
    (checks.check_shape, ("v", None, X), "v must be an array of the shape of x, (2, 3), got None."),
    (checks.check_shape, ("v", 0.0, X, "x1"), "v must be an array of the shape of x1, (2, 3), got 0.0."),
    (checks.check_shape, ("v", X.astype(complex), X), "v must be real numbers, got complex64."),
    (checks.check_shape, ("v", X > 0, X), "v must be real numbers, got bool."),
    (checks.check_numbers_of, ("s", None, X), "s must be an array, as jnp.asarray makes, got None."),
    (checks.check_real, ("x", X > 0), "x must be real numbers, got bool."),
    (checks.check_real, ("x", 0.5), "x must be an array, as jnp.asarray makes, got 0.5."),
    (checks.check_data, ("x1", X[:, :0]), "x1 must be [batch, ...], not empty, got shape (2, 0)."),
    (
        checks.check_data,
        ("x1", X.astype(jnp.float8_e4m3fn)),
        "x1 must be floating point, got float8_e4m3fn.",
    ),
    (checks.check_numbers_of, ("s", X, X), "s must be a number or [batch] = (2,), got shape (2, 3)."),
    (checks.check_numbers_of, ("s", X[0], X), "s must be a number or [batch] = (2,), got shape (3,)."),
    (checks.check_numbers_of, ("s", [1, 2], X), "s must be an array, as jnp.asarray makes, got a list."),
    (checks.check_numbers_of, ("s", "2", X), "s must be an array, as jnp.asarray makes, got '2'."),
    (checks.check_numbers_of, ("s", X[:, 0] > 0, X), "s must be real numbers, got bool."),
    (checks.check_numbers_of, ("s", X[:, 0] + 1j, X), "s must be real numbers, got complex64."),
    (checks.check_times, ("t", 1.5, *UNIT), "t must be within [0.0, 1.0], the domain, got 1.5."),
    (checks.check_times, ("t", 1 + 1e-6, *UNIT), "t must be within [0.0, 1.0], the domain, got 1."),
    (checks.check_times, ("t", np.array([-0.5]), *UNIT), "t must be within [0.0, 1.0], the domain, got -0.5."),
    (checks.check_times, ("t", [0.5, 2.0], *UNIT), "t must be within [0.0, 1.0], the domain, got times from 0.5 to 2."),
    (checks.check_times, ("t", NAN, *UNIT), "t must be finite, got nan."),
    (checks.check_times, ("t", np.array([0.5, INF]), *UNIT), "t must be finite, got [0.5 inf]."),
    (checks.check_times, ("t", "0.5", *UNIT), "t must be real numbers, got '0.5'."),
    (checks.check_times, ("r", X, (0.0, 0.9), "v's"), "r must be within [0.0, 0.9], v's, got times from 1 to 1."),
    (checks.check_finite, ("scale", np.array([1.0, NAN])), "scale must be finite, got [ 1. nan]."),
    (checks.check_finite, ("scale", INF), "scale must be finite, got inf."),
    (checks.check_finite, ("scale", X[0].astype(jnp.bfloat16) * INF), "scale must be finite, got [inf inf inf]."),
    (checks.check_finite, ("scale", "1"), "scale must be real numbers, got '1'."),
    (checks.check_finite, ("scale", None), "scale must be real numbers, got None."),
    (checks.check_finite, ("scale", np.ones(2) * 1j), "scale must be real numbers, got complex128 of shape (2,)."),
    (checks.check_diffusion, (-1.0,), f"{NOISE}-1.0."),
    (checks.check_diffusion, (NAN,), f"{NOISE}nan."),
    (checks.check_diffusion, ("1",), f"{NOISE}'1'."),
    (checks.check_tolerances, (None, 1e-3, 1), "rtol must be finite and not negative, got None."),
    (checks.check_tolerances, (NAN, 1e-3, 1), "rtol must be finite and not negative, got nan."),
    (checks.check_tolerances, (1e-3, -1.0, 1), "atol must be positive and finite, got -1.0."),
    (checks.check_tolerances, (1e-3, INF, 1), "atol must be positive and finite, got inf."),
    (checks.check_tolerances, (1e-3, 0.0, 1), "atol must be positive and finite, got 0.0."),
    (checks.check_tolerances, (1e-3, 1e-3, 0), "max_steps must be at least 1, got 0."),
    (checks.check_has, ("it", 3, ("shape",), "an array"), "it must be an array, got 3, which has no 'shape'."),
    (
        checks.check_has,
        ("it", Wrapped, ("value",), "a wrapper"),
        "it must be a wrapper, got the class Wrapped: make one, Wrapped(...).",
    ),
    (checks.check_bool, ("sde", 1), "sde must be True or False, got 1."),
    (checks.check_bool, ("sde", np.True_), "sde must be True or False, got np.True_."),
    (checks.check_bool, ("sde", "no"), "sde must be True or False, got 'no'."),
    (
        checks.check_schedule,
        (Linear,),
        "schedule must be a schedule, such as Linear(), got the class Linear: make one, Linear(...).",
    ),
    (
        checks.check_schedule,
        ("linear", "new_schedule"),
        "new_schedule must be a schedule, such as Linear(), got 'linear', which has no 'alpha'.",
    ),
    (checks.check_source, (None,), "source must be a source, such as Normal(), got None, which has no 'draw'."),
    (checks.check_function, ("f", 3, "a function"), "f must be a function, got 3."),
    (checks.check_function, ("f", Normal, "a function"), "f must be a function, got the class Normal."),
    (checks.check_velocity, (None,), f"{VELOCITY}None."),
    (checks.check_velocity, (X, "v_cond"), f"v_cond{VELOCITY[1:]}float32 of shape (2, 3)."),
    (
        checks.check_function,
        ("cost", lambda x0: 0, "a cost", 2),
        "cost must be a cost, got one with the arguments (x0).",
    ),
    (
        checks.check_network,
        ("apply_fn", lambda params, t, x, cond: x),
        f"{NETWORK}one with the arguments (params, t, x, cond).",
    ),
    (checks.check_network, ("apply_fn", None), f"{NETWORK}None."),
    (checks.check_network, ("apply_fn", Wrapped), f"{NETWORK}the class Wrapped."),
    (checks.check_network, ("apply_fn", PlainMLP()), f"{NETWORK}a Linen module: linen_apply(module) makes one of it."),
    (checks.check_network, ("f", 1, "a function f"), "f must be a function f, got 1."),
    (checks.check_coupling, (ExactOT,), f"{COUPLING}the class ExactOT."),
    (checks.check_coupling, (None,), f"{COUPLING}None."),
    (checks.check_holds, (X, "x1"), "the batch must be a dict with 'x1', got float32 of shape (2, 3)."),
    (checks.check_holds, (None, "x0", "x1"), "the batch must be a dict with 'x0' and 'x1', got None."),
    (checks.check_holds, (None,), "the batch must be a dict, got None."),
    (checks.check_holds, ((X, X), "x1"), 'the batch must be a dict, {"x1": data, "cond": labels}, got a tuple of 2.'),
    (checks.check_holds, ({"x": X, "a": X}, "x1"), "the batch must hold 'x1', got ['a', 'x']."),
    (checks.check_condition, (X, np.zeros(3)), f"cond {COND}(3,)."),
    (checks.check_condition, (X, {"text": np.zeros(())}), f"cond['text'] {COND}()."),
    (checks.check_condition, (X, "cat"), "cond must be an array [batch, ...] with batch = 2, got 'cat'."),
    (checks.check_condition, (X, [1, 2]), "cond[0] must be an array [batch, ...] with batch = 2, got 1."),
]


@pytest.mark.parametrize(("check", "arguments"), GOOD)
def test_good_values_pass(check, arguments):
    assert check(*arguments) is None


@pytest.mark.parametrize(("check", "arguments", "message"), BAD)
def test_bad_values_are_refused(check, arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(*arguments)


def test_numbers_that_increase():
    checks.check_increasing("(0, inf)", sigma_min=1e-9, sigma_max=1e9)
    checks.check_increasing("[0, 1]", low=0, mid=jnp.float32(0.5), high=1)
    checks.check_increasing("[0, inf]", low=0.0, high=INF)
    for low, high in ((1.0, 1.0), (0.0, 1.0), (2.0, 1.0), (1.0, INF), (NAN, 1.0), (1.0, NAN), (None, 1.0), ("0", 1.0)):
        message = f"{INCREASING}sigma_min={low!r} and sigma_max={high!r}."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            checks.check_increasing("(0, inf)", sigma_min=low, sigma_max=high)
    with pytest.raises(ValueError, match=r"^0 <= a < b < c <= 1 must hold, got a=0, b=0.5 and c=0.5.$"):
        checks.check_increasing("[0, 1]", a=0, b=0.5, c=0.5)


def test_pairs():
    assert checks.check_pair("interval", (0.25, 1), "[0, 1]") == (0.25, 1)
    assert checks.check_pair("interval", [0, 0.5], "[0, 1]") == (0, 0.5)
    for value in (0.5, None, (0.1, 0.2, 0.3), "ab", {0.1, 0.2}):
        message = f"interval must be a pair (low, high), got {value!r}."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            checks.check_pair("interval", value, "[0, 1]")
    for low, high in ((0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (NAN, 0.5), ("a", "b")):
        message = f"interval must be a pair (low, high): 0 <= low < high <= 1 must hold, got {low=} and {high=}."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            checks.check_pair("interval", (low, high), "[0, 1]")


def test_shapes_of_several_arrays():
    checks.check_same_shape(x0=X, x1=X, z=X)
    with pytest.raises(ValueError, match=r"x0, x1 and z must have the same shape, got \(2, 3\), \(2, 3\) and \(2,\)."):
        checks.check_same_shape(x0=X, x1=X, z=X[:, 0])
    with pytest.raises(ValueError, match=r"^x1 must be an array, as jnp.asarray makes, got a list.$"):
        checks.check_same_shape(x0=X, x1=[1.0])
    checks.check_per_example(X, t=X[:, 0], weight=None)
    with pytest.raises(ValueError, match=r"^weight must be \[batch\] = \(2,\), got shape \(2, 3\).$"):
        checks.check_per_example(X, t=None, weight=X)
    with pytest.raises(ValueError, match=r"^t must be \[batch\] = \(2,\), got shape \(\).$"):
        checks.check_per_example(X, t=jnp.float32(0.5))
    with pytest.raises(ValueError, match=r"^t must be an array, as jnp.asarray makes, got 0.5.$"):
        checks.check_per_example(X, t=0.5)
    with pytest.raises(ValueError, match=r"^t must be real numbers, got bool.$"):
        checks.check_per_example(X, t=X[:, 0] > 0)


def test_a_traced_value_passes():
    """Its value is not known, and so no bound on it can be checked; what is known of it, shape and dtype, is."""

    @jax.jit
    def traced(value, x):
        assert checks.is_traced(value)
        checks.check_finite("scale", value)
        checks.check_number("scale", value, "(0, 1)")
        checks.check_increasing("(0, 1)", low=value, high=0.5)
        checks.check_range(value, 0.5)
        checks.check_ends(value, value)
        checks.check_ends(0.0, value)
        checks.check_diffusion(value)
        checks.check_tolerances(value, value, 1)
        checks.check_times("t", value, (0.0, 1.0), "the domain")
        checks.check_numbers_of("scale", value, x)
        assert checks.check_pair("interval", (value, 0.5), "[0, 1]")[0] is value
        checks.check_per_example(x, t=x[:, 0])
        checks.check_tokens("x", x.astype(int), 1)
        checks.check_event(x)
        checks.check_data("x", x)
        checks.check_state(x)
        checks.check_shape("v(t, x)", x, x)
        with pytest.raises(ValueError, match=r"^x must be floating point, got int32.$"):
            checks.check_data("x", x.astype(int))
        with pytest.raises(ValueError, match=r"^scale must be a number or \[batch\] = \(2,\), got shape \(2, 3\).$"):
            checks.check_numbers_of("scale", x, x)
        with pytest.raises(ValueError, match=r"^num must be an integer, got "):
            checks.check_integer("num", value)
        return value

    assert np.isnan(traced(NAN, X))
    assert not checks.is_traced(X)


def test_a_traced_key_passes():
    jax.jit(checks.check_key)(jax.random.key(0))
    with pytest.raises(ValueError, match=r"^key must be one typed key, .*, got uint32 of shape \(2,\)."):
        jax.jit(checks.check_key)(jax.random.PRNGKey(0))


def test_a_missing_package_is_named(monkeypatch):
    assert checks.imported("math", "this test").pi > 3
    with pytest.raises(ImportError, match=r"^Adaptive needs no_such_package: pip install 'fm-jax\[ot\]'.$"):
        checks.imported("no_such_package", "Adaptive", "'fm-jax[ot]'")


def test_what_is_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for free in (tmp_path, tmp_path / "new", tmp_path / "new" / "below"):
        assert checks.why_no_folder(free) is None
    for name, why in {"file": "is a file", "dangling": "is a symbolic link to nothing"}.items():
        for path in (tmp_path / name, tmp_path / name / "below"):
            assert checks.why_no_folder(path) == f"{tmp_path / name} {why}"


def test_every_check_is_tried_here():
    tried = inspect.getsource(inspect.getmodule(test_every_check_is_tried_here))
    public = [name for name, value in vars(checks).items() if inspect.isfunction(value) and not name.startswith("_")]
    own = [name for name in public if getattr(checks, name).__module__ == checks.__name__]
    assert len(own) > 20
    assert [name for name in own if f"checks.{name}" not in tried] == []


@dataclasses.dataclass(frozen=True)
class Setting:
    scale: float

    def __post_init__(self):
        checks.check_setting(self, "scale", "(0, inf)")


def test_a_setting_is_known_in_every_trace():
    for value in (2, 2.0, np.float32(2.0), jnp.float32(2.0)):
        made = Setting(value)
        assert hash(made) == hash(Setting(2.0))
        assert jax.jit(lambda x, made=made: x if made.scale > 1 else -x)(1.0) == 1.0
    with pytest.raises(ValueError, match=r"^scale must be positive and finite, got the float32 array nan.$"):
        Setting(jnp.float32(NAN))
    assert jax.jit(lambda scale: Setting(scale).scale)(3.0) == 3.0


def test_what_must_be_known_is_refused_where_it_is_traced():
    with pytest.raises(ValueError, match=r"^eta must be known when it is built, got a traced value: make it a static"):
        jax.jit(lambda eta: checks.check_known("eta", eta))(0.5)


def test_kinds_of_dtypes():
    assert [checks.is_real(dtype) for dtype in (np.int8, jnp.bfloat16, bool, complex)] == [True, True, False, False]
    assert [checks.is_number(dtype) for dtype in (np.int8, bool, complex, jax.random.key(0).dtype)] == [True] * 3 + [
        False
    ]
