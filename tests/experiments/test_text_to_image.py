"""Composed digits: scenes, sentences, their judge, and the experiment from training to a prompt."""

import dataclasses
import gzip
import importlib
import itertools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("tyro", reason="experiments need the extra fm_jax[experiments]")

from experiments import export, learned_solver, sample, text_to_image
from experiments.lab import prompts
from experiments.lab.data import write_facts
from experiments.lab.experiment import Experiment, read_run
from experiments.lab.scene_judge import fit_judge, judge_of
from experiments.lab.scenes import (
    TEMPLATES,
    Canvas,
    Meaning,
    SceneBatches,
    Sentences,
    by_digit,
    describe,
    is_held_out,
)
from experiments.lab.training import write_config
from fm_jax.data.digits import load_digits
from fm_jax.data.texts import TextBatch, write_texts
from fm_jax.train.checkpoint import CheckpointError

CANVAS = Canvas(16, 8, colours=False)
# Of each "digit" one picture: as many bright rows as it says, above a bright edge.
BARS = [np.concatenate([np.ones((1, 1, 8)), np.repeat([[[i < d] * 8 for i in range(7)]], 1, 0)], 1) for d in range(10)]


def test_ten_ordered_pairs_are_held_out_and_none_of_equal_digits():
    meanings = [Meaning(a, b, relation) for a, b, relation in itertools.product(range(10), range(10), range(4))]
    held_out = {tuple(digit for digit, _ in each.places()) for each in meanings if is_held_out(each)}
    assert len(held_out) == 10
    assert all(a != b for a, b in held_out)
    # What is held out is a matter of what is where, not of how it is said.
    assert all(is_held_out(Meaning(*pair, 0)) == is_held_out(Meaning(*pair[::-1], 1)) for pair in held_out)


def test_a_sentence_and_its_inverse_say_the_same():
    meaning = Meaning(3, 7, 0, 0, 4)
    assert describe(meaning, TEMPLATES[0]) == "a red three left of a blue seven"
    assert describe(meaning, TEMPLATES[2]) == "a blue seven with a red three to its left"
    assert meaning.places() == Meaning(7, 3, 1, 4, 0).places() == ((3, 0), (7, 4))
    assert meaning.swapped.places() == ((7, 4), (3, 0))


@pytest.mark.parametrize("canvas", text_to_image.CANVASES.values(), ids=text_to_image.CANVASES)
def test_every_word_of_every_sentence_is_in_the_vocabulary_and_no_other(canvas):
    sentences = canvas.all_sentences(held_out=True)
    assert {word for sentence in sentences for word in sentence.split()} == set(canvas.words)
    told = prompts.of_words(canvas.words, text_to_image.LONGEST, 8, frozen=False).tell(sentences)
    assert told.mask.sum(axis=1).max() <= text_to_image.LONGEST


@pytest.fixture(scope="module")
def real():
    """scikit-learn's digits of both splits."""
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    found = {split: load_digits(split) for split in ("train", "test")}
    return {split: by_digit((x.images[..., 0] + 1) / 2, x.labels) for split, x in found.items()}


def test_digits_are_where_the_sentence_says(real):
    rng = np.random.default_rng(0)
    meanings = CANVAS.draw_meanings(rng, 64)
    scenes = CANVAS.draw(rng, meanings, real["train"])
    assert scenes.shape == (64, *CANVAS.shape)
    assert scenes.min() == -1.0
    for scene, meaning in zip(scenes, meanings, strict=True):
        ink = scene[..., 0].T if meaning.vertical else scene[..., 0]
        for columns in (slice(0, 8), slice(8, 16)):
            rows = np.flatnonzero((ink[:, columns] > -1).any(axis=1))
            assert 0 < rows[-1] - rows[0] + 1 <= 8


def test_colours_are_those_of_the_sentence():
    canvas = Canvas(32, 8, colours=True)
    meaning = Meaning(3, 7, 2, 0, 4)  # a red one above a blue one
    (scene,) = canvas.draw(np.random.default_rng(0), [meaning], BARS)
    assert (scene[:16, :, 0] == 1).any()
    assert (scene[:16, :, 1:] == -1).all()
    assert (scene[16:, :, 2] == 1).any()
    assert (scene[16:, :, :2] == -1).all()


