"""Text: what it is read as, prompts with gaps, n-grams by hand, and a run from the text to samples."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tyro", reason="experiments need the extra fm_jax[experiments]")

from experiments import export, learned_solver, sample, text
from experiments.lab.corpus import SEPARATOR, facts_of, given_of, read_corpus, vocabulary_of
from experiments.lab.ngrams import ngram_bits
from experiments.lab.sampling import generate_many
from experiments.lab.token_sampling import TokenSampling, guided_denoiser, make_token_generate, token_times
from experiments.lab.training import from_json
from experiments.lab.vocabulary import of_characters, of_tokenizer
from fm_jax.train.log import read_metrics

PLAY = "To be, or not to be: that is the question.\n" * 40
LETTERS = of_characters("abc{}1")


def test_ngrams_by_hand():
    """Of 0 1 0 1 0 1: the unigram is even; behind 0, seen three times, 1 has (3 + 1/2) / (3 + 1)."""
    train = np.array([0, 1, 0, 1, 0, 1])
    np.testing.assert_allclose(ngram_bits(train, np.array([0, 1]), 2, 2), [1, (1 - math.log2(3.5 / 4)) / 2])
    # A history that was never seen says what the shorter one says: 2 with (0 + 2/3) / (6 + 2) at first.
    rare = -math.log2(2 * (1 / 3) / 8)
    np.testing.assert_allclose(ngram_bits(train, np.array([2, 2]), 3, 3), [rare] * 3)


def test_ngrams_are_a_law():
    """The probabilities of what may come next add up to 1, whatever the history."""
    rng = np.random.default_rng(0)
    train, history = rng.integers(3, size=200), rng.integers(3, size=4)
    for most in (1, 2, 4):
        total = 0.0
        for each in range(3):
            both = [ngram_bits(train, x, 3, most)[-1] * len(x) for x in (np.append(history, each), history)]
            total += 2 ** (both[1] - both[0])
        np.testing.assert_allclose(total, 1)


def test_characters():
    vocabulary = of_characters("\n ab")
    assert vocabulary.size == 4
    assert vocabulary.decode(vocabulary.encode("ba\nab")) == "ba\nab"
    with pytest.raises(ValueError, match="the 4 characters that the network knows, got 'c'"):
        vocabulary.encode("abc")


def byte_pairs(file, size):
    """Writes a tokenizer of that many pairs of bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator([PLAY], tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet))
    model.save(str(file))
    return file


def test_any_tokenizer(tmp_path):
    file = byte_pairs(tmp_path / "tokenizer.json", 280)
    vocabulary = of_tokenizer(file)
    ids = vocabulary.encode(PLAY)
    assert len(ids) < len(PLAY) / 2
    assert vocabulary.decode(ids) == PLAY
    assert ids.max() < vocabulary.size
    facts = facts_of(PLAY, "play", file)
    assert vocabulary_of(facts, file).size == vocabulary.size
    file.write_text(file.read_text() + " ")
    with pytest.raises(ValueError, match="is not the file that the run was trained with"):
        vocabulary_of(facts, file)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", "......"),
        ("ab", "ab...."),
        ("{2}b", "..b..."),
        ("a{1}b{2}", "a.b..."),
        ("{}{1", "{}{1.."),
        ("{6}", "......"),
        ("{{1}}b", "{1}b.."),
        ("{{1}", "{{1}.."),
        ("a{0}b", "ab...."),
    ],
)
def test_prompts(prompt, expected):
    given = given_of(prompt, LETTERS, 6)
    assert "".join(LETTERS.decode([i]) if k else "." for i, k in zip(*given, strict=True)) == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("abcabca", "at most as long as a sample of the run, 6 characters with its gaps, got 7"),
        ("{9}", "got 9"),
        ("a{5}b", "got 7"),
        ("abcabc", "must leave something to be drawn"),
        ("xyz", "got 'x'"),
    ],
)
def test_prompts_that_cannot_be(prompt, message):
    with pytest.raises(ValueError, match=message):
        given_of(prompt, LETTERS, 6)


def test_a_causal_network_has_no_gaps():
    assert given_of("ab", LETTERS, 6, gaps=False).known.sum() == 2
    assert given_of("{2}", LETTERS, 6, gaps=False).known.sum() == 0
    with pytest.raises(ValueError, match="no gap before something that is given"):
        given_of("a{1}b", LETTERS, 6, gaps=False)


def test_the_text_without_a_file():
    found, source = read_corpus(None)
    assert len(found) > 100_000
    assert source == "Python's help on itself"


