import builtins
import gzip
import importlib.util
import json
import random
import sys

import numpy as np
import pytest

from fm_jax.text.bpe import ClipTokenizer, read_clip_tokenizer
from fm_jax.text.byte_tokens import ByteTokenizer
from fm_jax.text.folder import read_tokenizer
from fm_jax.text.tokens import Tokens
from fm_jax.text.unigram import UnigramTokenizer, read_unigram_tokenizer

MERGES = ["t h", "th e</w>", "c a", "ca t</w>", "th e", "the r", "' s</w>", "! !</w>", "Ã ©</w>", "1 2</w>"]
PROMPTS = [
    "The  cat's\n\t thé!!",
    "a cat 12 cat, cat",
    "It's the cats' theatre; we'll see -- thé <cat>!!!",
    "CAT&amp;the\u00a0\u3000cat\x1c cat",
    "the<|endoftext|>cat <|startoftext|> <|ENDOFTEXT|>the !<|endoftext|",
    "ΣΊΣ İ e\u0301 ½ Ⅷ ² 中文 🎉 ’s \u200b हिन्दी",
    "",
]


def official(folder):
    """CLIP's own kind of file, with other merges."""
    path = folder / "bpe.txt.gz"
    path.write_bytes(gzip.compress(('"bpe_simple_vocab_16e6.txt#version: 0.2\n' + "\n".join(MERGES) + "\n").encode()))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return official(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, file):
    folder = tmp_path_factory.mktemp("transformers")
    (folder / "vocab.json").write_text(json.dumps(read_clip_tokenizer(file).vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "pad_token": "!", "model_max_length": 20}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer(file):
    return read_clip_tokenizer(file, length=12)


def words(tokenizer, text):
    names = {i: token for token, i in tokenizer.vocabulary.items()}
    return [names[i] for i in tokenizer.encode(text)]


class TestClip:
    def test_the_vocabulary_is_numbered_as_the_published_one(self, tokenizer):
        # Printable bytes first, then the same behind which a word ends, the merges, start and end.
        numbers = [tokenizer.vocabulary[token] for token in ("!", "a", "!</w>", "a</w>", "th", "the</w>")]
        assert numbers == [0, 64, 256, 320, 512, 513]
        assert tokenizer.vocabulary["<|endoftext|>"] == tokenizer.pad == 512 + len(MERGES) + 1

    @pytest.mark.parametrize(
        ("text", "tokens"),
        [
            ("The  cat's\n", ["the</w>", "cat</w>", "'s</w>"]),
            ("there", ["ther", "e</w>"]),
            ("cats", ["ca", "t", "s</w>"]),
            ("12!!", ["1</w>", "2</w>", "!!</w>"]),
            ("é e\u0301", ["Ã©</w>", "Ã©</w>"]),
            ("<|ENDOFTEXT|>a", [*"<", "|</w>", *"endoftex", "t</w>", "|", "></w>", "a</w>"]),
            ("a<|endoftext|>a", ["a</w>", "<|endoftext|>", "a</w>"]),
            (" \t\u3000", []),
        ],
    )
    def test_tokens(self, tokenizer, text, tokens):
        assert words(tokenizer, text) == tokens

    def test_rows_begin_end_and_are_padded(self, tokenizer):
        start, end = (tokenizer.vocabulary[f"<|{name}oftext|>"] for name in ("start", "end"))
        tokens = tokenizer(["the cat", "the"])
        assert isinstance(tokens, Tokens)
        np.testing.assert_array_equal(tokens.ids[:, :5], [[start, 513, 515, end, end], [start, 513, end, end, end]])
        assert tokens.ids.shape == (2, 12)
        assert (tokens.ids[:, 5:] == end).all()
        assert tokens.ids.dtype == np.int32
        np.testing.assert_array_equal(tokens.mask.sum(axis=1), [4, 3])

    def test_what_is_too_long_is_refused_or_cut_in_front_of_its_end(self, tokenizer):
        prompts = ["the", "the " * 11]
        with pytest.raises(
            ValueError, match=r"prompt 1 has 13 tokens, .* the limit is 12: .* its last 1 with truncate"
        ):
            tokenizer(prompts)
        tokens = tokenizer(prompts, truncate=True)
        assert tokens.ids[1, -1] == tokenizer.pad
        assert tokens.mask[1].all()
        assert (tokens.ids[1, 1:-1] == 513).all()

    def test_a_folder_says_how_to_pad(self, folder, file):
        tokenizer = read_clip_tokenizer(folder)
        assert (tokenizer.pad, tokenizer.length) == (0, 20)
        # What pads is a token by itself wherever it stands.
        assert tokenizer.encode("the!!") == [513, 0, 0]
        assert read_clip_tokenizer(file, pad=0).encode("the!!") == [513, 519]
        assert read_clip_tokenizer(folder, pad=7, length=5)("the").ids.tolist()[0][3:] == [7, 7]
        assert read_tokenizer(folder) == tokenizer

    def test_the_json_of_newer_versions(self, folder, tmp_path):
        old = read_clip_tokenizer(folder)
        model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": dict(old.vocabulary), "merges": MERGES}
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": [{"content": "!"}]}))
        (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
        assert read_clip_tokenizer(tmp_path) == old

    def test_entities(self, file):
        plain, unescaped = (read_clip_tokenizer(file, unescape=unescape) for unescape in (False, True))
        assert words(unescaped, "the&amp;amp;cat") == ["the</w>", "&</w>", "cat</w>"]
        assert len(plain.encode("the&amp;amp;cat")) > 3

    def test_refusals(self, folder, tmp_path):
        with pytest.raises(ValueError, match="prompts must be a string, or a sequence of at least one, got 7"):
            read_clip_tokenizer(folder)(7)
        with pytest.raises(ValueError, match=r"prompts\[1\] must be a string, got None"):
            read_clip_tokenizer(folder)(["a", None])
        with pytest.raises(ValueError, match="at least one"):
            read_clip_tokenizer(folder)([])
        with pytest.raises(ValueError, match="truncate must be True or False"):
            read_clip_tokenizer(folder)("a", truncate=1)
        with pytest.raises(ValueError, match=r"must be a folder with vocab.json"):
            read_clip_tokenizer(tmp_path / "nowhere")
        with pytest.raises(ValueError, match=r"must hold vocab.json and merges.txt, or tokenizer.json"):
            read_clip_tokenizer(tmp_path)
        (tmp_path / "a.txt").write_text("#version: 0.2\nt h\nt h e\n")
        with pytest.raises(ValueError, match="two tokens a line, got 't h e'"):
            read_clip_tokenizer(tmp_path / "a.txt")
        (tmp_path / "b.txt").write_bytes(official(tmp_path).read_bytes()[:40])
        with pytest.raises(ValueError, match="must be a text of merges"):
            read_clip_tokenizer(tmp_path / "b.txt")
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}}))
        with pytest.raises(ValueError, match="is not of CLIP: its model is 'Unigram'"):
            read_clip_tokenizer(tmp_path)
        with pytest.raises(ValueError, match="vocabulary must have"):
            ClipTokenizer({"a": 0}, [], pad=0)

    def test_tokens_beyond_the_vocabulary_are_refused(self, folder, tmp_path):
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / name).write_text((folder / name).read_text())
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<my-dog>": 600}))
        with pytest.raises(ValueError, match=r"adds tokens to CLIP's vocabulary, .*'<my-dog>'"):
            read_clip_tokenizer(tmp_path)


