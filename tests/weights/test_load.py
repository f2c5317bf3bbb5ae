"""Parameters from files: every kind of piece, onto any devices, with nothing missing, unused or changed in silence."""

import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from weights import toy
from weights.toy import same_bits

from fm_jax.models import MLP
from fm_jax.weights.formats import WeightsError
from fm_jax.weights.load import load
from fm_jax.weights.rules import Piece, Rules, nested, template_of
from fm_jax.weights.write import write_tensors

RULES = toy.rules()


@pytest.fixture
def saved(tmp_path):
    """A function that writes tensors, in two files or one, and returns where."""

    def saved(tensors, shards=False):
        write_tensors(tmp_path / "model.safetensors", tensors, max_shard_bytes=4000 if shards else None)
        return tmp_path

    return saved


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("shards", [False, True])
def test_every_piece_bit_for_bit(saved, dtype, shards):
    assert same_bits(load(saved(toy.tensors(dtype), shards), RULES), toy.params(dtype))


def test_of_a_mapping():
    assert same_bits(load(toy.tensors(), RULES), toy.params())
    assert same_bits(load({key: jnp.asarray(value) for key, value in toy.tensors().items()}, RULES), toy.params())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "float16", np.float32])
def test_dtype(saved, dtype):
    params = load(saved(toy.tensors(np.float32)), RULES, dtype=dtype)
    wanted = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == np.float32 else x, toy.params())
    assert same_bits(params, wanted)


def test_64_bits_become_32_and_mixed_ones_the_wider(saved):
    assert same_bits(load(saved(toy.tensors(np.float64)), RULES), toy.params(np.float32))
    tensors = toy.tensors(ml_dtypes.bfloat16)
    tensors["blocks.1.norm.weight"] = tensors["blocks.1.norm.weight"].astype(np.float32)
    params = load(saved(tensors), RULES)
    assert params["blocks"]["norm"]["scale"].dtype == jnp.float32
    assert params["blocks"]["norm"]["bias"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        params["blocks"]["norm"]["scale"], toy.params(ml_dtypes.bfloat16)["blocks"]["norm"]["scale"].astype(np.float32)
    )


def test_a_number_too_large_for_the_dtype(saved):
    tensors = toy.tensors()
    tensors["image.weight"][0, 0, 0, 0] = 1e5
    with pytest.raises(
        WeightsError, match=r"'image\.weight' of .*model\.safetensors holds 1e\+05, which float16 has not"
    ):
        load(saved(tensors), RULES, dtype=jnp.float16)
    assert load(saved(tensors), RULES, dtype=jnp.bfloat16)["image"]["kernel"].max() > 9e4
    tensors["image.weight"][0, 0, 0, 0] = np.inf  # as it was in the file
    assert load(saved(tensors), RULES, dtype=jnp.float16)["image"]["kernel"].max() == np.inf