def test_a_file_of_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfTo be\r\nor not")
    assert read_corpus(file) == ("To be\nor not", "a.txt")
    for content in (b"", b"aaaa"):
        file.write_bytes(content)
        with pytest.raises(SystemExit, match="must hold a text, got"):
            read_corpus(file)


def test_the_denoiser_that_is_sampled():
    """Temperature, nucleus and guidance of logits that are the condition: the scale first, then the temperature."""

    def network(params, t, x, cond, *, train, rngs):
        return cond[:, None, None] * w[None, None]

    w, x = jnp.array([-2.0, -1.0, 0.0]), jnp.zeros((2, 1), int)
    sampling = TokenSampling(temperature=0.5, guidance=3.0)
    f = guided_denoiser(sampling, network, {}, jnp.array([1.0, 2.0]), 0.5)
    np.testing.assert_allclose(f(0.5, x)[:, 0], 2 * (0.5 + 3 * (np.array([[1.0], [2.0]]) - 0.5)) * w[None])
    assert f.nfe == 2
    cut = guided_denoiser(TokenSampling(top_p=0.5), network, {}, jnp.array([1.0, 2.0]), 0.5)(0.5, x)
    assert np.isneginf(cut[:, 0, :2]).all()
    assert token_times(TokenSampling()) is None
    times = token_times(TokenSampling(solver="mixture_steps", grid="mask_cosine", steps=2))
    np.testing.assert_allclose(times, [0, 1 - math.cos(math.pi / 4), 1], rtol=1e-6)


def test_a_network_that_gives_nan_is_refused():
    config = dataclasses.replace(text.CONFIG, width=8, depth=1, length=4)
    experiment = text.build(config, facts_of(PLAY, "play", None))
    params = jax.tree.map(lambda p: p + jnp.nan, experiment.init_params(jax.random.key(0)))
    generate = make_token_generate(config.sampling, experiment.path, experiment.apply_fn)
    with pytest.raises(ValueError, match="The samples hold tokens that are none of the data's"):
        generate_many(generate, params, jax.random.key(0), experiment, np.zeros(2, np.int32), 2)


def drawn(run_dir, tmp_path, capsys, **options):
    """What `experiments.sample` writes of a run."""
    out = tmp_path / "drawn.txt"
    sample.run(sample.Config(run=run_dir, out=out, num=3, **options))
    assert "drawn.txt: 3 samples from step 4" in capsys.readouterr().out
    return out.read_text()[:-1].split(SEPARATOR)


@pytest.mark.parametrize("loss", ["masked_elbo", "next_token"])
@pytest.mark.slow
def test_smoke(loss, tmp_path, capsys):
    """From the text to samples, and from the run to prompts, gaps and arrays."""
    (tmp_path / "play.txt").write_text(PLAY)
    training = dataclasses.replace(text.CONFIG.training, run_dir=tmp_path / "run")
    config = dataclasses.replace(text.CONFIG, training=training, corpus=tmp_path / "play.txt", loss=loss, smoke=True)
    results = text.run(config)
    run_dir = tmp_path / "run-smoke"
    for name in (*text.PICTURES, text.SAMPLES, "samples/step_000004.txt", "data.json", "results.json"):
        assert (run_dir / name).stat().st_size > 0, name
    assert [row["step"] for row in read_metrics(run_dir)] == [2, 4]
    assert json.loads((run_dir / "results.json").read_text()) == results
    assert results["bits_per_character"] > 3  # four steps are none
    assert results["ngram_bits_per_character"][4] < 0.2  # every line is the same
    assert results["nfe"] == 16
    out = capsys.readouterr().out
    assert "play.txt: 1,720 characters, of which the last 172 are held out, read as 18 characters" in out
    record = json.loads((run_dir / "config.json").read_text())
    assert record.pop("experiment") == "text"
    assert from_json(text.Config, record).sampling == TokenSampling(sample_batch=2)

    (tmp_path / "play.txt").unlink()  # which is not needed any more
    for each in drawn(run_dir, tmp_path, capsys, prompt="To be"):
        assert each.startswith("To be")
        assert len(each) == 16
        assert set(each) <= set(PLAY)
    arrays = tmp_path / "drawn.npz"
    sample.run(sample.Config(run=run_dir, out=arrays, num=3, temperature=0.5, top_p=0.9))
    with np.load(arrays) as found:
        assert found["samples"].shape == (3, 16)
        assert found["texts"].shape == (3,)
    if loss == "masked_elbo":
        for each in drawn(run_dir, tmp_path, capsys, prompt="To{4}or", solver="mixture_steps", steps=3, remask="cap"):
            assert (each[:2], each[6:8]) == ("To", "or")
    else:
        with pytest.raises(SystemExit, match="--prompt must have no gap"):
            sample.run(sample.Config(run=run_dir, prompt="To{4}or"))
    for options, message in (
        ({"prompt": PLAY}, "--prompt must be at most as long as a sample of the run, 16 characters"),
        ({"prompt": "?"}, r"--prompt must consist of the 18 characters that the network knows, got '\?'"),
        ({"out": tmp_path / "a.png"}, "--out must end in .txt, as the run has texts, or in .npz"),
        ({"label": 3}, "--class needs a run with classes"),
    ):
        with pytest.raises(SystemExit, match=message):
            sample.run(sample.Config(run=run_dir, **options))
    with pytest.raises(SystemExit, match=r"was trained on tokens, and .*learned_solver knows runs with"):
        learned_solver.run(learned_solver.Config(run=run_dir))
    with pytest.raises(SystemExit, match=r"was trained on tokens, and .*export knows runs with"):
        export.run(export.Config(run=run_dir, out=tmp_path / "a.safetensors"))