class TestBytes:
    def test_ids(self):
        tokens = ByteTokenizer(length=8)(["aé", ""])
        np.testing.assert_array_equal(tokens.ids, [[100, 198, 172, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]])
        np.testing.assert_array_equal(tokens.mask.sum(axis=1), [4, 1])

    def test_too_long(self):
        with pytest.raises(ValueError, match="prompt 0 has 6 tokens"):
            ByteTokenizer(length=5)("hello")
        np.testing.assert_array_equal(ByteTokenizer(length=3)("hello", truncate=True).ids, [[107, 104, 1]])

    def test_refusals(self):
        with pytest.raises(ValueError, match="length must be at least 1, got 0"):
            ByteTokenizer(length=0)
        with pytest.raises(ValueError, match="prompts must be a string"):
            ByteTokenizer()(b"hello")


class TestUnigram:
    def test_the_end_follows_the_text(self):
        tokens = UnigramTokenizer(lambda text: [len(word) for word in text.split()])(["aaa bb", "aaaa"])
        np.testing.assert_array_equal(tokens.ids, [[3, 2, 1], [4, 1, 0]])

    @pytest.mark.parametrize(("file", "package"), [("tokenizer.json", "tokenizers"), ("spiece.model", "sentencepiece")])
    def test_a_package_that_is_not_there_is_named(self, file, package, tmp_path, monkeypatch):
        (tmp_path / file).write_text("{}")
        monkeypatch.delitem(sys.modules, package, raising=False)
        real = builtins.__import__
        monkeypatch.setattr(
            importlib, "import_module", lambda name: real("no_such_package") if name == package else real(name)
        )
        with pytest.raises(ImportError, match=f"{file}.* needs {package}: pip install {package}"):
            read_unigram_tokenizer(tmp_path)

    def test_neither_file(self, tmp_path):
        with pytest.raises(ValueError, match=r"must hold tokenizer.json or spiece.model: it holds neither"):
            read_unigram_tokenizer(tmp_path)

    def test_json(self, tmp_path):
        tokenizers = pytest.importorskip("tokenizers")
        pieces = [
            ("<pad>", 0.0),
            ("</s>", 0.0),
            ("<unk>", 0.0),
            ("▁", -2.0),
            ("▁the", -1.0),
            ("▁cat", -1.0),
            ("s", -1.5),
        ]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=False))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        tokenizer.enable_padding(length=9)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5TokenizerFast"}))
        tokens = read_tokenizer(tmp_path)(["the cats", "cat"])
        np.testing.assert_array_equal(tokens.ids, [[4, 5, 6, 1], [5, 1, 0, 0]])
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match="must hold a Unigram model, as of T5, got WordLevel"):
            read_tokenizer(tmp_path)