def test_parameters_do_not_change_with_the_file(saved):
    where = saved(toy.tensors())
    params = load(where, RULES)
    path = where / "model.safetensors"
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * (path.stat().st_size // 2))
    assert same_bits(params, toy.params())


class TestSharding:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))

    def place(self, *axes):
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def by_path(self, path):
        """Every cut there is: through layers, through parts that were swapped, through heads, none."""
        return {
            "blocks/query/kernel": self.place("a", None, "b"),
            "blocks/mlp/kernel": self.place(None, "a", "b"),
            "blocks/norm/scale": self.place(("a",), ("b",)),
            "modulation/kernel": self.place("a", "b"),
            "modulation/bias": self.place("b"),
            "image/kernel": self.place(None, None, "a", "b"),
            "patches/kernel": self.place(("a", "b")),
            "scale": self.place(),
        }.get(path)

    def test_each_leaf_as_is_said(self, saved):
        params = load(saved(toy.tensors(np.float16)), RULES, sharding=self.by_path, dtype=jnp.float32)
        assert same_bits(
            params,
            jax.tree.map(lambda x: x.astype(np.float32 if x.dtype == np.float16 else x.dtype), toy.params(np.float16)),
        )
        assert params["modulation"]["kernel"].sharding == self.place("a", "b")
        assert params["modulation"]["kernel"].addressable_shards[0].data.shape == (4, 5)
        assert isinstance(params["count"].sharding, SingleDeviceSharding)

    def test_one_for_all_a_device_and_a_tree(self, saved):
        where = saved(toy.tensors())
        tree = jax.tree.map(lambda leaf: self.place(), RULES.template)
        for sharding, devices in ((self.place(), 4), (jax.devices()[2], 1), (tree, 4)):
            params = load(where, RULES, sharding=sharding)
            assert same_bits(params, toy.params())
            assert all(len(leaf.devices()) == devices for leaf in jax.tree.leaves(params))
        assert load(where, RULES, sharding=jax.devices()[2])["count"].devices() == {jax.devices()[2]}

    def test_a_part_reads_the_layers_that_it_has(self, monkeypatch):
        """Each of two devices has one layer, and the tensors of another layer are not touched for it."""
        touched = []
        original = Piece.to_ours
        monkeypatch.setattr(
            Piece, "to_ours", lambda piece, x: touched.append((piece.path, piece.layer)) or original(piece, x)
        )
        sharding = lambda path: NamedSharding(self.mesh, PartitionSpec("a")) if path == "blocks/mlp/kernel" else None  # noqa: E731
        load(toy.tensors(), RULES, sharding=sharding)
        assert touched.count(("blocks/mlp/kernel", 0)) == 1
        assert touched.count(("blocks/mlp/kernel", 1)) == 1

    @pytest.mark.parametrize(
        ("sharding", "message"),
        [
            (3, "sharding must be a Sharding, a pytree"),
            (lambda: 3, "sharding must be a Sharding, a pytree"),
            (lambda path: PartitionSpec("a"), "The sharding of '.*' must be a jax.sharding.Sharding"),
            ({"count": SingleDeviceSharding(jax.devices()[0])}, "it lacks .*'blocks/key/bias'"),
        ],
    )
    def test_refusals(self, sharding, message):
        with pytest.raises(ValueError, match=message):
            load(toy.tensors(), RULES, sharding=sharding)

    def test_a_leaf_that_cannot_be_cut(self):
        with pytest.raises(ValueError, match=r"'embed/table' of shape \(7, 8\) cannot be cut so"):
            load(toy.tensors(), RULES, sharding=lambda path: self.place("a") if path == "embed/table" else None)


