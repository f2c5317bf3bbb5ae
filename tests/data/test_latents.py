"""Latents in records: what is written, what is drawn of them, and a pass that is killed."""

import contextlib
import dataclasses
import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

pytest.importorskip("array_record", reason="needs the extra fm_jax[data]")
grain = pytest.importorskip("grain", reason="needs the extra fm_jax[data]")

from fm_jax.data.encoding import write_latents  # noqa: E402
from fm_jax.data.images import ImageDataset  # noqa: E402
from fm_jax.data.latents import LatentImages, latent_batches, latent_dataset, open_latents  # noqa: E402
from fm_jax.data.lazy import LazyImages  # noqa: E402
from fm_jax.data.pipeline import batches  # noqa: E402
from fm_jax.latents import PIXELS, SD, LatentSpace, check_latents  # noqa: E402

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (90, 4, 4, 1), np.uint8)
LABELS = np.arange(90) % 3
TRAIN = ImageDataset(IMAGES[:70], LABELS[:70], ("a", "b", "c"))
TEST = ImageDataset(IMAGES[70:], LABELS[70:], ("a", "b", "c"))
OPTIONS = {"autoencoder": "ab12", "batch_size": 8, "shard_size": 16, "progress": False}


def encode(x):
    """4x4 pixels of one channel to 2x2 of four, which mirroring does not commute with; float32."""
    patches = x.reshape(-1, 2, 2, 2, 2).swapaxes(2, 3).reshape(-1, 2, 2, 4)
    mean = patches * np.float32([1, 3, 0.5, 2]) + np.float32([5, 0, -2, 0.1])
    return jnp.asarray(mean), jnp.asarray(0.1 + np.abs(patches))


def only_mean(x):
    return encode(x)[0], None


def written(folder, encode=encode, **options):
    return write_latents(folder, {"train": TRAIN, "test": TEST}, encode, **OPTIONS | options)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return written(tmp_path_factory.mktemp("latents") / "a", flip=True, space=SD, about={"size": 4})


def expected(images, mirrored=False):
    x = images.astype(np.float32) / np.float32(127.5) - np.float32(1)
    return [np.asarray(part, np.float16) for part in encode(x[:, :, ::-1] if mirrored else x)]


def test_means_and_deviations_of_images_and_of_mirrored_ones(latents):
    train, test = latents.splits["train"], latents.splits["test"]
    mirrored = np.array([True, False])
    for split, images in ((train, TRAIN.images), (test, TEST.images)):
        found = split.read(np.array([15, 3]), mirrored)
        for i, n in enumerate((15, 3)):
            for part, whole in zip(found, expected(images, mirrored[i]), strict=True):
                np.testing.assert_array_equal(part[i], whole[n].astype(np.float32))
    assert latents.shape == (2, 2, 4)
    assert (latents.class_names, latents.space, latents.autoencoder) == (("a", "b", "c"), SD, "ab12")
    assert latents.about == {"size": 4}
    np.testing.assert_array_equal(train.labels, LABELS[:70])
    assert sorted(p.name for p in latents.folder.glob("t*.array_record"))[:3] == [
        "test-00000-of-00002.array_record",
        "test-00001-of-00002.array_record",
        "train-00000-of-00005.array_record",
    ]


