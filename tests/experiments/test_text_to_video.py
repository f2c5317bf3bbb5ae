"""Moving digits: clips, sentences, their judge, and the experiment from training to its results."""

import dataclasses
import functools
import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tyro", reason="experiments need the extra fm_jax[experiments]")

from experiments import text_to_video
from experiments.lab.moving import (
    HELD_OUT_TEMPLATE,
    STEPS,
    TEMPLATES,
    WAYS,
    ClipBatches,
    Motion,
    Stage,
    describe,
    describe_picture,
    is_held_out,
    most_words,
    quoted,
    words_of,
)
from experiments.lab.moving_judge import fit_judge, judge_of, track, velocities, ways
from experiments.lab.scenes import by_digit
from fm_jax.data.digits import load_digits
from fm_jax.models import make_videodit
from fm_jax.models.conditioning import Conditions
from fm_jax.models.videodit import FactorisedPositions

STAGE = text_to_video.STAGES["digits"]
TWO = text_to_video.STAGES["mnist"]
# Of each "digit" one picture: a disc, of a brightness that is its own.
_Y, _X = np.mgrid[:14, :14] - 6.5
DISCS = [(0.4 + 0.06 * digit) * (_X**2 + _Y**2 < 25)[None].astype(np.float32) for digit in range(10)]


def motions(stage, ways=range(8)):
    return [Motion(*each) for each in itertools.product(range(10), ways, range(2) if stage.paces else (None,))]


def test_one_way_of_eight_is_held_out_for_each_digit():
    held_out = [(motion.digit, motion.way) for motion in motions(STAGE) if is_held_out(motion)]
    assert len(held_out) == len({digit for digit, _ in held_out}) == 10
    assert len({way for _, way in held_out}) == 8  # no direction is new, nor a digit: only the two together


def test_sentences_say_what_there_is():
    meaning = (Motion(3, WAYS.index("up")), Motion(7, WAYS.index("down left"), 1))
    assert describe(meaning, TEMPLATES[0]) == "a three moves up while a fast seven moves down left"
    assert describe(meaning, TEMPLATES[2]) == "up goes a three while down left goes a fast seven"
    assert describe(meaning, HELD_OUT_TEMPLATE) == "a three goes up while a fast seven goes down left"
    assert quoted(describe(meaning, TEMPLATES[1])) == quoted(describe_picture(meaning)) == '"three" "seven"'
    assert quoted("") == ""


@pytest.mark.parametrize("stage", [STAGE, TWO], ids=["one", "two"])
def test_every_word_of_every_sentence_is_in_the_vocabulary_and_no_other(stage):
    pairs = [(motion,) * stage.num_digits for motion in motions(stage)]
    pairs += [(*pair[1:], motions(stage)[0]) for pair in pairs if stage.num_digits == 2]
    sentences = [describe(pair, template) for pair in pairs for template in (*TEMPLATES, HELD_OUT_TEMPLATE)]
    sentences += map(describe_picture, pairs)
    assert {word for each in sentences for word in each.split()} == set(words_of(stage.num_digits, stage.paces))
    assert max(len(each.split()) for each in sentences) == most_words(stage.num_digits, stage.paces)


@pytest.mark.parametrize("way", range(8), ids=[way.replace(" ", "_") for way in WAYS])
def test_a_digit_goes_the_way_that_is_said(way):
    clips = STAGE.draw(np.random.default_rng(way), [(Motion(4, way),)] * 5, [disc[:, 3:11, 3:11] for disc in DISCS])
    centres = track(STAGE, clips).centres[:, :, 0]
    np.testing.assert_allclose(np.diff(centres, axis=1), np.broadcast_to(STEPS[way], (5, 7, 2)), atol=1e-5)
    names = WAYS[way].split()
    said = [{"up": -1, "down": 1}.get(names[0], 0), {"left": -1, "right": 1}.get(names[-1], 0)]
    assert said == STEPS[way].tolist()  # rows count downwards


def test_walls_are_met_after_the_straight_part_and_turn_a_digit_back():
    stage = Stage(20, 8, 12, speeds=(2.0,))
    assert stage.straight == 7
    (at,) = {tuple(stage.places(np.random.default_rng(seed), (Motion(0, 0),))[:, 0, 1]) for seed in range(9)}
    assert at == (0, 2, 4, 6, 8, 10, 12, 10, 8, 6, 4, 2)
    assert STAGE.straight == STAGE.frames  # the small clips meet none