class TestKeys:
    def test_all_that_does_not_fit_is_listed(self, saved):
        tensors = toy.tensors() | {"extra": np.zeros(3), "more": np.zeros(2)}
        del tensors["image.weight"], tensors["count"]
        tensors["image.bias"] = np.zeros((2, 4), np.float32)
        tensors["blocks.0.qk.bias"] = np.zeros(8, np.float32)
        with pytest.raises(WeightsError) as caught:
            load(saved(tensors, shards=True), RULES)
        message = re.sub(r"\S*/model", "model", str(caught.value))
        assert message == (
            "model.safetensors.index.json does not fit the network. Of its keys are\n"
            "  2 missing: image.weight, count\n"
            "  2 unused: extra (model-00002-of-00002.safetensors), more (model-00002-of-00002.safetensors)\n"
            "  2 of another shape: image.bias is [2, 4], must be [8] (model-00001-of-00002.safetensors), blocks.0.qk."
            "bias is [8], must be [16] (model-00001-of-00002.safetensors)"
        )

    @pytest.mark.parametrize("key", toy.rules(optional=frozenset()).shapes)
    def test_each_key_is_needed(self, key):
        tensors = toy.tensors()
        del tensors[key]
        with pytest.raises(WeightsError, match=f"1 missing: {re.escape(key)}$"):
            load(tensors, toy.rules(optional=frozenset()))

    @pytest.mark.parametrize("key", RULES.shapes)
    def test_each_shape_is_checked(self, key):
        tensors = toy.tensors()
        tensors[key] = np.zeros((*tensors[key].shape, 1), np.float32)
        with pytest.raises(WeightsError, match=f"1 of another shape: {re.escape(key)} is "):
            load(tensors, RULES)

    @pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.bool_])
    def test_codes_are_no_numbers(self, dtype):
        """A tensor of codes has the shape of what it stands for."""
        tensors = toy.tensors()
        tensors["image.weight"] = np.zeros(tensors["image.weight"].shape, dtype)
        tensors["count"] = np.zeros(3, np.float32)
        with pytest.raises(WeightsError) as caught:
            load(tensors, RULES, dtype=jnp.float32)
        name = np.dtype(dtype).name
        assert str(caught.value).endswith(
            f"2 of another kind: image.weight is {name}, must be floating point, count is float32, must be integers"
        )

    def test_integers_that_are_too_large(self):
        assert load(toy.tensors() | {"count": np.array([1, 2, 3])}, RULES)["count"].dtype == jnp.int32
        with pytest.raises(WeightsError, match="'count' of the mapping of tensors holds integers that int32 has not"):
            load(toy.tensors() | {"count": np.array([1, 2, 2**32])}, RULES)

    def test_what_says_nothing_is_ignored(self):
        for key in ("position_ids", "text.position_ids"):
            load(toy.tensors() | {key: np.arange(3)}, RULES)
        with pytest.raises(WeightsError, match="1 unused: position_ids_2"):
            load(toy.tensors() | {"position_ids_2": np.arange(3)}, RULES)

    def test_arguments(self):
        for options, message in (
            ({"dtype": "int8"}, "dtype must be a floating-point dtype"),
            ({"dtype": "float33"}, "dtype must be a floating-point dtype"),
            ({"average": "0.999"}, "average must be one of 'ema', 'model_ema', 'model'"),
            ({"prefix": 3}, "prefix must be a string"),
            ({"prefix": "a.", "average": "ema"}, "and then average is left out"),
            ({"prefix": "a."}, r"No key of the mapping of tensors begins with 'a\.'"),
        ):
            with pytest.raises(ValueError, match=message):
                load(toy.tensors(), RULES, **options)
        with pytest.raises(ValueError, match="rules must be Rules"):
            load(toy.tensors(), toy.rules)
        with pytest.raises(ValueError, match="path must be a file, a folder or a list of files, got 3"):
            load(3, RULES)
        with pytest.raises(ValueError, match="'count' must be an array"):
            load(toy.tensors() | {"count": [1, 2, 3]}, RULES)
        with pytest.raises(ValueError, match="'count' must be an array of F64"):
            load(toy.tensors() | {"count": np.zeros(3, complex)}, RULES)

    def test_rules_that_do_not_tile_the_network(self):
        rules = Rules(nested({"a": jax.ShapeDtypeStruct((2,), np.float32)}), (Piece("b", "b", "n -> n"),))
        with pytest.raises(ValueError, match="name leaves that the network lacks"):
            load({"b": np.zeros(2)}, rules)


def prefixed(prefix, tensors=None):
    return {prefix + key: value for key, value in (toy.tensors() if tensors is None else tensors).items()}


def flat(tensors, network=""):
    return {f"model_ema.{(network + key).replace('.', '')}": value for key, value in tensors.items()}


