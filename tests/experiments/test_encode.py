"""From images to latents to samples on the command line: what is written, what is refused, and pixels as before."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tyro", reason="needs the extra fm_jax[experiments]")
pytest.importorskip("grain", reason="needs the extra fm_jax[data]")
pytest.importorskip("array_record", reason="needs the extra fm_jax[data]")

from experiments import encode, latent, sample
from experiments import images as command
from experiments.lab import command_line, images
from experiments.lab.codecs import Codec, open_codec, sha256_of
from experiments.lab.data import Data, load, read_facts, write_facts
from experiments.lab.experiment import read_run
from experiments.lab.latents import codec_of, codec_of_run
from experiments.lab.sampling import Sampling
from experiments.lab.small_codec import write_small_autoencoder, write_small_text_encoder
from fm_jax.data.encoding import write_latents
from fm_jax.data.latents import open_latents
from fm_jax.data.texts import open_texts
from fm_jax.latents import PIXELS, SD
from fm_jax.models.tiny_autoencoder import TinyAutoencoder
from fm_jax.text import Tokens
from fm_jax.train.log import read_metrics
from fm_jax.weights import WeightsError, open_model

ROOT = Path(__file__).parents[2]
DIGITS = Data(dataset="digits", num_images=64)
STEPS = {"total_steps": 3, "warmup_steps": 0, "batch_size": 8, "log_every": 1, "save_every": 3, "sample_every": 3}


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """An autoencoder, and a folder of latents of digits and of their mirror images."""
    folder = tmp_path_factory.mktemp("coded")
    write_small_autoencoder(folder / "autoencoder")
    encode.run(encode.Config(DIGITS, folder / "autoencoder", folder / "latents", flip=True, batch_size=32))
    return folder


def small(run_dir, data, module=latent, **changes):
    """A run as small as a smoke run."""
    training = dataclasses.replace(module.CONFIG.training, run_dir=run_dir, **STEPS, decay="constant")
    few = {"num_samples": 20, "frames": 2, "model": "smoke_dit", "training": training, "data": data}
    sampling = Sampling(solver="euler", steps=2, sample_batch=20)
    return dataclasses.replace(module.CONFIG, **({"sampling": sampling} | few | changes))


@pytest.fixture(scope="module")
def finished(coded):
    config = small(coded / "run", Data(encoded=coded / "latents"), flip=True)
    return config, latent.run(config)


@pytest.mark.slow
def test_latents_are_those_of_the_autoencoder(coded):
    latents = open_latents(coded / "latents")
    module, params = open_model(coded / "autoencoder")
    loaded = load(DIGITS)
    for mirrored in (False, True):
        x = loaded.test.images[:5]
        moments = module.apply({"params": params}, x[:, :, ::-1] if mirrored else x, method="encode")
        mean, std = latents.splits["test"].read(np.arange(5), np.full(5, mirrored))
        np.testing.assert_allclose(mean, moments.mean, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(std, jnp.exp(moments.log_variance / 2), rtol=2e-3)
    assert latents.images == {"train": loaded.facts.checksum, "test": loaded.facts.checksum_test}
    assert latents.autoencoder == sha256_of(params)
    np.testing.assert_array_equal(latents.splits["train"].labels, loaded.train.labels)
    assert latents.about["data"]["dataset"] == "digits"
    record = json.loads((coded / "latents" / "latents.json").read_bytes())
    assert record["about"]["image_shape"] == [8, 8, 1]


@pytest.mark.slow
def test_a_run_on_latents_reports_the_floor_and_decodes(coded, finished):
    config, results = finished
    run_dir, codec = config.training.run_dir, open_codec(coded / "autoencoder", (8, 8, 1))
    floor = results["floor"]
    test, means = load(DIGITS).test, open_latents(coded / "latents").splits["test"].read(np.arange(20))[0]
    error = (((codec.decode(means) - test.images[:20]) / 2) ** 2).mean((1, 2, 3), dtype=np.float64)
    assert floor["psnr"] == pytest.approx(float((-10 * np.log10(error)).mean()), abs=1e-4)
    assert (floor["images"], floor["held_out"]) == (20, True)
    assert 0 <= floor["agreement"] <= 1
    assert results["classifier_accuracy_on_real"] > 0.5
    assert results["guided"]["nfe"] == 4
    for name in (*images.PICTURES, "data.json", "samples/step_000003.png"):
        assert (run_dir / name).stat().st_size > 0, name
    facts = read_facts(run_dir, config.data)
    assert (facts.shape, facts.image_shape) == ((4, 4, 4), (8, 8, 1))
    assert read_run(run_dir)[1].space == open_latents(coded / "latents").measured()


@pytest.mark.slow
def test_samples_of_a_run_are_decoded(coded, finished, tmp_path):
    config, _ = finished
    run_dir = config.training.run_dir
    sample.run(sample.Config(run_dir, out=tmp_path / "a.npz", num=4))
    with np.load(tmp_path / "a.npz") as found:
        assert sorted(found) == ["labels", "latents", "samples"]
        codec = open_codec(coded / "autoencoder", (8, 8, 1))
        np.testing.assert_allclose(codec.decode(found["latents"]), found["samples"], atol=1e-6)
        assert found["samples"].shape == (4, 8, 8, 1)
    sample.run(sample.Config(run_dir, out=tmp_path / "a.png", num=4))
    write_small_autoencoder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"--autoencoder .*other is not what made them: they are latents of another"):
        sample.run(sample.Config(run_dir, out=tmp_path / "a.npz", num=4, autoencoder=tmp_path / "other"))
    with pytest.raises(ValueError, match=r"latents of another autoencoder \(SHA-256 [0-9a-f]{16}, and this one's is"):
        latent.run(small(tmp_path / "run", Data(encoded=coded / "latents", decoder=tmp_path / "other")))


def of_pixels(folder):
    """A folder of latents that are the pixels: those of digits are exact in float16."""
    loaded = load(DIGITS)
    splits = {"train": loaded.train, "test": loaded.test}
    return write_latents(folder, splits, lambda x: (x, None), autoencoder=None, batch_size=32, progress=False)


def numbers(run_dir, results):
    """What a run gives, but for seconds."""
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in read_metrics(run_dir)]
    kept = {k: {n: x for n, x in v.items() if "second" not in n} for k, v in results.items() if isinstance(v, dict)}
    return rows, kept, (run_dir / "samples.png").read_bytes()


@pytest.mark.slow
def test_in_pixels_a_run_is_that_of_images_bit_for_bit(tmp_path):
    """Of the same data by both commands, and through records of latents in the identity space."""
    found = []
    folder = of_pixels(tmp_path / "pixels").folder
    for name, module, data in (
        ("images", command, DIGITS),
        ("latent", latent, DIGITS),
        ("encoded", latent, Data(encoded=folder, space="own")),
    ):
        run = module.run if module is latent else images.run
        results = run(small(tmp_path / name, data, module))
        assert "floor" not in results
        found.append(numbers(tmp_path / name, results))
    assert found[0] == found[1] == found[2]


def test_a_pass_by_sigkill_goes_on_to_the_same_bits(coded, tmp_path):
    """In small, as another process: the files are those of a pass that was left alone."""
    out = tmp_path / "again"
    shutil.copytree(coded / "latents", out)
    record = json.loads((out / "latents.json").read_bytes())
    kept = {name: record[name] for name in ("autoencoder", "images", "space", "flip", "batch_size", "shard_size")}
    (out / "latents.json").write_text(json.dumps({"finished": False} | kept))
    next(out.glob("test*.array_record")).unlink()
    encode.run(encode.Config(DIGITS, coded / "autoencoder", out, flip=True, batch_size=32))
    for path in (coded / "latents").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on_to_the_same_bits(coded, tmp_path):
    words = f"--dataset digits --autoencoder {coded / 'autoencoder'} --out {tmp_path / 'b'} --batch-size 8"
    arguments = [sys.executable, "-m", "experiments.encode", *words.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "b").glob("*train*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(2):
        subprocess.run(arguments, env=environment, check=True, stdout=subprocess.DEVNULL)
    one = open_latents(tmp_path / "b")
    subprocess.run([*arguments, "--out", str(tmp_path / "c")], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert open_latents(tmp_path / "c").sha256 == one.sha256
    assert not list((tmp_path / "b").glob(".unfinished*"))


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_sides_that_do_not_halve_and_grey_pictures(channels):
    module = TinyAutoencoder(channels=4, encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1), latent_channels=2)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    codec = Codec(module, params, (6, 8, channels), Path("a"))
    x = np.random.default_rng(0).uniform(-1, 1, (3, 6, 8, channels)).astype(np.float32)
    mean, std = codec.encoder()(x)
    wide = np.pad(np.broadcast_to(x, (3, 6, 8, 3)), [(0, 0), (1, 1), (0, 0), (0, 0)], mode="edge")
    np.testing.assert_allclose(mean, module.apply({"params": params}, jnp.asarray(wide), method="encode"), atol=1e-5)
    assert std is None
    whole = np.clip(module.apply({"params": params}, mean, method="decode"), -1e9, 1e9)[:, 1:7]
    whole = whole if channels == 3 else whole.mean(-1, keepdims=True)
    np.testing.assert_allclose(codec.decode(mean, batch_size=2), np.clip(whole, -1, 1), atol=1e-5)
    with pytest.raises(ValueError, match=r"codes pictures of 3 channels, and these are \(8, 8, 2\)"):
        Codec(module, params, (8, 8, 2), Path("a"))


def test_checksums_know_every_number():
    params = {"a": np.zeros(2, np.float32), "b": {"c": np.ones((1, 2), np.float32)}}
    others = [
        {"a": np.zeros(2, np.float32), "b": {"d": np.ones((1, 2), np.float32)}},
        {"a": np.zeros(2, np.float32), "b": {"c": np.ones((2, 1), np.float32)}},
        {"a": np.zeros(2, np.float16), "b": {"c": np.ones((1, 2), np.float32)}},
        {"a": np.array([0, 1e-30], np.float32), "b": {"c": np.ones((1, 2), np.float32)}},
    ]
    assert len({sha256_of(each) for each in (params, *others)}) == 5
    assert sha256_of(jax.tree.map(jnp.asarray, params)) == sha256_of(params)


def test_another_scale_in_the_config_of_the_autoencoder_is_another_space(coded, tmp_path):
    shutil.copytree(coded / "autoencoder", tmp_path / "autoencoder")
    path = tmp_path / "autoencoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"scaling_factor": 3.0}))
    with pytest.raises(ValueError, match=r"holds latents made with another space .*: give another --out"):
        encode.run(encode.Config(DIGITS, tmp_path / "autoencoder", coded / "latents", flip=True, batch_size=32))


@pytest.mark.slow
def test_captions(tmp_path, monkeypatch):
    write_small_text_encoder(tmp_path / "text_encoder")
    captions = tmp_path / "captions.txt"
    captions.write_text("a three\na blue seven\na three\n")
    config = encode.Config(text=tmp_path / "text_encoder", captions=captions, out=tmp_path / "out", batch_size=4)
    assert encode.run(config) == {"captions": 2, "tokens": 13, "width": 16, "pooled": 0}
    texts = open_texts(tmp_path / "out")
    module, params = open_model(tmp_path / "text_encoder")
    ids = jnp.array([[*(byte + 3 for byte in b"a three"), 1]])
    last = module.apply({"params": params}, ids).last[0]
    found = texts.read(texts.index)
    np.testing.assert_allclose(found.tokens[2, :8], last, atol=5e-3)
    assert found.mask.sum(1).tolist() == [8, 13, 8]
    np.testing.assert_array_equal(found.tokens[2, 8:], 0)
    with pytest.raises(ValueError, match=r"Line 2 of .*captions.txt has 13 tokens.*drop its last 5 with --truncate"):
        encode.run(dataclasses.replace(config, max_tokens=8, out=tmp_path / "b"))
    with pytest.raises(ValueError, match=r"holds texts of another encoder or tokenizer .*: give another --out"):
        encode.run(dataclasses.replace(config, features="penultimate"))
    assert encode.run(config)["captions"] == 2
    read = encode.read_tokenizer

    def shifted(*args, **kwargs):
        """A tokenizer of the same lengths that counts letters from another one on."""
        of_bytes = read(*args, **kwargs)

        def tokenizer(prompts, truncate):
            ids, mask = of_bytes(prompts, truncate=truncate)
            return Tokens(np.where(ids > 2, ids + 1, ids), mask)

        return tokenizer

    monkeypatch.setattr(encode, "read_tokenizer", shifted)
    with pytest.raises(
        ValueError, match=r"encoder or tokenizer \('last, 13 tokens \w{16}, .* is 'last, 13 tokens \w{16}"
    ):
        encode.run(config)


@pytest.mark.parametrize("content", [b"a\xe2\x80\xa8b\xc2\x85c\x0cd\re\nf\n", b"a\xe2\x80\xa8b\xc2\x85c\x0cd\re\r\nf"])
def test_a_line_feed_alone_ends_a_caption(content, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    assert encode.read_captions(tmp_path / "a.txt") == ["a\u2028b\x85c\x0cd\re", "f"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "it is empty"), (b"a\n \nb", "line 2 is empty"), (b"\xff\xfe", "must be a text in UTF-8")],
)
def test_files_of_captions_that_are_refused(content, message, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        encode.read_captions(tmp_path / "a.txt")


def test_spaces_by_name(coded, tmp_path):
    latents = open_latents(coded / "latents")
    own = load(Data(encoded=coded / "latents", space="own"))
    assert (own.facts.latent_space, own.facts.mean) == (PIXELS, None)
    with pytest.raises(ValueError, match=r"latents in --space sd must be of unit variance.*--space measured brings"):
        load(Data(encoded=coded / "latents", space="sd"))
    scaled = write_latents(
        tmp_path,
        {"train": load(DIGITS).train},
        lambda x: (jnp.asarray(np.repeat(x, 4, -1)) * 8, None),
        autoencoder=None,
        batch_size=32,
        progress=False,
    )
    space = load(Data(encoded=scaled.folder, space="sd")).facts.latent_space
    assert space.scale == pytest.approx((SD.scale,) * 4)
    measured = load(Data(encoded=coded / "latents", num_images=10, labels="none"))
    assert measured.facts.latent_space == latents.measured()
    assert (measured.facts.num_images, measured.facts.class_names, measured.train.labels) == (10, (), None)


def test_runs_on_latents_that_are_refused(coded, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "train", lambda *_, **__: pytest.fail("trained"))
    plain = tmp_path / "plain"
    encode.run(encode.Config(DIGITS, coded / "autoencoder", plain, batch_size=32))
    with pytest.raises(ValueError, match=r"--flip needs the latents of mirrored images, which .* encode with --flip"):
        latent.run(small(tmp_path / "run", Data(encoded=plain), flip=True))
    record = json.loads((plain / "latents.json").read_bytes())
    record["about"]["autoencoder"] = "/gone"
    (plain / "latents.json").write_text(json.dumps(record))
    with pytest.raises(FileNotFoundError, match="The autoencoder is no longer at /gone: give --decoder"):
        latent.run(small(tmp_path / "run", Data(encoded=plain)))
    record["images"]["train"] = "other"
    (plain / "latents.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"The images that .* have changed since"):
        latent.run(small(tmp_path / "run", Data(encoded=plain, decoder=coded / "autoencoder")))
    with pytest.raises(FileNotFoundError, match=r"is not a folder of latents: it has no latents.json"):
        load(Data(encoded=tmp_path))
    lost = Data(encoded=tmp_path / "lost")  # a run is drawn from where its latents are no longer
    facts = load(Data(encoded=coded / "latents")).facts
    with pytest.raises(FileNotFoundError, match=r"Where the autoencoder is, is not known .*: give --autoencoder"):
        codec_of(lost, facts, "--autoencoder")
    assert codec_of(lost, facts, "--autoencoder", coded / "autoencoder") is not None
    assert codec_of(lost, dataclasses.replace(facts, autoencoder=None)) is None


def test_a_run_keeps_where_its_latents_are_as_it_is_found_from_anywhere(coded, monkeypatch):
    monkeypatch.chdir(coded)
    monkeypatch.setattr(images, "run", lambda config: config.data)
    data = latent.run(small(coded / "b", Data(encoded=Path("latents"), decoder=Path("autoencoder"))))
    assert (data.encoded, data.decoder) == (coded / "latents", coded / "autoencoder")


def test_a_smoke_run_whose_autoencoder_went_with_it_says_so(coded, tmp_path):
    write_facts(tmp_path, load(Data(encoded=coded / "latents")).facts)
    gone = small(tmp_path, Data(encoded=tmp_path / "gone"), smoke=True)
    with pytest.raises(FileNotFoundError, match=r"is a smoke run, and its latents .* are gone.*give --autoencoder"):
        codec_of_run(gone, "--autoencoder", None)
    assert codec_of_run(gone, "--autoencoder", coded / "autoencoder") is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "--autoencoder nowhere does not exist: give a folder or a file of safetensors"),
        ("pickle.pth", "is a pickle, .*python -m fm_jax.weights.convert"),
        ("text_encoder", "is a T5Encoder, and no autoencoder of pictures"),
    ],
)
def test_autoencoders_that_are_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "pickle.pth":
        Path(name).write_bytes(b"\x80\x04" + bytes(30) + b".")
    if name == "text_encoder":
        write_small_text_encoder(Path(name))
    with pytest.raises((WeightsError, FileNotFoundError), match=message):
        open_codec(Path(name), (8, 8, 1))


@pytest.mark.slow
def test_the_smoke_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = encode.run(encode.Config(out=tmp_path / "a", smoke=True))
    assert (found["shape"], found["captions"]) == ((4, 4, 4), 2)
    training = dataclasses.replace(latent.CONFIG.training, run_dir=tmp_path / "run")
    results = latent.run(dataclasses.replace(latent.CONFIG, smoke=True, training=training))
    assert results["floor"]["images"] == 20
    with pytest.raises(FileNotFoundError, match=r"run-smoke is a smoke run, and its latents .* are gone"):
        sample.run(sample.Config(tmp_path / "run-smoke", out=tmp_path / "a.png", num=1))


def typed(main, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments", *words.split()])
    monkeypatch.setattr(command_line, "use_cache", lambda: None)
    with pytest.raises(SystemExit) as error:
        main()
    return error.value.code


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (encode.main, "--dataset digits", "--autoencoder must be given, for images; or --text and --captions"),
        (encode.main, "--autoencoder a", "One of --dataset, .* must say which images: give one."),
        (encode.main, "--captions a --text b --flip", "--flip True would have no effect: --autoencoder is not given"),
        (encode.main, "--dataset digits --autoencoder a --truncate", "--truncate True would have no effect: --text is"),
        (encode.main, "--smoke --text a --captions b", "--text a would have no effect: --smoke has its own"),
        (encode.main, "--smoke --dataset digits", "--dataset digits would have no effect: --smoke has its own images"),
        (encode.main, "--dataset digits --autoencoder a --space sd", "--space sd would have no effect: --dataset"),
        (latent.main, "--run-dir a", "One of --dataset, .*--encoded must say which images: give one."),
        (latent.main, "--dataset digits --decoder a", "--decoder a would have no effect: --dataset does not take it"),
        (latent.main, "--encoded a --npz b", ""),
        (latent.main, "--encoded nowhere", "nowhere is not a folder of latents: it has no latents.json"),
        (latent.main, "--encoded nowhere --size 8", "--size 8 would have no effect: --encoded does not take it"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("--") else "",
)
def test_wrong_command_lines(main, words, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code = typed(main, words, monkeypatch)
    assert re.search(message, str(code)), code
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": Path("a")}, "--text, the encoder, and --captions, what it encodes, go together"),
        ({"data": Data(encoded=Path("a"))}, "--encoded names latents already: give images"),
        ({"batch_size": 0}, "--batch-size must be from 1 to 1000000, got 0"),
        ({"max_tokens": -1}, "--max-tokens must be from 1 to 1000000, got -1"),
    ],
)
def test_configurations_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        encode.Config(**options)