def test_any_two_digits_find_a_way_on_which_they_stay_apart_and_inside():
    rng = np.random.default_rng(0)
    pairs = itertools.product([motion for motion in motions(TWO) if motion.digit == 0], repeat=2)
    for meaning in pairs:
        places = TWO.places(rng, meaning)
        assert places.shape == (8, 2, 2)
        assert places.min() >= 0
        assert places.max() <= 32 - 14
        assert np.abs(places[:, 0] - places[:, 1]).max(axis=1).min() >= TWO.apart
    with pytest.raises(ValueError, match=r"frames must be at most 9 for two digits to keep 10 pixels apart, got 10"):
        dataclasses.replace(TWO, frames=10)


@pytest.fixture(scope="module")
def real():
    """scikit-learn's digits of both splits."""
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    found = {split: load_digits(split) for split in ("train", "test")}
    return {split: by_digit((x.images[..., 0] + 1) / 2, x.labels) for split, x in found.items()}


def test_the_shares_of_processes_are_one_batch_and_a_position_goes_on(real):
    tell = text_to_video.build(text_to_video.CONFIG).told

    def batches(size, **processes):
        return ClipBatches(STAGE, real["train"], tell, 3, size, picture_every=2, **processes)

    whole, parts = batches(4), [batches(2, process_index=i, process_count=2) for i in range(2)]
    shapes = []
    for _ in range(2):
        one, shares = next(whole), [next(part) for part in parts]
        jax.tree.map(lambda a, *b: np.testing.assert_array_equal(a, np.concatenate(b)), one, *shares)
        shapes.append(one["x1"].shape)
    assert shapes == [(4, 8, 16, 16, 1), (32, 1, 16, 16, 1)]  # as many patches
    later = batches(4)
    later.set_state(json.loads(json.dumps(parts[0].get_state())))
    jax.tree.map(np.testing.assert_array_equal, next(later), next(whole))


@pytest.mark.parametrize("stage", [STAGE, dataclasses.replace(TWO, frames=3)], ids=["one", "two"])
def test_a_batch_holds_nothing_held_out_and_its_sentences_say_what_it_shows(stage):
    discs = DISCS if stage.digit == 14 else [disc[:, 3:11, 3:11] for disc in DISCS]
    batches = ClipBatches(stage, discs, np.array, 0, 32, picture_every=2)  # told the sentences themselves
    clips, pictures = next(batches), next(batches)
    for step, batch in ((1, clips), (2, pictures)):
        held_out = False if step == 1 else None
        num = len(batch["x1"])
        meanings = stage.draw_meanings(np.random.default_rng((0, step)), num, held_out=held_out)
        allowed = [
            [describe(each, template) for template in TEMPLATES] if step == 1 else [describe_picture(each)]
            for each in meanings
        ]
        assert all(text in each for text, each in zip(batch["cond"], allowed, strict=True))
        brightest = batch["x1"].max(axis=(1, 2, 3, 4))
        digits = [max(motion.digit for motion in each) for each in meanings]
        np.testing.assert_allclose((brightest + 1) / 2, [0.4 + 0.06 * digit for digit in digits], atol=1e-6)
        if step == 1:
            assert not any(is_held_out(motion) for each in meanings for motion in each)
    assert pictures["x1"].shape[1] == 1


@pytest.fixture(scope="module")
def judge(real):
    return fit_judge(STAGE, real["train"], num_steps=8)


def test_the_judge_knows_real_clips_and_what_they_are_not(real, judge):
    rng = np.random.default_rng(1)
    meanings = STAGE.draw_meanings(rng, 60)
    clips = STAGE.draw(rng, meanings, real["test"])
    verdict = judge(clips, meanings)
    assert verdict.direction.all()
    assert verdict.shares()["both"] > 0.9
    assert verdict.shares()["consistency"] > 0.95
    other = judge(clips, [(each[0]._replace(digit=(each[0].digit + 1) % 10),) for each in meanings])
    assert other.identity.mean() < 0.1
    assert other.direction.all()
    turned = judge(clips, [(each[0]._replace(way=(each[0].way + 1) % 8),) for each in meanings])
    assert not turned.direction.any()
    np.testing.assert_array_equal(turned.identity, verdict.identity)
    back = judge(clips[:, ::-1], [(each[0]._replace(way=(each[0].way + 4) % 8),) for each in meanings])
    assert back.direction.all()


