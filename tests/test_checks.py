"""Each shared refusal: what passes, what does not, and that a traced value passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import checks
from fm_jax.schedules import Linear
from fm_jax.sources import Normal

NAN, INF = float("nan"), float("inf")
X = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("within", "good", "bad", "words"),
    [
        ("(0, inf)", [1e-9, 1.0, 1e9], [0.0, -1.0, INF, NAN], "positive and finite"),
        ("[0, inf)", [0.0, 1e9], [-1e-9, INF, NAN], "finite and not negative"),
        ("(-inf, inf)", [-1e9, 0.0, 1e9], [INF, -INF, NAN], "finite"),
        ("[0, 1]", [0, 0.5, 1], [-0.1, 1.1, NAN], r"in \[0, 1\]"),
        ("(0, 1]", [1e-9, 1], [0, 1.1, NAN], r"in \(0, 1\]"),
        ("[0, 1)", [0, 0.9], [-1, 1, NAN], r"in \[0, 1\)"),
        ("(0, 0.5)", [0.4], [0, 0.5, NAN], r"in \(0, 0.5\)"),
    ],
)
def test_numbers(within, good, bad, words):
    for value in good:
        checks.check_number("sigma", value, within)
    for value in bad:
        with pytest.raises(ValueError, match=f"^sigma must be {words}, got {value}.$"):
            checks.check_number("sigma", value, within)


@pytest.mark.parametrize("value", ["0.5", b"1", None, np.ones(2), [1.0], {}])
def test_what_is_no_number(value):
    with pytest.raises(ValueError, match=r"^sigma must be positive and finite, got "):
        checks.check_number("sigma", value, "(0, inf)")


def test_integers():
    for value in (1, 5, np.int32(3), np.uint8(1)):
        checks.check_integer("num", value)
    checks.check_integer("num", 0, least=0)
    for value in (1.0, NAN, True, "1", None, np.float32(2), np.bool_(True), jnp.ones(1)):
        with pytest.raises(ValueError, match=r"^num must be an integer, got "):
            checks.check_integer("num", value)
    with pytest.raises(ValueError, match=r"^num must be at least 1, got 0.$"):
        checks.check_integer("num", 0)
    with pytest.raises(ValueError, match=r"^num must be at least 3, got 2.$"):
        checks.check_integer("num", 2, least=3)


class Wrapped:
    """Has its attributes from another object, which no look at its class finds."""

    def __init__(self, value):
        self.value = value

    def __getattr__(self, name):
        return getattr(self.value, name)


def key_table():
    return [0, None, jax.random.PRNGKey(0), jax.random.split(jax.random.key(0)), jnp.zeros(())]


GOOD = [
    (checks.check_member, ("kind", "a", ("a", "b"))),
    (checks.check_range, (0.0, 1.0)),
    (checks.check_ends, (1.0, 0.0)),
    (checks.check_key, (jax.random.key(0),)),
    (checks.check_state, (X,)),
    (checks.check_state, (X.astype(jnp.bfloat16),)),
    (checks.check_shape, ("v(t, x)", X, X)),
    (checks.check_finite, ("scale", np.ones(3))),
    (checks.check_finite, ("scale", 1.0)),
    (checks.check_diffusion, (0.0,)),
    (checks.check_diffusion, (lambda t: t,)),
    (checks.check_tolerances, (0.0, 1e-3, 1)),
    (checks.check_tolerances, (1e-3, 0.0, 1)),
    (checks.check_has, ("it", X, ("shape", "dtype"), "an array")),
    (checks.check_has, ("it", Wrapped(X), ("shape", "dtype"), "an array")),
    (checks.check_bool, ("sde", False)),
    (checks.check_schedule, (Linear(),)),
    (checks.check_source, (Normal(),)),
    (checks.check_condition, (X, None)),
    (checks.check_condition, (X, {"label": np.zeros(2), "text": np.zeros((2, 7))})),
]
BAD = [
    (checks.check_member, ("kind", "c", ("a", "b")), "kind must be one of 'a', 'b', got 'c'."),
    (checks.check_range, (0.5, 0.5), "0 <= t_min < t_max <= 1 must hold, got t_min=0.5 and t_max=0.5."),
    (checks.check_range, (-0.1, 0.5), "0 <= t_min < t_max <= 1 must hold"),
    (checks.check_range, (0.1, 1.5), "0 <= t_min < t_max <= 1 must hold"),
    (checks.check_range, (NAN, 1.0), "0 <= t_min < t_max <= 1 must hold"),
    (checks.check_range, (0.0, NAN), "0 <= t_min < t_max <= 1 must hold"),
    (checks.check_ends, (0.5, 0.5), "t0 and t1 must differ, both are 0.5."),
    (checks.check_ends, (NAN, 0.5), "t0 and t1 must be finite, got nan and 0.5."),
    (checks.check_ends, (0.0, INF), "t0 and t1 must be finite, got 0.0 and inf."),
    *((checks.check_key, (key,), "key must be one typed key, as from jax.random.key") for key in key_table()),
    (checks.check_state, (X.astype(int),), "x0 must be floating point, got int32."),
    (checks.check_state, (X.astype(complex), "x1"), "x1 must be floating point, got complex64."),
    (checks.check_state, (jnp.float32(1.0),), r"x0 must be \[batch, ...\], got a scalar."),
    (checks.check_shape, ("v(t, x)", X[:, :1], X), r"v\(t, x\) must have the shape of x, \(2, 3\), got \(2, 1\)."),
    (checks.check_finite, ("scale", np.array([1.0, NAN])), "scale must be finite, got"),
    (checks.check_finite, ("scale", INF), "scale must be finite, got inf."),
    (checks.check_diffusion, (-1.0,), "diffusion must be finite and not negative, got -1.0."),
    (checks.check_diffusion, (NAN,), "diffusion must be finite and not negative, got nan."),
    (checks.check_tolerances, (None, 1e-3, 1), "rtol must be finite and not negative, got None."),
    (checks.check_tolerances, (1e-3, -1.0, 1), "atol must be finite and not negative, got -1.0."),
    (checks.check_tolerances, (NAN, 1e-3, 1), "rtol must be finite and not negative, got nan."),
    (checks.check_tolerances, (1e-3, INF, 1), "atol must be finite and not negative, got inf."),
    (checks.check_tolerances, (0.0, 0.0, 1), "rtol and atol must not both be 0."),
    (checks.check_tolerances, (1e-3, 1e-3, 0), "max_steps must be at least 1, got 0."),
    (checks.check_has, ("it", 3, ("shape",), "an array"), "it must be an array, got 3, which has no 'shape'."),
    (checks.check_has, ("it", jax.Array, ("shape",), "an array"), "it must be an array, got the class "),
    (checks.check_bool, ("sde", 1), "sde must be True or False, got 1."),
    (checks.check_bool, ("sde", np.True_), "sde must be True or False, got "),
    (checks.check_schedule, (Linear,), r"schedule must be a schedule, such as Linear\(\), got the class Linear."),
    (checks.check_schedule, ("linear",), "got 'linear', which has no 'alpha'."),
    (checks.check_source, (jax.random.normal,), r"source must be a source, such as Normal\(\), got .*no 'draw'."),
    (checks.check_condition, (X, np.zeros(3)), r"cond must be \[batch, ...\] with batch = 2, got shape \(3,\)."),
    (checks.check_condition, (X, {"text": np.zeros(())}), r"cond\['text'\] must be \[batch, ...\] with batch = 2"),
]


@pytest.mark.parametrize(("check", "arguments"), GOOD)
def test_good_values_pass(check, arguments):
    assert check(*arguments) is None


@pytest.mark.parametrize(("check", "arguments", "message"), BAD)
def test_bad_values_are_refused(check, arguments, message):
    with pytest.raises(ValueError, match=message):
        check(*arguments)


def test_shapes_of_several_arrays():
    checks.check_same_shape(x0=X, x1=X, z=X)
    with pytest.raises(ValueError, match=r"x0, x1 and z must have the same shape, got \(2, 3\), \(2, 3\) and \(2,\)."):
        checks.check_same_shape(x0=X, x1=X, z=X[:, 0])
    checks.check_per_example(X, t=X[:, 0], weight=None)
    with pytest.raises(ValueError, match=r"weight must be \[batch\] = \(2,\), got shape \(2, 3\)."):
        checks.check_per_example(X, t=None, weight=X)


def test_a_traced_value_passes():
    @jax.jit
    def traced(value):
        assert checks.is_traced(value)
        checks.check_finite("scale", value)
        checks.check_number("scale", value, "(0, 1)")
        return value

    assert np.isnan(traced(NAN))
    assert not checks.is_traced(X)


def test_a_missing_package_is_named(monkeypatch):
    assert checks.imported("math", "this test").pi > 3
    with pytest.raises(ImportError, match=r"^Adaptive needs no_such_package: pip install 'fm-jax\[ot\]'.$"):
        checks.imported("no_such_package", "Adaptive", "'fm-jax[ot]'")