def test_the_shares_of_processes_are_one_batch_and_a_position_goes_on(real):
    sentences = Sentences(prompts.of_words(CANVAS.words, 16, 8, frozen=False).tell, CANVAS)

    def batches(size, **processes):
        return SceneBatches(CANVAS, real["train"], sentences, 3, size, **processes)

    whole, parts = batches(8), [batches(4, process_index=i, process_count=2) for i in range(2)]
    for _ in range(2):
        one, shares = next(whole), [next(part) for part in parts]
        jax.tree.map(lambda a, *b: np.testing.assert_array_equal(a, np.concatenate(b)), one, *shares)
    later = batches(8)
    later.set_state(json.loads(json.dumps(parts[0].get_state())))
    jax.tree.map(np.testing.assert_array_equal, next(later), next(whole))


def test_a_batch_holds_no_held_out_pair_and_its_sentences_say_what_it_shows():
    told = CANVAS.all_sentences()
    sentences = Sentences(lambda texts: np.array([told.index(text) for text in texts]), CANVAS)
    batch = next(SceneBatches(CANVAS, BARS, sentences, 0, 256))
    meanings = CANVAS.draw_meanings(np.random.default_rng((0, 1)), 256, held_out=False)
    assert not any(map(is_held_out, meanings))
    for number, meaning in zip(batch["cond"], meanings, strict=True):
        assert told[number] in [describe(meaning, template) for template in TEMPLATES]


def test_the_judge_knows_real_scenes_and_what_they_are_not(real):
    judge = fit_judge(CANVAS, real["train"], num_steps=12)
    rng = np.random.default_rng(1)
    meanings = CANVAS.draw_meanings(rng, 200)
    scenes = CANVAS.draw(rng, meanings, real["test"])
    assert judge(scenes, meanings).shares()["all"] > 0.9
    different = [i for i, each in enumerate(meanings) if each.first != each.second]
    swapped = judge(scenes[different], [meanings[i].swapped for i in different])
    assert swapped.all_correct.mean() < 0.05
    across = judge(scenes, [each._replace(relation=(each.relation + 2) % 4) for each in meanings])
    assert across.all_correct.mean() < 0.1
    blank = judge(np.full_like(scenes, -1.0), meanings)
    assert not blank.all_correct.any()
    assert not blank.relation.any()


def test_the_judge_sees_colours():
    canvas = Canvas(32, 8, colours=True)
    rng = np.random.default_rng(0)
    meanings = canvas.draw_meanings(rng, 100)
    digits = np.array([[digit for digit, _ in each.places()] for each in meanings])

    def classify(crops):  # as many bright rows as the digit says, and one
        return (crops[..., 0].max(axis=2) > 0).sum(axis=1) - 1

    judge = judge_of(canvas, classify)
    scenes = canvas.draw(rng, meanings, BARS)
    whole = digits.max(axis=1) < 8  # taller ones do not fit
    assert judge(scenes, meanings).colours.all()
    assert judge(scenes, meanings).digits[whole].mean() > 0.9
    other = [each._replace(first_colour=(each.first_colour + 1) % 6) for each in meanings]
    assert not judge(scenes, other).all_correct.any()


MERGES = ["t h", "th e</w>", "o n", "on e</w>", "l e", "le f", "lef t</w>", "a b"]


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "bpe.txt.gz"
    path.write_bytes(gzip.compress(("#version: 0.2\n" + "\n".join(MERGES) + "\n").encode()))
    return path


def test_tokens_of_clip_are_numbered_anew_and_unknown_ones_refused(clip_file):
    sentences = ["the one left", "one the"]
    reader = prompts.of_clip_tokens(clip_file, sentences, 8, frozen=False)
    ids, mask = reader.tell(["one left", "", "THE ONE LEFT"])
    assert ids.max() <= 4
    assert mask.sum(axis=1).tolist() == [4, 2, 5]
    assert len(set(ids[mask].tolist())) == 5
    with pytest.raises(ValueError, match=r"prompt 1 has a word that the network has never seen, 'above'"):
        reader.tell(["one", "one above"])
    with pytest.raises(ValueError, match=r"prompt 0 has 6 tokens, and the longest sentence of the training 5"):
        reader.tell(["one the one the"])