def test_the_judge_knows_two_digits_that_keep_apart(real):
    two = Stage(24, 8, 6, num_digits=2, apart=8)
    rng = np.random.default_rng(1)
    meanings = two.draw_meanings(rng, 60)
    verdict = fit_judge(two, real["train"], num_steps=8)(two.draw(rng, meanings, real["test"]), meanings)
    assert verdict.shares()["identity"] > 0.8
    assert verdict.shares()["direction"] > 0.9
    with pytest.raises(ValueError, match=r"apart must be 0 for a single digit, got 8\."):
        dataclasses.replace(two, num_digits=1)


def test_what_vanishes_stands_still_or_is_spread_is_not_right(real, judge):
    rng = np.random.default_rng(2)
    meanings = STAGE.draw_meanings(rng, 20)
    clips = STAGE.draw(rng, meanings, real["test"])
    gone, still, spread = clips.copy(), np.repeat(clips[:, :1], 8, axis=1), clips.copy()
    gone[:, 5] = -1
    spread[:, :, :3] = np.maximum(spread[:, :, :3], 0)
    assert not judge(gone, meanings).identity.any()
    assert not judge(still, meanings).direction.any()
    assert judge(spread, meanings).identity.mean() < 0.5
    assert not judge(np.full_like(clips, -1), meanings).both.any()
    # Half of the frames are of another digit.
    mixed, others = clips.copy(), np.roll(clips, 1, axis=0)
    mixed[:, ::2] = others[:, ::2]
    different = [i for i, each in enumerate(meanings) if each[0].digit != meanings[i - 1][0].digit]
    assert judge(mixed, meanings).consistency[different].mean() < 0.7


def test_two_digits_are_followed_and_each_is_paired_with_its_name():
    rng = np.random.default_rng(0)
    meanings = TWO.draw_meanings(rng, 40)
    clips = TWO.draw(rng, meanings, DISCS)
    digits = np.array([[motion.digit for motion in each] for each in meanings])
    # All discs look like a three to this classifier.
    judge = judge_of(TWO, lambda crops: np.full(len(crops), 3))
    verdict = judge(clips, meanings)
    assert verdict.direction.mean() > 0.95
    assert verdict.pace.mean() > 0.95
    np.testing.assert_array_equal(verdict.identity.sum(axis=1) >= 1, (digits == 3).any(axis=1))
    swapped = judge(clips, [each[::-1] for each in meanings])
    assert swapped.shares()["direction"] == verdict.shares()["direction"]
    # "a three moves up while a seven moves left" is not "a seven moves up while a three moves left".
    crossed = [(a._replace(digit=b.digit), b._replace(digit=a.digit)) for a, b in meanings]
    apart = [i for i, (a, b) in enumerate(meanings) if a.digit != b.digit and a[1:] != b[1:] and 3 in (a[0], b[0])]
    assert apart
    other = judge(clips, crossed)
    three = digits[apart] == 3
    assert (verdict.identity[apart] & verdict.direction[apart])[three].mean() > 0.9
    assert not (other.identity[apart] & other.direction[apart]).all(axis=1).any()


