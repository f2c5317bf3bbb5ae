"""Features of captions in records: each once, and a pass that is killed."""

import numpy as np
import pytest

pytest.importorskip("array_record", reason="needs the extra fm_jax[data]")

from fm_jax.data.texts import TextBatch, open_texts, write_texts

CAPTIONS = ["a red three", "a blue seven", "a red three", "seven", "a blue seven on a red three", "seven"]
OPTIONS = {"encoder": "ab12", "batch_size": 2, "shard_size": 2, "progress": False}


def features(caption):
    """Six tokens of five features that know their caption and their place; the length is the number of words."""
    seed = [ord(letter) for letter in caption]
    return np.random.default_rng(seed).normal(size=(8, 5)).astype(np.float32), len(caption.split())


def encode(captions, pooled=True):
    tokens, lengths = zip(*map(features, captions), strict=True)
    mask = np.arange(8) < np.array(lengths)[:, None]
    return TextBatch(np.stack(tokens), mask, np.stack(tokens)[:, 0, :3] if pooled else None)


@pytest.mark.parametrize("with_padding", [True, False])
def test_each_caption_once(with_padding, tmp_path):
    calls = []
    texts = write_texts(
        tmp_path, CAPTIONS, lambda c: (calls.append(c), encode(c))[1], with_padding=with_padding, **OPTIONS
    )
    assert texts.captions == ("a red three", "a blue seven", "seven", "a blue seven on a red three")
    assert texts.index.tolist() == [0, 1, 0, 2, 3, 2]
    assert len(calls) == 3  # a look, and two batches
    found = texts.read(texts.index[[4, 0, 2]])
    for i, n in enumerate((4, 0, 2)):
        tokens, length = features(CAPTIONS[n])
        kept = 8 if with_padding else length
        np.testing.assert_array_equal(found.tokens[i, :kept], tokens[:kept].astype(np.float16).astype(np.float32))
        np.testing.assert_array_equal(found.tokens[i, kept:], 0)
        np.testing.assert_array_equal(found.mask[i], np.arange(8) < length)
        np.testing.assert_array_equal(found.pooled[i], tokens[0, :3])
    with pytest.raises(ValueError, match=r"numbers must be \[batch\] from 0 to 3, got"):
        texts.read(np.array([4]))


def test_a_pass_that_is_killed_goes_on_to_the_same_bits(tmp_path):
    whole = write_texts(tmp_path / "a", CAPTIONS, encode, with_padding=True, **OPTIONS)
    calls = []

    def killed(captions):
        calls.append(captions)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return encode(captions)

    with pytest.raises(KeyboardInterrupt):
        write_texts(tmp_path / "b", CAPTIONS, killed, with_padding=True, **OPTIONS)
    with pytest.raises(ValueError, match="texts that are not finished"):
        open_texts(tmp_path / "b")
    calls.clear()
    write_texts(tmp_path / "b", CAPTIONS, lambda c: (calls.append(c), encode(c))[1], with_padding=True, **OPTIONS)
    assert len(calls) == 2
    files = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == files


def test_without_what_is_pooled(tmp_path):
    texts = write_texts(tmp_path, CAPTIONS, lambda c: encode(c, pooled=False), with_padding=True, **OPTIONS)
    assert texts.read(np.array([0])).pooled is None


@pytest.mark.parametrize(
    ("captions", "options", "message"),
    [
        ([], {}, r"captions must be several strings, at least one, got \[\]"),
        ("a red three", {}, "captions must be several strings, at least one, got 'a red three'"),
        (["a", " "], {}, r"captions\[1\] must be a text, got ' '"),
        (CAPTIONS, {"encoder": "cd34"}, "holds texts of another encoder .'ab12', and this is 'cd34'"),
        (CAPTIONS[:2], {}, "holds texts of other captions"),
        (CAPTIONS, {"with_padding": False}, "holds texts made with another with_padding"),
        (CAPTIONS, {"shard_size": 3}, "shard_size must be a multiple of batch_size=2, got 3"),
    ],
)
def test_refusals(captions, options, message, tmp_path):
    write_texts(tmp_path, CAPTIONS, encode, with_padding=True, **OPTIONS)
    with pytest.raises(ValueError, match=message):
        write_texts(tmp_path, captions, encode, **({"with_padding": True} | OPTIONS | options))


def test_where_one_caption_ends_tells_it_from_another(tmp_path):
    write_texts(tmp_path, ["a\nb", "c"], encode, with_padding=True, **OPTIONS)
    with pytest.raises(ValueError, match="holds texts of other captions"):
        write_texts(tmp_path, ["a", "b\nc"], encode, with_padding=True, **OPTIONS)


def test_features_that_cannot_be_written(tmp_path):
    large = encode(CAPTIONS[:2])._replace(tokens=np.full((2, 8, 5), 1e5, np.float32))
    with pytest.raises(ValueError, match="finite and at most 65504, as float16 is, got 100000"):
        write_texts(tmp_path, CAPTIONS, lambda c: large, with_padding=True, **OPTIONS)
    holes = encode(CAPTIONS[:2])._replace(mask=np.tile([True, False], (2, 4)))
    with pytest.raises(ValueError, match="mask must be True up to the length"):
        write_texts(tmp_path, CAPTIONS, lambda c: holes, with_padding=True, **OPTIONS)