@pytest.mark.parametrize("chunk", [16, 1024])
def test_statistics_equal_those_of_numpy(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("fm_jax.data.encoding._CHUNK", chunk)
    latents = written(tmp_path, flip=True)
    parts = [expected(TRAIN.images, mirrored) for mirrored in (False, True)]
    mean, std = (np.concatenate([part[i].reshape(-1, 4) for part in parts]).astype(np.float64) for i in (0, 1))
    np.testing.assert_allclose(latents.mean, mean.mean(0), rtol=1e-12)
    np.testing.assert_allclose(latents.std, np.sqrt(mean.var(0) + (std**2).mean(0)), rtol=1e-12)
    z = (mean + std * RNG.normal(size=mean.shape)).astype(np.float32)
    assert check_latents(latents.measured().to_model(jnp.asarray(z).reshape(-1, 1, 1, 4))) == pytest.approx(1, abs=0.05)


def test_statistics_without_deviations_and_without_mirrored_images(tmp_path):
    plain = written(tmp_path / "a", only_mean)
    mean = expected(TRAIN.images)[0].reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(plain.mean, mean.mean(0), rtol=1e-12)
    np.testing.assert_allclose(plain.std, mean.std(0), rtol=1e-12)
    assert plain.splits["train"].read(np.arange(2))[1] is None
    with pytest.raises(ValueError, match="latents of mirrored images were not written"):
        latent_batches(plain.splits["train"], space=PIXELS, batch_size=8, seed=0, flip=True)


class Killed(BaseException):
    """As SIGKILL: nothing is told, and nothing tidied up by whoever could."""


@pytest.mark.parametrize("after", [0, 1, 3, 9, 11])
def test_a_pass_that_is_killed_goes_on_to_the_same_bits(after, latents, tmp_path):
    calls = []

    def killed(x):
        calls.append(None)
        if len(calls) > 1 + 2 * after:  # one look at the shape, two for a batch and its mirror image
            raise Killed
        return encode(x)

    with pytest.raises(Killed):
        written(tmp_path / "b", killed, flip=True, space=SD, about={"size": 4})
    with pytest.raises(ValueError, match="not finished: the command that began them goes on"):
        open_latents(tmp_path / "b")
    (tmp_path / "b" / ".unfinished-test-00001-of-00002.array_record").write_bytes(b"half a file")
    calls.clear()
    again = written(
        tmp_path / "b", lambda x: (calls.append(None), encode(x))[1], flip=True, space=SD, about={"size": 4}
    )
    assert again.sha256 == latents.sha256
    assert len(calls) <= 1 + 2 * (12 - 2 * max(0, after // 2 - 1))  # what was whole is not made again
    files = {path.name: path.read_bytes() for path in latents.folder.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == files


def test_what_is_finished_is_not_made_again(tmp_path):
    first = written(tmp_path)
    again = written(tmp_path, lambda x: pytest.fail("encoded again"), about={"moved": True})
    assert (again.sha256, again.about) == (first.sha256, {"moved": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"autoencoder": "cd34"}, "holds latents of another autoencoder ('ab12', and this is 'cd34')"),
        ({"autoencoder": None}, "holds latents of another autoencoder ('ab12', and this is None)"),
        ({"flip": False}, "holds latents made with another flip (True, and this is False)"),
        (
            {"space": LatentSpace((0.0,) * 4, (3.0,) * 4)},
            "another space ({'shift': 0.0, 'scale': 0.18215, 'square': 1}, and this is {'shift': [0.0, 0.0, 0.0, 0.0],",
        ),
        ({"batch_size": 4}, "holds latents made with another batch_size (8, and this is 4)"),
        ({"shard_size": 20}, "shard_size must be a multiple of batch_size=8, got 20."),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0."),
    ],
)
def test_other_latents_are_refused(options, message, latents):
    before = (latents.folder / "latents.json").read_bytes()
    with pytest.raises(ValueError, match=re.escape(message)):
        written(latents.folder, lambda x: pytest.fail("encoded"), **{"flip": True, "space": SD, **options})
    assert (latents.folder / "latents.json").read_bytes() == before


@pytest.mark.parametrize("space", [SD, LatentSpace((1.0, 2.0, 3.0, 4.0), (0.5, 1.0, 2.0, 3.0)), PIXELS])
def test_the_same_space_is_found_again(space, tmp_path):
    assert written(tmp_path, space=space).space == space
    assert written(tmp_path, lambda x: pytest.fail("encoded again"), space=space).space == space


@pytest.mark.parametrize("after", [4, 99])
def test_of_an_encoder_without_a_name_nothing_is_taken_for_that_of_another(after, tmp_path):
    calls = []

    def killed(x):
        calls.append(None)
        if len(calls) > after:
            raise Killed
        return encode(x)

    with pytest.raises(ValueError, match="latents must be finite"):  # with which nothing is written yet
        written(tmp_path, lambda x: (encode(x)[0] * np.nan, None), autoencoder=None, shard_size=8)
    with pytest.raises(Killed) if after == 4 else contextlib.nullcontext():
        written(tmp_path, killed, autoencoder=None, shard_size=8)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds latents of an encoder without a name, autoencoder=None"):
        written(tmp_path, only_mean, autoencoder=None, shard_size=8)
    with pytest.raises(ValueError, match=r"holds latents of another autoencoder .None, and this is 'mean'"):
        written(tmp_path, only_mean, autoencoder="mean", shard_size=8)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_images_are_refused(latents):
    with pytest.raises(ValueError, match="holds latents of other images"):
        write_latents(latents.folder, {"train": TRAIN}, encode, **OPTIONS, flip=True)
    with pytest.raises(ValueError, match="datasets must have the split 'train', got test"):
        write_latents(latents.folder, {"test": TRAIN}, encode, **OPTIONS)


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "finite, got NaN"), (1e5, "at most 65504, as float16 is, got")]
)
def test_latents_that_cannot_be_written(value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        written(tmp_path, lambda x: (encode(x)[0] * value, None))
    with pytest.raises(ValueError, match=r"encode must give \[batch, h, w, c\], got shapes \(8,\)"):
        written(tmp_path / "b", lambda x: (x.mean((1, 2, 3)), None))


@pytest.mark.parametrize("what", ["cut off", "gone", "of another length", "json", "field", "nothing"])
def test_folders_that_are_damaged(what, tmp_path):
    first = written(tmp_path)
    path, json_path = tmp_path / "train-00001-of-00005.array_record", tmp_path / "latents.json"
    error: type[Exception] = ValueError
    match what:
        case "cut off":
            path.write_bytes(path.read_bytes()[:-9])
            message = "train-00001-of-00005.array_record is damaged"
        case "gone":
            path.unlink()
            error, message = FileNotFoundError, "train-00001-of-00005.array_record is not there"
        case "of another length":
            path.write_bytes((tmp_path / "train-00004-of-00005.array_record").read_bytes())
            message = "must hold 16 records, got 6. Remove the file"
        case "json":
            json_path.write_text("{")
            message = "latents.json is damaged, it is not JSON"
        case "field":
            record = json.loads(json_path.read_bytes())
            json_path.write_text(json.dumps({k: v for k, v in record.items() if k != "mean"}))
            message = r"latents.json is damaged \(KeyError: 'mean'\)"
        case "nothing":
            json_path.unlink()
            error, message = FileNotFoundError, "is not a folder of latents: it has no latents.json"
    with pytest.raises(error, match=message):
        open_latents(tmp_path)
    if what == "nothing":  # whose files could be of any autoencoder
        with pytest.raises(ValueError, match=r"holds test-00000-of-00002.array_record and no latents.json to say what"):
            written(tmp_path, lambda x: pytest.fail("encoded"))
    if what == "gone":  # and is made again
        assert written(tmp_path).sha256 == first.sha256


def drawn(split, num, **options):
    options = {"space": PIXELS, "batch_size": 14, "seed": 3} | options
    found = latent_batches(split, **options)
    return [next(found) for _ in range(num)]


def test_latents_are_drawn_anew_each_epoch(latents):
    split = latents.splits["train"]
    epochs = [np.concatenate([b["x1"] for b in drawn(split, 5 * n)[-5:]]) for n in (1, 2)]
    labels = [np.concatenate([b["cond"] for b in drawn(split, 5 * n)[-5:]]) for n in (1, 2)]
    for found in labels:
        np.testing.assert_array_equal(np.sort(found), np.sort(split.labels))
    assert not np.isin(epochs[0], epochs[1]).any()


def test_draws_are_normal(latents):
    """Of 400 epochs of 8 examples, by mean, variance and the test of Kolmogorov and Smirnov (false alarms: 1e-4)."""
    split = latents.splits["train"].subset(slice(8))
    mean, std = split.read(np.arange(8))
    found = drawn(split, 400, batch_size=8)
    noise = []  # an example is known by the mean that it is nearest to
    for batch in found:
        distance = np.abs((batch["x1"][:, None] - mean[None]) / std[None]).reshape(8, 8, -1).max(-1)
        whose = distance.argmin(axis=1)
        if sorted(whose) == list(range(8)):
            noise.append((batch["x1"] - mean[whose]) / std[whose])
    noise = np.stack(noise).ravel()
    assert noise.size > 30_000
    assert stats.kstest(noise, "norm").pvalue > 1e-4
    assert abs(noise.mean()) < 4 / math.sqrt(noise.size)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / noise.size)
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 4 / math.sqrt(noise.size)