def test_folders_of_other_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold tokenizer_config.json: it does not"):
        read_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(ValueError, match="'CLIPTokenizer', 'T5Tokenizer', 'ByT5Tokenizer', got 'LlamaTokenizer'"):
        read_tokenizer(tmp_path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="must be a JSON object"):
        read_tokenizer(tmp_path)
    path.write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    assert read_tokenizer(tmp_path, length=9) == ByteTokenizer(9)


# The peers.


def random_prompts(count):
    rng = random.Random(0)
    pool = [
        *map(chr, range(32, 127)),
        *"'s 't 're éüßñçøÅΣσςДдЖ中文🎉🐈\u0301\u200d\u00a0\t\n½²Ⅷ١٢٣",
        "<|endoftext|>",
        "'ll",
        "the",
    ]
    return ["".join(rng.choice(pool) for _ in range(rng.randint(1, 40))) for _ in range(count)]


def check_against_transformers(ours, theirs, prompts):
    start, end = ours.vocabulary["<|startoftext|>"], ours.vocabulary["<|endoftext|>"]
    for prompt in prompts:
        assert [start, *ours.encode(prompt), end] == theirs(prompt)["input_ids"], prompt
    options = {"padding": "max_length", "max_length": ours.length, "truncation": True, "return_tensors": "np"}
    found, wanted = ours(prompts[:50], truncate=True), theirs(prompts[:50], **options)
    np.testing.assert_array_equal(found.ids, wanted["input_ids"])
    np.testing.assert_array_equal(found.mask, wanted["attention_mask"])


@pytest.mark.parity
def test_ids_are_those_of_transformers(file, folder):
    transformers = pytest.importorskip("transformers")
    ours = read_clip_tokenizer(file)
    theirs = transformers.CLIPTokenizer(vocab=dict(ours.vocabulary), merges=[tuple(pair) for pair in ours.merges])
    check_against_transformers(ours, theirs, PROMPTS + random_prompts(500))
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    check_against_transformers(read_clip_tokenizer(folder), theirs, PROMPTS + random_prompts(500))


@pytest.mark.parity
def test_ids_of_the_published_vocabulary_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip is not installed, whose files hold the vocabulary")
    ours = read_clip_tokenizer(f"{spec.submodule_search_locations[0]}/bpe_simple_vocab_16e6.txt.gz")
    assert len(ours.vocabulary) == 49408
    assert ours("a photo of a cat").ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    theirs = transformers.CLIPTokenizer(vocab=dict(ours.vocabulary), merges=[tuple(pair) for pair in ours.merges])
    check_against_transformers(ours, theirs, PROMPTS + random_prompts(2000))
    theirs.save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path, length=77) == ours


@pytest.mark.parity
def test_bytes_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ByT5Tokenizer()
    for prompt in PROMPTS:
        assert ByteTokenizer()(prompt).ids[0].tolist() == theirs(prompt)["input_ids"]


@pytest.mark.parity
def test_unigrams_are_those_of_transformers(tmp_path):
    transformers, sentencepiece = (pytest.importorskip(name) for name in ("transformers", "sentencepiece"))
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghijklmnoé") for _ in range(rng.randint(2, 6))) for _ in range(300)]
    lines = [" ".join(rng.choice(words) for _ in range(8)) for _ in range(1000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=100,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=0)
    theirs.save_pretrained(tmp_path / "fast")
    prompts = [*lines[:20], "  two   words \n x", "É ﬁ Ⅷ", "中文 🎉", ""]
    for ours in (read_unigram_tokenizer(tmp_path), read_tokenizer(tmp_path / "fast")):
        for prompt in prompts:
            assert ours(prompt).ids[0].tolist() == theirs(prompt)["input_ids"], prompt
