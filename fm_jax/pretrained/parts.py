"""The parts of a published system: the folders of a pipeline that diffusers has written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from fm_jax.models.autoencoder import latent_space
from fm_jax.models.conditioning import Conditions
from fm_jax.pretrained.steps import Steps, steps_of
from fm_jax.pretrained.system import Request
from fm_jax.text.encoder import TextFeatures
from fm_jax.text.folder import read_tokenizer
from fm_jax.types import Array, Params
from fm_jax.weights.folder import open_model, read_config
from fm_jax.weights.formats import WeightsError, read_json

INDEX = "model_index.json"
Encode = Callable[[Sequence[str]], tuple[TextFeatures, Array]]
"""`encode(texts)`: their features, and the mask of their tokens."""


@dataclass(frozen=True)
class Parts:
    """A folder with `model_index.json`.

    Attributes:
        folder: where it is.
        dtype: of the parameters that are read; `None` for that of the files.
        sharding: where they go.
    """

    folder: Path
    dtype: Any = None
    sharding: Any = None

    def index(self) -> dict[str, Any]:
        """The content of `model_index.json`.

        Raises:
            WeightsError: if it is missing or no JSON object.
        """
        path = self.folder / INDEX
        if not self.folder.is_dir():
            raise WeightsError(f"{self.folder} is not a folder.")
        if not path.is_file():
            raise WeightsError(f"{self.folder} has no {INDEX}: it is not a pipeline in the layout of diffusers.")
        return read_json(path, "index of a pipeline")

    def has(self, name: str) -> bool:
        """Whether the pipeline has a part; one that is optional may be null in the index."""
        entry = self.index().get(name)
        return isinstance(entry, list) and len(entry) == 2 and entry[0] is not None

    def network(self, name: str) -> tuple[Any, Params]:
        """A network and its parameters.

        Raises:
            WeightsError: if it is missing, or is refused by `open_model`.
        """
        if not (self.folder / name).is_dir():
            raise WeightsError(f"{self.folder} has no folder {name!r}, which its pipeline needs.")
        return open_model(self.folder / name, dtype=self.dtype, sharding=self.sharding)

    def networks(self, name: str) -> dict[str, Any]:
        """What a `System` knows of the network of that name, and of the autoencoder in `vae`."""
        module, params = self.network(name)
        autoencoder, autoencoder_params = self.network("vae")
        return {
            "module": module,
            "params": params,
            "sizes": self._sizes(name, autoencoder.factor),
            "autoencoder": autoencoder,
            "autoencoder_params": autoencoder_params,
            "latents": latent_space(autoencoder, autoencoder_params),
            "channels": autoencoder.latent_channels,
            "factor": autoencoder.factor,
        }

    def _sizes(self, name: str, factor: int) -> tuple[int, int] | None:
        """Height and width, in pixels, that the `config.json` of a network speaks of; `None` if it speaks of none.

        Raises:
            WeightsError: for what is neither a number nor two.
        """
        config = read_config(self.folder / name)
        size = config.get("sample_size", config.get("input_size"))
        if size is None:
            return None
        both = size if isinstance(size, list) else [size, size]
        if len(both) != 2 or any(isinstance(each, bool) or not isinstance(each, int) or each < 1 for each in both):
            path = self.folder / name / "config.json"
            raise WeightsError(f"sample_size of {path} must be one size or two, got {size!r}.")
        return factor * both[0], factor * both[1]

    def steps(self, solver: str | None, *, even_first: bool = False) -> Steps:
        """How the `scheduler_config.json` says that the network is sampled; see `steps_of`.

        Raises:
            WeightsError: names the file, and what is not read in it.
        """
        path = self.folder / "scheduler" / "scheduler_config.json"
        config = read_json(path, "configuration of a scheduler")
        try:
            return steps_of(config, solver, even_first=even_first)
        except ValueError as error:
            raise WeightsError(f"{path}: {error}") from error

    def encoder(
        self, suffix: str = "", *, length: int | None = None, truncate: bool = False, masked: bool = False
    ) -> Encode:
        """A text encoder with its tokenizer, as a function of texts.

        Args:
            suffix: of the folders' names, such as `"_2"`.
            length: tokens of every text; by default the tokenizer's.
            truncate: whether a text that is too long loses its end; otherwise it is refused.
            masked: whether the encoder itself is kept from padding.
        """
        tokenizer = read_tokenizer(self.folder / f"tokenizer{suffix}", length=length)
        module, params = self.network(f"text_encoder{suffix}")
        apply = jax.jit(lambda params, ids, mask: module.apply({"params": params}, ids, mask))

        def encode(texts: Sequence[str]) -> tuple[TextFeatures, Array]:
            tokens = tokenizer(list(texts), truncate=truncate)
            return apply(params, tokens.ids, tokens.mask if masked else None), jax.numpy.asarray(tokens.mask)

        return encode


def told_and_null(tell: Callable[[list[str]], Conditions], texts: list[str], request: Request) -> tuple[Any, Any]:
    """What a network is told, and what it is told in place of that where it is guided: the negative texts, or none."""
    if request.guidance == 1:
        return tell(texts), None
    return tell(texts), tell(list(request.negative or [""] * len(texts)))


def check_texts(prompts: Sequence[Any], name: str) -> list[str]:
    """The prompts of a system that takes texts."""
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompts[{i}] must be a text for {name}, not a class, got {prompt!r}.")
    return list(prompts)