class TestPrefixes:
    @pytest.mark.parametrize(
        "prefix",
        [
            "module.",
            "_orig_mod.",
            "module._orig_mod.",
            "model.",
            "model.diffusion_model.",
            "first_stage_model.",
            "cond_stage_model.",
            "text_encoders.clip_l.transformer.",
            "vae.",
        ],
    )
    def test_one_before_all_keys(self, prefix):
        with pytest.warns(UserWarning, match=f"the prefix '{prefix}' is dropped"):
            assert same_bits(load(prefixed(prefix), RULES), toy.params())

    def test_no_prefix_no_word(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(toy.tensors(), RULES)

    def test_of_one_network_among_several(self):
        tensors = prefixed("model.diffusion_model.") | prefixed("first_stage_model.", {"a": np.zeros(2)})
        tensors |= {"betas": np.zeros(3), "cond_stage_model.b": np.zeros(3)}
        said = (
            r"is dropped from the keys; 3 keys are left alone: first_stage_model\.\* \(1\), betas, cond_stage_model\.\*"
        )
        with pytest.warns(UserWarning, match=said):
            assert same_bits(load(tensors, RULES), toy.params())
        tensors["model.diffusion_model.extra"] = np.zeros(2)
        del tensors["model.diffusion_model.image.bias"]
        with pytest.warns(UserWarning, match="is (taken|dropped)"), pytest.raises(WeightsError) as caught:
            load(tensors, RULES)
        assert "1 missing: image.bias\n  1 unused: model.diffusion_model.extra" in str(caught.value)

    def test_of_ones_own(self):
        tensors = prefixed("a.") | prefixed("b.", toy.tensors(seed=1))
        assert same_bits(load(tensors, RULES, prefix="b."), toy.params(seed=1))
        with pytest.raises(WeightsError, match=r"are there behind 'a\.', 'b\.': give one as prefix"):
            load(tensors, RULES)
        with pytest.raises(WeightsError, match=r"1 unused: a\.extra"):
            load(tensors | {"a.extra": np.zeros(2)}, RULES, prefix="a.")


class TestAverages:
    @pytest.mark.parametrize(
        "average",
        [
            lambda x: prefixed("ema.", x),
            lambda x: prefixed("ema.module.", x),
            lambda x: prefixed("model_ema.", x),
            lambda x: flat(x) | {"model_ema.decay": np.zeros(()), "model_ema.num_updates": np.zeros((), np.int32)},
            lambda x: flat(x, "diffusion_model."),
        ],
    )
    @pytest.mark.parametrize("model", ["", "model.", "model.diffusion_model.", "module."])
    def test_the_average_is_preferred_and_said(self, average, model):
        tensors = prefixed(model) | average(toy.tensors(seed=1))
        with pytest.warns(UserWarning, match=r"'(ema|model_ema)' is taken, of '\1' and 'model'"):
            assert same_bits(load(tensors, RULES), toy.params(seed=1))
        with pytest.warns(UserWarning, match=r"'model' is taken, of"):
            assert same_bits(load(tensors, RULES, average="model"), toy.params())

    def test_ema_before_model_ema(self):
        tensors = toy.tensors() | prefixed("ema.", toy.tensors(seed=1)) | flat(toy.tensors(seed=2))
        for average, seed in ((None, 1), ("ema", 1), ("model_ema", 2), ("model", 0)):
            with pytest.warns(UserWarning, match="is taken, of 'ema' and 'model_ema' and 'model'"):
                assert same_bits(load(tensors, RULES, average=average), toy.params(seed=seed))

    def test_one_that_is_not_there(self):
        with pytest.raises(WeightsError, match="has no 'ema' of this network: it has 'model'"):
            load(toy.tensors(), RULES, average="ema")

    def test_one_that_is_not_whole(self):
        tensors = toy.tensors() | prefixed("ema.", toy.tensors(seed=1))
        del tensors["ema.image.bias"]
        with (
            pytest.warns(UserWarning, match="is (taken|dropped)"),
            pytest.raises(WeightsError, match=r"1 missing: image\.bias"),
        ):
            load(tensors, RULES)

    def test_what_is_besides_is_unused(self):
        tensors = toy.tensors() | flat(toy.tensors()) | {"model_ema.extra": np.zeros(2)}
        with (
            pytest.warns(UserWarning, match="is (taken|dropped)"),
            pytest.raises(WeightsError, match=r"1 unused: model_ema\.extra"),
        ):
            load(tensors, RULES)
        with pytest.raises(WeightsError, match=r"1 unused: model_ema\.decay"):
            load(toy.tensors() | {"model_ema.decay": np.zeros(())}, RULES)


class TestCopies:
    def test_either_may_be_absent_where_the_rules_say_so(self):
        for absent in ("embed.weight", "tied.weight"):
            tensors = toy.tensors()
            del tensors[absent]
            assert same_bits(load(tensors, RULES), toy.params())

    def test_one_that_differs(self, saved):
        tensors = toy.tensors()
        tensors["tied.weight"] = tensors["tied.weight"].copy()
        tensors["tied.weight"][3, 3] = np.nextafter(tensors["tied.weight"][3, 3], 9, dtype=np.float32)
        message = r"'tied\.weight' of .*model\.safetensors must be a copy of 'embed\.weight', and differs"
        with pytest.raises(WeightsError, match=message):
            load(saved(tensors), RULES)
        tensors["tied.weight"] = tensors["embed.weight"].astype(np.float16)
        with pytest.raises(WeightsError, match=message):
            load(saved(tensors), RULES)

    def test_nan_is_equal_to_itself(self):
        tensors = toy.tensors()
        tensors["embed.weight"][0] = np.nan
        tensors["tied.weight"] = tensors["embed.weight"].copy()
        load(tensors, RULES)


class TestTables:
    @pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
    def test_equal_up_to_rounding(self, saved, dtype):
        load(saved(toy.tensors() | {"positions": toy.table().astype(dtype)}), RULES)

    def test_optional_or_not(self):
        tensors = toy.tensors()
        del tensors["positions"]
        load(tensors, RULES)
        with pytest.raises(WeightsError, match="1 missing: positions"):
            load(tensors, toy.rules(optional=frozenset()))

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            (toy.table()[::-1], "is 1.9 from what it computes|is .* from what it computes, of which the largest"),
            (toy.table() + 1e-3, "is 0.001 from what it computes, of which the largest number is 1"),
            (np.where(toy.table() == toy.table().max(), np.nan, toy.table()), "is nan from what it computes"),
            (np.full_like(toy.table(), np.inf), "is inf from what it computes"),
            (toy.table()[:2], r"is a table of shape \[2, 4\]; the network computes one of \[3, 4\]"),
        ],
    )
    def test_one_that_differs(self, saved, table, message):
        with pytest.raises(WeightsError, match=rf"'positions' of .*model\.safetensors .*({message})"):
            load(saved(toy.tensors() | {"positions": table}), RULES)

    def test_integers_are_compared_exactly(self):
        rules = toy.rules(tables={"positions": lambda: np.arange(3)})
        load(toy.tensors() | {"positions": np.arange(3)}, rules)
        with pytest.raises(WeightsError, match="'positions'"):
            load(toy.tensors() | {"positions": np.array([0, 1, 3])}, rules)


