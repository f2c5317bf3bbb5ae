"""What `experiments.sample` makes of a sentence and of a mask, and what it refuses in the words of its options."""

import gzip
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("tyro", reason="experiments need the extra fm_jax[experiments]")

from experiments import sample
from experiments.lab import prompts


@pytest.mark.parametrize("kind", ["words", "tokens"])
def test_a_prompt_that_is_too_long_is_told_of_no_option_that_is_not_there(kind, tmp_path):
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress(b"#version: 0.2\no n\non e</w>\n"))
    of_words = prompts.of_words(("one", "the"), 8, 8, frozen=False)
    reader = of_words if kind == "words" else prompts.of_clip_tokens(tmp_path / "bpe.txt.gz", ["one"], 8, frozen=False)
    experiment = SimpleNamespace(told=reader.tell)
    with pytest.raises(SystemExit, match=r"^--negative has \d+ tokens, .* and the limit is \d+: shorten it\.$"):
        sample._told("--negative", "one " * 90, experiment)
    with pytest.raises(SystemExit, match=r"^--prompt must be text, got half a character"):
        sample._told("--prompt", "one \udc80", experiment)


@pytest.mark.parametrize(
    ("left", "right", "alpha", "message"),
    [
        (0, 255, 255, None),
        (39, 216, None, None),  # as JPEG may leave it
        (255, 255, None, "is white everywhere: nothing of --image would be kept"),
        (0, 0, None, "is black everywhere: nothing would be drawn"),
        (0, 127, None, "must be black and white alone, got 8 of 16 pixels between: cut it at a threshold"),
        (191, 255, None, "must be black and white alone, got 8 of 16 pixels between"),
        (0, 255, 128, "is transparent in part, and must be opaque: lay it on a background"),
        (0, 255, 0, "is transparent in part"),
    ],
)
def test_a_mask_says_of_every_pixel_whether_it_is_drawn(left, right, alpha, message, tmp_path):
    pil = pytest.importorskip("PIL.Image", reason="pictures need the extra fm_jax[experiments]")
    grey = np.repeat(np.uint8([[left, left, right, right]]), 4, axis=0)
    bands = [grey] if alpha is None else [grey, grey, grey, np.where(grey == left, alpha, 255).astype(np.uint8)]
    pil.fromarray(np.stack(bands, -1).squeeze()).save(tmp_path / "mask.png")
    if message is None:
        np.testing.assert_array_equal(sample._drawn(tmp_path / "mask.png", (4, 4))[..., 0], grey > 127)
        return
    with pytest.raises(SystemExit, match=f"^--mask .*mask.png {message}"):
        sample._drawn(tmp_path / "mask.png", (4, 4))


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("grey.png", 1, None),
        ("nearly_grey.png", 1, None),
        ("colours.png", 3, None),
        ("colours.png", 1, "must be grey, and has colours: make it grey before"),
        ("half.png", 3, "is transparent in part, and must be opaque: lay it on a background"),
        ("film.gif", 3, "must be one picture, got one of several frames or pages: save one of them"),
        ("wide.png", 1, "must be 4x4, as the samples of the run, got 4x5"),
    ],
)
def test_a_picture_is_kept_as_it_is_or_refused(name, channels, message, tmp_path):
    pil = pytest.importorskip("PIL.Image", reason="pictures need the extra fm_jax[experiments]")
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    grey = np.repeat(colours[..., :1], 3, axis=2)
    pictures = {
        "grey.png": grey,
        "nearly_grey.png": np.minimum(grey, 250) + np.uint8([0, 3, 5]),
        "colours.png": colours,
        "half.png": np.dstack([colours, np.full((4, 4), 100, np.uint8)]),
        "wide.png": np.zeros((4, 5), np.uint8),
    }
    path = tmp_path / name
    if name == "film.gif":
        first, second = (pil.fromarray(each) for each in (colours, 255 - colours))
        first.save(path, save_all=True, append_images=[second])
    else:
        pil.fromarray(pictures[name]).save(path)
    shape = (4, 4, channels)
    if message is None:
        found = sample._read("--image", path, shape)
        wanted = pictures[name] if channels == 3 else pictures[name][..., :1]
        assert np.abs(found.astype(int) - wanted).max() <= 5 * ("nearly" in name)
        return
    with pytest.raises(SystemExit, match=f"^--image .*{name} {message}"):
        sample._read("--image", path, shape)