def test_velocities_are_those_of_a_straight_line_and_ways_their_sectors():
    velocity = np.array([[[0.5, -1.5]]])
    centres = np.arange(6)[None, :, None, None] * velocity[:, None] + 3.0
    np.testing.assert_allclose(velocities(centres), velocity)
    assert not velocities(centres[:, :1]).any()
    assert ways(STEPS.astype(float)).tolist() == list(range(8))
    angles = np.pi / 4 * (np.arange(8)[:, None] + np.array([-0.49, 0.49]))
    assert (ways(np.stack([-np.sin(angles), np.cos(angles)], axis=-1)) == np.arange(8)[:, None]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 17}, r"--num-frames must be at most 16, for which the network has positions, got 17"),
        (
            {"num_frames": 12, "dataset": "mnist"},
            r"--num-frames does not fit --dataset mnist: frames must be at most 9",
        ),
        ({"num_frames": 1}, r"--num-frames must be from 2 to .*, got 1"),
        ({"encoders": 4}, r"--encoders must be .*3, got 4"),
        ({"picture_every": -1}, r"--picture-every must be from 0 to .*, got -1"),
        ({"text_dropout": 0.0}, r"--text-dropout must be above 0 for --guidance 2.5"),
        ({"dataset": "cifar10"}, r"--dataset must be one of 'digits', 'mnist', got 'cifar10'"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(text_to_video.CONFIG, **options)


def test_clips_and_pictures_are_not_stacked_in_one_call(tmp_path):
    training = dataclasses.replace(text_to_video.CONFIG.training, run_dir=tmp_path, steps_per_call=2)
    with pytest.raises(ValueError, match=r"--steps-per-call must be 1 where clips and pictures alternate, got 2"):
        text_to_video.run(dataclasses.replace(text_to_video.CONFIG, training=training))


@pytest.fixture(scope="module", params=[2, 3])
def experiment(request):
    return text_to_video.build(dataclasses.replace(text_to_video.CONFIG, smoke=True, encoders=request.param))


def test_a_network_is_told_of_words_and_letters_and_refuses_what_it_cannot_know(experiment):
    told = experiment.told(["A three moves up."])
    assert list(told) == ["words", "letters", "more_words"][: len(told)]
    assert bytes(np.asarray(told["letters"].ids[0] - 3)[:7].astype(np.uint8)) == b'"three"'
    assert all(each.mask.any(axis=1).all() for each in experiment.null_cond.values())  # the empty prompt is its end
    with pytest.raises(ValueError, match=r"prompt 1 has a word that the network has never seen, 'ten'"):
        experiment.told(["a three", "a ten moves up"])
    with pytest.raises(ValueError, match=r"prompt 0 has \d+ tokens"):
        experiment.told(["a three moves up while a seven moves left".replace("while", "a")])


@pytest.mark.slow_but_one
def test_the_network_takes_clips_and_pictures_and_no_more_frames_than_it_has_positions_for(experiment):
    params = jax.eval_shape(experiment.init_params, jax.random.key(0))
    told = jax.tree.map(jnp.asarray, experiment.told(["a three moves up", "a seven"]))

    apply = functools.partial(experiment.apply_fn, train=False, rngs=None)

    def shape_of(frames):
        x = jax.ShapeDtypeStruct((2, frames, 16, 16, 1), jnp.float32)
        return jax.eval_shape(lambda p, x: apply(p, jnp.zeros(2), x, told), params, x).shape

    assert [shape_of(frames) for frames in (1, 16)] == [(2, frames, 16, 16, 1) for frames in (1, 16)]
    with pytest.raises(ValueError, match=r"at most positions=\(16, 4, 4\) patches, got \(17, 4, 4\)"):
        shape_of(17)


def test_positions_start_as_large_as_is_asked():
    asked = []

    def look(call, args, kwargs, context):
        if isinstance(context.module, FactorisedPositions):
            asked.append(context.module)
        return call(*args, **kwargs)

    x, cond = jnp.zeros((1, 1, 2, 2, 4)), Conditions(tokens={"words": jnp.zeros((1, 1, 32))})
    for options in ({}, {"position_std": 0.5}):
        with nn.intercept_methods(look):
            jax.eval_shape(make_videodit("tiny", num_layers=1, **options).init, jax.random.key(0), 0.0, x, cond)
    for module, std in zip(asked, (0.02, 0.5), strict=True):
        tables = module.clone(parent=None).init(jax.random.key(0), (1, 1, 1))["params"].values()
        assert float(np.std(np.concatenate([np.ravel(table) for table in tables]))) == pytest.approx(std, rel=0.05)
    with pytest.raises(ValueError, match=r"position_std must be positive and finite, got 0"):
        make_videodit("tiny", position_std=0.0)


def test_clips_are_animated_above_their_captions(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pictures need the extra fm_jax[experiments]")
    figures = pytest.importorskip("experiments.lab.figures", reason="pictures need the extra fm_jax[experiments]")
    clips = np.full((3, 4, 16, 16, 1), -1, np.float32)
    clips[1, 2] = 1
    figures.save_clips(tmp_path / "a.gif", clips, ["a three moves up", "a seven", ""], columns=2)
    with image.open(tmp_path / "a.gif") as found:
        assert found.n_frames == 3  # equal frames are one that stays longer
        bright = []
        for k in range(found.n_frames):
            found.seek(k)
            bright.append(np.asarray(found.convert("L")).mean())
    assert bright[1] > bright[0] == pytest.approx(bright[2], abs=0.5)


@pytest.mark.slow
def test_from_training_to_results(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    training = dataclasses.replace(text_to_video.CONFIG.training, run_dir=tmp_path / "run")
    config = dataclasses.replace(text_to_video.CONFIG, smoke=True, encoders=3, training=training)
    results = text_to_video.run(config)
    assert results["guided"]["nfe"] == 2 * results["unguided"]["nfe"]
    assert results["real"]["both"] > 0.5 > results["chance"]["both"]
    assert {"seen", "held_out_pairs", "held_out_template", "pictures"} < set(results["guided"])
    names = {path.name for path in (tmp_path / "run-smoke").iterdir()}
    assert {"samples.gif", "samples.png", "loss.png", "results.json", "config.json"} < names
    assert "3 encoders" in capsys.readouterr().out