class TestTemplate:
    def test_one_network_is_traced_once(self, monkeypatch):
        traced = []
        original = MLP.__call__
        monkeypatch.setattr(MLP, "__call__", lambda *x, **options: traced.append(1) or original(*x, **options))
        first = template_of(MLP(features=(5,)), jnp.zeros(1), jnp.zeros((1, 2)))
        again = template_of(MLP(features=(5,)), jax.ShapeDtypeStruct((1,), "float32"), jnp.zeros((1, 2)))
        assert first == again
        assert len(traced) == 1
        first.clear()
        assert template_of(MLP(features=(5,)), jnp.zeros(1), jnp.zeros((1, 2))) == again
        assert template_of(MLP(features=(5,)), jnp.zeros(1), jnp.zeros((1, 3))) != again
        assert template_of(MLP(features=(6,)), jnp.zeros(1), jnp.zeros((1, 2))) != again
        assert len(traced) == 3

    def test_a_network_without_a_hash(self):
        class Table(nn.Module):
            numbers: dict

            @nn.compact
            def __call__(self, t, x):
                return nn.Dense(self.numbers["width"])(x)

        template = template_of(Table({"width": 3}), jnp.zeros(1), jnp.zeros((1, 2)))
        assert template["Dense_0"]["kernel"].shape == (2, 3)
