"""Runs on latents: their samples as pictures, what they are judged by, and how well the autoencoder could do."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lab.codecs import Codec, open_codec, sha256_of
from experiments.lab.data import Data, Facts, Loaded, load, read_facts
from experiments.lab.experiment import Experiment
from experiments.lab.reconstruction import psnr
from experiments.lab.training import from_json
from fm_jax.data.arrays import to_unit_range
from fm_jax.data.latents import open_latents

Classify = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Seen:
    """What the samples of a run are shown and judged as: as they are, or decoded.

    Attributes:
        loaded: the pictures that they are compared with.
        experiment: whose samples they are.
        codec: the autoencoder of their latents, if one is known.
    """

    loaded: Loaded
    experiment: Experiment
    codec: Codec | None = None

    def pictures(self, samples: np.ndarray, progress: bool | None = None) -> np.ndarray:
        """Samples [..., h, w, c] of the network as pictures; as they are where there is nothing to decode."""
        if self.codec is None:
            return samples
        flat = samples.reshape(-1, *samples.shape[-3:])
        images = self.codec.decode(self.experiment.to_data(flat), progress=progress)
        return images.reshape(*samples.shape[:-3], *images.shape[1:])

    def visible(self, images: np.ndarray) -> np.ndarray:
        """What can be shown of `pictures`: 1 or 3 channels in [-1, 1]."""
        if self.codec is None:
            return self.experiment.visible(images)
        return images[..., : 3 if images.shape[-1] >= 3 else 1]


def codec_of(data: Data, facts: Facts, option: str = "--decoder", path: Path | None = None) -> Codec | None:
    """The autoencoder that made the latents of a run; `None` for what no autoencoder has made.

    Args:
        data: of the run.
        facts: of its data.
        option: what `path` is called.
        path: of the autoencoder; by default that of `--decoder`, or where it was when they were encoded.

    Raises:
        FileNotFoundError: if it is not known where it is.
        ValueError: if another one is there.
    """
    if facts.autoencoder is None or facts.image_shape is None:
        return None
    path = path or data.decoder
    if path is None:
        path = _where_it_was(data, option)
    codec = open_codec(path, facts.image_shape, option)
    if (found := sha256_of(codec.params)) != facts.autoencoder:
        raise ValueError(
            f"{option} {path} is not what made them: they are latents of another autoencoder (SHA-256 "
            f"{facts.autoencoder[:16]}, and this one's is {found[:16]})."
        )
    return codec


def _where_it_was(data: Data, option: str) -> Path:
    try:
        path = Path(str(open_latents(data.encoded or "").about["autoencoder"]))
    except (OSError, ValueError, KeyError) as error:
        raise FileNotFoundError(f"Where the autoencoder is, is not known ({error}): give {option}.") from None
    if not path.exists():
        raise FileNotFoundError(f"The autoencoder is no longer at {path}: give {option}.")
    return path


def codec_of_run(config: Any, option: str, path: Path | None) -> Codec | None:
    """The autoencoder of the latents of a run that was read again, as `codec_of`; `None` for runs on other data.

    Raises:
        FileNotFoundError: if it is not known where it is, or went with the latents of a smoke run.
        ValueError: if another one is there.
    """
    data = getattr(config, "data", None)
    if not isinstance(data, Data) or data.encoded is None:
        return None
    if config.smoke and path is None and data.decoder is None and not data.encoded.exists():
        raise FileNotFoundError(
            f"{config.training.run_dir} is a smoke run, and its latents {data.encoded} are gone: with those that it "
            f"made itself went their random autoencoder, and nothing decodes its samples. For others, give {option}."
        )
    return codec_of(data, read_facts(config.training.run_dir, data), option, path)


def seen_of(data: Data, experiment: Experiment, loaded: Loaded) -> Seen:
    """What samples of a run are shown and judged as.

    Raises:
        FileNotFoundError: if the autoencoder, or the images that were encoded, are not there.
        ValueError: if they are others.
    """
    codec = codec_of(data, loaded.facts)
    if codec is None or loaded.latents is None:
        return Seen(loaded, experiment)
    given = loaded.latents.about.get("data")
    try:
        pictures = load(from_json(Data, given or {}))
    except (ValueError, OSError) as error:
        raise type(error)(f"The images that {data.encoded} was made of cannot be read: {error}") from error
    own = {"train": pictures.facts.checksum, "test": pictures.facts.checksum_test}
    if any(own[name] != checksum for name, checksum in loaded.latents.images.items()):
        raise ValueError(
            f"The images that {data.encoded} was made of, {pictures.facts.source}, have changed since: encode them "
            "anew, into another folder."
        )
    return Seen(_part(data, pictures), experiment, codec)


def _part(data: Data, pictures: Loaded) -> Loaded:
    """As many pictures as latents are trained on, with labels or without."""
    train, test = (
        None if each is None else each.subset(slice(data.num_images)) for each in (pictures.train, pictures.test)
    )
    assert train is not None
    if data.labels == "none":
        train = train._replace(labels=None, class_names=())
        test = None if test is None else test._replace(labels=None, class_names=())
    facts = dataclasses.replace(
        pictures.facts,
        num_images=len(train.images),
        num_test=0 if test is None else len(test.images),
        class_names=train.class_names,
    )
    return Loaded(train, test, facts)


def floor(seen: Seen, latents: Loaded, num: int, classify: Classify | None) -> dict[str, Any]:
    """What the autoencoder makes of real images: what is lost here no model of the latents brings back.

    Args:
        seen: the pictures, and the autoencoder.
        latents: of the same pictures.
        num: at most so many, held-out ones if there are any.
        classify: the judge of the samples.

    Returns:
        `psnr` in dB, the mean over images; `agreement` of the judge with the labels of the decoded images; `images`,
        how many; `held_out`, whether they were; `decode_seconds_per_image`.
    """
    held_out = latents.test is not None
    means = latents.test if latents.test is not None else latents.train
    real = seen.loaded.test if seen.loaded.test is not None else seen.loaded.train
    some = real.subset(slice(num))
    z = means.images[:num]
    seen.pictures(z[:1], progress=False)  # compiles
    start = time.perf_counter()
    decoded = seen.pictures(z)
    seconds = (time.perf_counter() - start) / len(z)
    found = {
        "psnr": psnr(to_unit_range(some.images[:], some.value_range), decoded),
        "images": len(z),
        "held_out": held_out,
        "decode_seconds_per_image": seconds,
    }
    if classify is not None:
        found["agreement"] = float((classify(decoded) == some.labels).mean())
    return found
