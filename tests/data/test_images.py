import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fm_jax.data import images
from fm_jax.data.images import load_images, to_float, to_uint8

# Shape, and the name of class 7.
FACTS = {"mnist": ((28, 28, 1), "7"), "fashion_mnist": ((28, 28, 1), "Sneaker"), "cifar10": ((32, 32, 3), "horse")}


@pytest.mark.parametrize("name", images.NAMES)
def test_load_slices(name, prepared):
    tfds_dir = prepared(name)
    dataset = load_images(name, "test[:256]", data_dir=tfds_dir)
    shape, seventh = FACTS[name]
    assert dataset.images.shape == (256, *shape)
    assert dataset.images.dtype == np.uint8
    assert dataset.labels.dtype == np.int32
    assert (dataset.num_classes, dataset.levels) == (10, 256)
    assert dataset.class_names[7] == seventh
    assert set(dataset.labels) == set(range(10))
    assert dataset.images.min() == 0
    assert dataset.images.max() == 255
    tail = load_images(name, "test[250:256]", data_dir=str(tfds_dir))
    np.testing.assert_array_equal(tail.images, dataset.images[250:])
    np.testing.assert_array_equal(tail.labels, dataset.labels[250:])


def test_chunks_do_not_change_the_result(prepared, monkeypatch):
    tfds_dir = prepared("mnist")
    whole = load_images("mnist", "train[:50]", data_dir=tfds_dir)
    monkeypatch.setattr(images, "_CHUNK", 7)
    chunked = load_images("mnist", "train[:50]", data_dir=tfds_dir)
    assert hashlib.sha256(chunked.images).digest() == hashlib.sha256(whole.images).digest()
    np.testing.assert_array_equal(chunked.labels, whole.labels)


def test_environment_variable_counts_after_import(prepared, monkeypatch, tmp_path):
    tfds_dir = prepared("mnist")
    import tensorflow_datasets  # noqa: F401

    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    assert len(load_images("mnist", "test[:3]").images) == 3
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="TFDS_DATA_DIR"):
        load_images("mnist", "test[:3]")


@pytest.mark.slow
def test_tensorflow_is_not_imported(prepared):
    tfds_dir = prepared("mnist")
    code = (
        "import sys; from fm_jax.data.images import load_images;"
        f"print(load_images('mnist', 'test[:2]', data_dir={str(tfds_dir)!r}).images.shape);"
        "assert 'tensorflow' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(2, 28, 28, 1)"


@pytest.mark.slow
def test_importing_the_package_is_light():
    code = (
        "import sys, fm_jax.data, fm_jax.data.toy, fm_jax.data.digits, fm_jax.data.images, fm_jax.data.pipeline;"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'grain', 'sklearn', 'matplotlib', 'PIL'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr


def test_not_prepared_says_where_and_what_to_run(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(FileNotFoundError) as error:
        load_images("mnist", "train", data_dir=tmp_path)
    assert f"mnist is not prepared in {tmp_path} (data_dir)" in str(error.value)
    assert f"python -m fm_jax.data.images mnist --data-dir {tmp_path}" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_another_file_format_is_refused(prepared, tmp_path):
    tfds_dir = prepared("mnist")
    (version,) = (tfds_dir / "mnist").iterdir()
    copy = tmp_path / "mnist" / version.name
    copy.mkdir(parents=True)
    for file in ("dataset_info.json", "features.json"):
        (copy / file).write_text((version / file).read_text().replace("array_record", "tfrecord"))
    with pytest.raises(FileNotFoundError, match="as tfrecord, not as array_record"):
        load_images("mnist", "train", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("svhn", "train", "name must be one of 'mnist', 'fashion_mnist', 'cifar10', got 'svhn'"),
        ("mnist", "valid", "split must be 'train', 'test' or a slice of them like 'train[:1000]', got 'valid'"),
        ("mnist", "train+test", "got 'train+test'"),
        ("mnist", "train[:x]", "got 'train[:x]'"),
        ("mnist", "train[5]", "got 'train[5]'"),
    ],
)
def test_bad_names_and_splits_are_refused(name, split, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_images(name, split)


def test_empty_slice_is_refused(prepared):
    tfds_dir = prepared("mnist")
    with pytest.raises(ValueError, match=r"split must have at least 1 example, got 'test\[5:5\]'"):
        load_images("mnist", "test[5:5]", data_dir=tfds_dir)


def test_missing_tensorflow_datasets_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"fm_jax\[data\]"):
        load_images("mnist", "train")


def test_command_line_prepares_array_record(monkeypatch, tmp_path, capsys):
    tfds = pytest.importorskip("tensorflow_datasets")
    calls = []

    class Builder:
        data_dir = str(tmp_path / "mnist" / "3.0.1")

        def download_and_prepare(self):
            calls.append("prepared")

    monkeypatch.setattr(tfds, "builder", lambda name, **options: calls.append((name, options)) or Builder())
    monkeypatch.setattr(sys, "argv", ["images", "mnist", "--data-dir", str(tmp_path)])
    images.main()
    assert calls == [("mnist", {"data_dir": tmp_path, "file_format": "array_record"}), "prepared"]
    assert Builder.data_dir in capsys.readouterr().out


def test_pixels_round_trip():
    pixels = np.arange(256, dtype=np.uint8)
    x = to_float(pixels)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, np.arange(256) / 127.5 - 1, atol=1e-7)
    assert (x[0], x[-1]) == (-1, 1)
    np.testing.assert_array_equal(to_uint8(x), pixels)
    # Within half a bin the nearest pixel wins; outside [-1, 1] values are clipped.
    np.testing.assert_array_equal(to_uint8(x + 0.49 / 127.5), pixels)
    np.testing.assert_array_equal(to_uint8(x - 0.49 / 127.5), pixels)
    np.testing.assert_array_equal(to_uint8([-7.0, 7.0]), [0, 255])


def test_to_float_refuses_floats():
    with pytest.raises(ValueError, match=r"images must be uint8, got float64\."):
        to_float(np.zeros(3))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.array([0, 255], np.uint8), "^x must be floating point, got uint8"),
        (np.array([0, 300]), "^x must be floating point, got int64"),
        (np.array([0.0, np.nan]), "^x must be finite, got "),
        (np.array([0.0, np.inf]), "^x must be finite, got "),
    ],
)
def test_what_has_no_pixel(x, message):
    with pytest.raises(ValueError, match=message):
        to_uint8(x)


def test_without_a_home_the_default_is_told_as_it_is_written(monkeypatch, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as without HOME, of a user whom nobody knows
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"mnist is not prepared in ~/tensorflow_datasets \(the default"):
        load_images("mnist", "train")