def encode_sentences(folder, seed, canvas=CANVAS):
    """Features of all sentences of a canvas, as by an encoder that the seed tells from others."""
    pytest.importorskip("array_record", reason="needs the extra fm_jax[data]")
    rng, length = np.random.default_rng(seed), text_to_image.LONGEST

    def encode(captions):
        mask = np.arange(length) < np.array([len(caption.split()) for caption in captions])[:, None]
        tokens = rng.normal(size=(len(captions), length, 8)).astype(np.float32)
        return TextBatch(tokens, mask, tokens[:, 0])

    shutil.rmtree(folder, ignore_errors=True)
    sentences, sizes = canvas.all_sentences(held_out=True), {"batch_size": 256, "shard_size": 1024}
    write_texts(folder, sentences, encode, encoder=str(seed), with_padding=True, progress=False, **sizes)


@pytest.mark.parametrize("kind", ["encoded_text", "clip_tokens"])
def test_a_run_knows_what_its_sentences_were_read_by(kind, clip_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(seed):
        if kind == "encoded_text":
            encode_sentences(Path("texts"), seed)
        else:
            Path("texts").write_bytes(gzip.compress(("\n".join(MERGES[: 4 + seed]) + "\n").encode()))

    write(0)
    training = dataclasses.replace(text_to_image.CONFIG.training, run_dir=tmp_path / "run")
    config = dataclasses.replace(text_to_image.CONFIG, training=training, **{kind: Path("texts")})
    told = []

    def learn(config, *args):
        write_config(config)
        write_facts(config.training.run_dir, args[-1])
        told.append(args[-1].identity())
        raise KeyboardInterrupt

    monkeypatch.setattr(prompts, "learn", learn)
    monkeypatch.setattr(Experiment, "init_params", lambda *_: {})
    for seed in (0, 1, 0):
        write(seed)
        with pytest.raises(KeyboardInterrupt):
            text_to_image.run(config)
    assert told[0] == told[2] != told[1]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    read_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    write(1)
    with pytest.raises(
        ValueError, match=r"texts has changed since .*run was trained with it.*\(SHA-256 [0-9a-f]{16}, and"
    ):
        read_run(tmp_path / "run")
    (tmp_path / "run" / "data.json").unlink()  # as of an older version: nothing to compare
    read_run(tmp_path / "run")
    (tmp_path / "run" / "data.json").write_text("[]")
    with pytest.raises(ValueError, match=r"data.json is damaged .* writes it anew"):
        read_run(tmp_path / "run")


@pytest.mark.slow
def test_a_run_does_not_go_on_with_features_of_another_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(text_to_image, "_MMDIT", text_to_image._MMDIT | text_to_image._SMALL_MMDIT)
    monkeypatch.setattr(text_to_image, "fit_judge", lambda *args, **_: fit_judge(*args, num_steps=4))
    encode_sentences(tmp_path / "texts", 0)
    training = dataclasses.replace(
        text_to_image.CONFIG.training, run_dir=tmp_path / "run", total_steps=2, batch_size=8, decay="constant"
    )
    sampling = dataclasses.replace(text_to_image.CONFIG.sampling, solver="euler", steps=2, sample_batch=8)
    config = dataclasses.replace(
        text_to_image.CONFIG,
        model="mmdit",
        method=dataclasses.replace(text_to_image.CONFIG.method, first_steps=1),
        training=training,
        sampling=sampling,
        num_samples=8,
        encoded_text=tmp_path / "texts",
    )
    text_to_image.run(config)
    encode_sentences(tmp_path / "texts", 1)
    longer = dataclasses.replace(config, training=dataclasses.replace(training, total_steps=3))
    with pytest.raises(
        CheckpointError, match=r"comes from a run on other data: checksum of what sentences are read as"
    ):
        text_to_image.run(longer)
    encode_sentences(tmp_path / "texts", 0)
    text_to_image.run(longer)


def test_without_dropout_of_the_text_there_is_no_guidance():
    with pytest.raises(ValueError, match=r"--text-dropout must be above 0 for --guidance 2.5"):
        dataclasses.replace(text_to_image.CONFIG, text_dropout=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["unet", "mmdit"])
def test_from_training_to_a_prompt(model, tmp_path, capsys):
    training = dataclasses.replace(text_to_image.CONFIG.training, run_dir=tmp_path / "run")
    config = dataclasses.replace(text_to_image.CONFIG, smoke=True, model=model, training=training)
    results = text_to_image.run(config)
    assert results["guided"]["nfe"] == 2 * results["unguided"]["nfe"]
    assert results["real"]["all"] > 0.5
    out = tmp_path / "a.npz"

    def draw(**options):
        sample.run(sample.Config(run=tmp_path / "run-smoke", out=out, num=2, **options))
        return np.load(out)

    found = draw(prompt="a three left of a seven", negative="a two above a two")
    assert found["samples"].shape == (2, 16, 16, 1)
    assert str(found["prompt"]) == "a three left of a seven"
    for options, message in (
        ({}, "--prompt must be given"),
        ({"prompt": "a dog"}, "--prompt has a word that the network has never seen, 'dog'"),
        ({"prompt": "a three", "negative": "a dog"}, "--negative has a word"),
        ({"label": 3}, "--class is for runs with classes"),
        ({"prompt": "a three", "avoid": 3}, "--avoid needs a run with classes"),
        ({"prompt": "a three", "image": tmp_path / "none.png", "strength": 0.5}, "does not exist"),
    ):
        with pytest.raises(SystemExit, match=message):
            draw(**options)
    for other in (export.Config(run=tmp_path / "run-smoke"), learned_solver.Config(run=tmp_path / "run-smoke")):
        with pytest.raises(SystemExit, match="was trained on sentences"):
            importlib.import_module(type(other).__module__).run(other)


@pytest.mark.slow
def test_a_part_that_is_known_is_kept(tmp_path):
    pil = pytest.importorskip("PIL.Image", reason="pictures need the extra fm_jax[experiments]")
    training = dataclasses.replace(text_to_image.CONFIG.training, run_dir=tmp_path / "run")
    text_to_image.run(dataclasses.replace(text_to_image.CONFIG, smoke=True, training=training))
    picture, mask = np.arange(256).reshape(16, 16).astype(np.uint8), np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    pil.fromarray(picture).save(tmp_path / "picture.png")
    pil.fromarray(mask).save(tmp_path / "mask.png")
    pil.fromarray(mask[:8]).save(tmp_path / "small.png")
    options = {"run": tmp_path / "run-smoke", "num": 2, "prompt": "a three left of a seven", "out": tmp_path / "a.npz"}
    options |= {"image": tmp_path / "picture.png", "solver": "euler", "steps": 2}
    sample.run(sample.Config(**options, mask=tmp_path / "mask.png"))
    samples = np.load(tmp_path / "a.npz")["samples"][..., 0]
    np.testing.assert_allclose(samples[:, :, :8], np.tile(picture[:, :8] / 127.5 - 1, (2, 1, 1)), atol=1e-6)
    assert np.abs(samples[0, :, 8:] - samples[1, :, 8:]).max() > 0.1
    near, far = [], []
    for strength, found in ((0.1, near), (1.0, far)):
        sample.run(sample.Config(**options, strength=strength))
        found.append(np.abs(np.load(tmp_path / "a.npz")["samples"][..., 0] - (picture / 127.5 - 1)).mean())
    assert near[0] < 0.3 < far[0]
    with pytest.raises(SystemExit, match=r"--mask .*small.png must be 16x16, as the samples of the run, got 8x16"):
        sample.run(sample.Config(**options, mask=tmp_path / "small.png"))
    with pytest.raises(SystemExit, match="is random and would not keep what is known"):
        sample.run(sample.Config(**(options | {"solver": "euler_maruyama"}), mask=tmp_path / "mask.png"))