@pytest.mark.slow
def test_a_run_keeps_its_tokenizer(tmp_path, capsys):
    """It is drawn from when the file is gone, and refuses to go on with another one."""
    (tmp_path / "play.txt").write_text(PLAY * 4)
    training = dataclasses.replace(
        text.CONFIG.training, run_dir=tmp_path / "run", total_steps=4, save_every=2, batch_size=8, warmup_steps=0
    )
    sizes = {"width": 8, "depth": 1, "length": 16, "num_samples": 2, "num_times": 2, "corpus": tmp_path / "play.txt"}
    file = byte_pairs(tmp_path / "mine.json", 280)
    config = dataclasses.replace(text.CONFIG, training=training, tokenizer=file, **sizes)
    results = text.run(config)
    assert results["held_out_characters"] > 2 * 16
    assert results["bits_per_character"] < 8.1 / 2  # of 280 tokens, two characters and more in each
    file.unlink()
    for each in drawn(tmp_path / "run", tmp_path, capsys, prompt="To be, "):
        assert each.startswith("To be, ")
    kept = (tmp_path / "run" / "tokenizer.json").read_bytes()
    with pytest.raises(Exception, match="checksum of the tokenizer"):
        text.run(dataclasses.replace(config, tokenizer=byte_pairs(tmp_path / "other.json", 270)))
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == kept


@pytest.mark.slow
def test_a_tokenizer_that_loses_characters_has_no_bits_a_character(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "be": 1}, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "words.json"))
    (tmp_path / "play.txt").write_text(PLAY * 8)
    training = dataclasses.replace(text.CONFIG.training, run_dir=tmp_path / "run")
    files = {"corpus": tmp_path / "play.txt", "tokenizer": tmp_path / "words.json", "smoke": True}
    results = text.run(dataclasses.replace(text.CONFIG, training=training, **files))
    assert results["bits_per_character"] is None
    assert results["bits_per_token"] > 0
    assert "none, as the tokenizer loses some" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    training = dataclasses.replace(text.CONFIG.training, run_dir=tmp_path / "whole")
    (tmp_path / "play.txt").write_text(PLAY)
    sizes = {"width": 8, "depth": 1, "length": 16, "num_samples": 2, "num_times": 2, "corpus": tmp_path / "play.txt"}
    training = dataclasses.replace(training, total_steps=6, save_every=2, batch_size=8, warmup_steps=0, sample_every=6)
    config = dataclasses.replace(text.CONFIG, training=training, **sizes)
    whole = text.run(config)
    again = dataclasses.replace(config, training=dataclasses.replace(training, run_dir=tmp_path / "parts"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "held_out_nats", _killed)
        with pytest.raises(KeyboardInterrupt):
            text.run(again)
    for folder in (tmp_path / "parts" / "checkpoints").iterdir():  # as if it had been killed at step 4
        if folder.name == "6":
            shutil.rmtree(folder)
    found = text.run(again)
    assert found["bits_per_character"] == whole["bits_per_character"]
    assert (tmp_path / "parts" / "samples.txt").read_text() == (tmp_path / "whole" / "samples.txt").read_text()
    (tmp_path / "play.txt").rename(tmp_path / "moved.txt")  # which is still the same text
    assert text.run(dataclasses.replace(again, corpus=tmp_path / "moved.txt")) == found
    (tmp_path / "play.txt").write_text(PLAY + "Another text.")
    with pytest.raises(Exception, match="checksum of the text"):
        text.run(again)


def _killed(*_):
    raise KeyboardInterrupt