def test_an_example_is_a_function_of_seed_and_number_alone(latents):
    split = latents.splits["train"]
    one = drawn(split, 3, flip=True)
    two = [drawn(split, 3, flip=True, batch_size=7, process_index=i, process_count=2) for i in (0, 1)]
    for step, whole in enumerate(one):
        for name in ("x1", "cond"):
            np.testing.assert_array_equal(whole[name], np.concatenate([each[step][name] for each in two]))
    again = latent_batches(split, space=PIXELS, batch_size=14, seed=3, flip=True)
    next(again)
    state = again.get_state()
    expected = next(again)
    other = latent_batches(split, space=PIXELS, batch_size=14, seed=3, flip=True)
    other.set_state(json.loads(json.dumps(state)))
    np.testing.assert_array_equal(next(other)["x1"], expected["x1"])


def test_half_are_mirrored(latents):
    split = dataclasses.replace(latents.splits["train"], numbers=np.zeros(70, int))  # one image
    plain, twin = (split.read(np.array([0]), np.array([mirrored]))[0] for mirrored in (False, True))
    deviation = split.read(np.array([0]))[1]
    x = np.concatenate([batch["x1"] for batch in drawn(split, 20, flip=True)])
    nearer = [((x - each) ** 2 / deviation**2).sum((1, 2, 3)) for each in (plain, twin)]
    share = (nearer[1] < nearer[0]).mean()
    assert 0.4 < share < 0.6


def test_without_noise_the_batches_are_those_of_pixels(tmp_path):
    """An encoder that gives the pixels themselves: the order is that of `batches`, bit for bit."""
    x = (RNG.integers(0, 17, (40, 4, 4, 1)) / 8 - 1).astype(np.float32)  # exact in float16
    dataset = ImageDataset(x, np.arange(40) % 2, ("a", "b"), 17, (-1.0, 1.0))
    latents = write_latents(
        tmp_path, {"train": dataset}, lambda x: (x, None), autoencoder=None, batch_size=8, progress=False
    )
    found, expected = drawn(latents.splits["train"], 6), batches(dataset, batch_size=14, seed=3)
    for batch in found:
        other = next(expected)
        for name in ("x1", "cond"):
            np.testing.assert_array_equal(batch[name], other[name])
            assert batch[name].dtype == other[name].dtype
    np.testing.assert_array_equal(latent_dataset(latents, "train", PIXELS).images[:], x)


@pytest.mark.parametrize("space", [SD, LatentSpace((1.0, 2.0, 3.0, 4.0), (0.5, 1.0, 2.0, 3.0)), PIXELS])
def test_a_model_sees_its_space(space, latents):
    dataset = latent_dataset(latents, "test", space)
    mean = latents.splits["test"].read(np.arange(20))[0]
    np.testing.assert_allclose(dataset.images[:], space.to_model(jnp.asarray(mean)), rtol=1e-6)
    assert isinstance(dataset.images, LazyImages)
    assert dataset.images[3].shape == (2, 2, 4)
    some = dataset.subset(np.array([4, 2]))
    np.testing.assert_array_equal(some.images[:], dataset.images[[4, 2]])
    np.testing.assert_array_equal(some.labels, dataset.labels[[4, 2]])
    assert isinstance(some.images, LatentImages)


def test_squares_of_flux2_have_their_own_constants(latents):
    space = LatentSpace(tuple(range(16)), tuple(range(1, 17)), square=2)
    mean = latents.splits["test"].read(np.arange(3))[0]
    found = latent_dataset(latents, "test", space).images[:3]
    np.testing.assert_allclose(found, space.to_model(jnp.asarray(mean)), rtol=1e-6)


def test_refusals(latents, tmp_path):
    with pytest.raises(ValueError, match=r"z must be \[..., height, width, 2\] for this space"):
        latent_dataset(latents, "test", LatentSpace((0.0, 1.0), (1.0, 1.0)))
    with pytest.raises(ValueError, match="split must be one of 'train', 'test', got 'validation'"):
        latent_dataset(latents, "validation", PIXELS)
    with pytest.raises(ValueError, match="batch_size must be at most 70"):
        latent_batches(latents.splits["train"], space=PIXELS, batch_size=71, seed=0)
    constant = written(tmp_path, lambda x: (jnp.ones((len(x), 2, 2, 1)), None))
    with pytest.raises(ValueError, match="latents must vary in every channel"):
        constant.measured()


def test_through_grain_by_hand(latents):
    """The records are an ordinary source of Grain, for pipelines of one's own."""
    split = latents.splits["train"]
    dataset = grain.MapDataset.range(len(split)).map(lambda i: split.read(np.array([i]))[0][0]).batch(7)
    np.testing.assert_array_equal(dataset[1], split.read(np.arange(7, 14))[0])
