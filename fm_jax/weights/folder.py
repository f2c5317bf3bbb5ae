"""Networks in folders of diffusers' and transformers' layout: `config.json` says which, safetensors hold the rest."""

import dataclasses
import importlib
import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from fm_jax.checks import shown
from fm_jax.models.conditioning import SIT
from fm_jax.types import Params
from fm_jax.weights.files import check_path
from fm_jax.weights.formats import WeightsError, read_json
from fm_jax.weights.load import load
from fm_jax.weights.rules import Rules
from fm_jax.weights.safetensors import PathLike, open_tensors
from fm_jax.weights.save import save

CONFIG = "config.json"
FAMILIES = {
    "SD3Transformer2DModel": "mmdit:mmdit",
    "FluxTransformer2DModel": "flux:flux",
    "PixArtTransformer2DModel": "crossdit:crossdit",
    "WanTransformer3DModel": "wan:wan",
    "UNet2DConditionModel": "unet_condition:unet_condition",
    "UNet2DModel": "unet:unet",
    "DiTTransformer2DModel": "dit:dit",
    "SiT": "dit:sit",
    "VideoDiT": "videodit:videodit",
    "AutoencoderKL": "autoencoder:autoencoder",
    "AutoencoderKLFlux2": "autoencoder:autoencoder",
    "AutoencoderTiny": "tiny_autoencoder:tiny_autoencoder",
    "TAESD": "tiny_autoencoder:tiny_autoencoder",
    "AutoencoderKLWan": "wan_autoencoder:wan_autoencoder",
    "CLIPTextModel": "clip:clip",
    "CLIPTextModelWithProjection": "clip:clip",
    "T5EncoderModel": "t5:t5",
    "UMT5EncoderModel": "t5:t5",
}
"""By the class that `config.json` names, the file in `fm_jax/weights` and what its three functions begin with."""

LAYOUTS = {
    "autoencoder": ("diffusers", "diffusers_old"),
    "clip": ("transformers", "bare"),
    "unet": ("diffusers", "diffusers_old"),
}
"""By the file of a family, the layouts in which its folders come, where they are several: diffusers once called what
attention consists of otherwise, and transformers 5 writes CLIP's text encoder without the prefix of others."""

_OLD = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
"""By its `norm_type`, what diffusers once called `Transformer2DModel`."""
_WHOLE = {"CLIPModel": "CLIPTextModelWithProjection", "T5ForConditionalGeneration": "T5EncoderModel"}
"""Networks of which the text encoder is read, and what that is called by itself."""
_OPTIONS = {"size": ("sample_size", "input_size"), "channels": ("in_channels",)}
"""What some networks take from their input, and what it is called in a configuration."""


def open_model(folder: PathLike, *, dtype: Any = None, sharding: Any = None) -> tuple[nn.Module, Params]:
    """A published network and its parameters from a folder, such as `transformer/` or `vae/` of a pipeline.

    Args:
        folder: holds `config.json` and safetensors, cut or not, as diffusers and transformers save them.
        dtype: of the parameters; by default that of the files, see `load`.
        sharding: where they go, see `load`; a function of paths needs no template.

    Returns:
        The module, and its parameters.

    Raises:
        WeightsError: names the file and the fault: no `config.json`, or one of a class that is not among `FAMILIES`, of
            a quantised model, or with an option that the network has not; what `load` refuses.
    """
    folder = check_path("folder", folder)
    config = read_config(folder)
    path = folder / CONFIG
    from_config = _function(class_of(config, path), "from_config")
    try:
        module = from_config(config)
    except (ValueError, KeyError, TypeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise WeightsError(f"{path} is not of a network that is read: {why}") from error
    given = {
        ours: config[theirs]
        for ours, names in _OPTIONS.items()
        for theirs in names
        if isinstance(config.get(theirs), int)
    }
    tensors = open_tensors(folder)
    rules = _rules_for(tensors.keys(), class_of(config, path), module, given)
    return module, load(tensors, rules, dtype=dtype, sharding=sharding)


def save_model(
    folder: PathLike,
    module: nn.Module,
    params: Params,
    *,
    max_shard_bytes: float = 5e9,
    dtype: Any = None,
    **options: Any,
) -> list[Path]:
    """Writes a network as a folder that diffusers or transformers, and `open_model`, load: the inverse of `open_model`.

    Args:
        folder: made if need be.
        module: a network of one of the `FAMILIES`.
        params: its parameters.
        max_shard_bytes: see `save`.
        dtype: see `save`.
        **options: what a network takes from its input and its configuration says: `size` and `channels` of a DiT.

    Returns:
        The files that were written.

    Raises:
        WeightsError: if there is no such folder of this network, or `params` are not its own.
        OSError: as the system says, such as that the disk is full.
    """
    folder = check_path("folder", folder)
    name = type(module).__module__.rpartition(".")[2]
    found = next((each for each, place in FAMILIES.items() if place.split(":")[0] == name), None)
    if found == "DiTTransformer2DModel" and getattr(module, "border", None) == SIT:
        found = "SiT"
    if found is None or not isinstance(module, nn.Module):
        raise WeightsError(f"module must be a network with a published layout, got {shown(type(module))}.")
    to_config = _function(found, "config")
    known = inspect.signature(to_config).parameters
    if unknown := options.keys() - known.keys():
        raise ValueError(f"save_model takes no {', '.join(sorted(unknown))} for a {type(module).__name__}.")
    needed = [each.name for each in known.values() if each.kind is each.KEYWORD_ONLY and each.default is each.empty]
    if lacking := [name for name in needed if name not in options]:
        raise ValueError(f"save_model needs {', '.join(lacking)} for a {type(module).__name__}, which knows none.")
    config = to_config(module, **options)
    _check_kept(module, _function(found, "from_config")(config))
    rules = _rules(found, module, options)
    return save(folder, params, rules, config=config, max_shard_bytes=max_shard_bytes, dtype=dtype)


# How a network computes or learns, and what it gives beside: not what its parameters mean.
_OF_USE = {"compute", "scan_layers", "dropout", "keep_hidden", "stddev", "parent", "name"}


def _check_kept(module: Any, opened: Any, at: str = "") -> None:
    """Raises `WeightsError` if what a configuration says is another function than the network it was made of."""
    for field in dataclasses.fields(module):
        ours, theirs = (_value(each, field.name) for each in (module, opened))
        if field.name in _OF_USE or ours is None:
            continue
        if isinstance(ours, nn.Module) and type(ours) is type(theirs):
            _check_kept(ours, theirs, f"{field.name}.")
        elif ours != theirs:
            raise WeightsError(
                f"A folder cannot say {at}{field.name}={shown(ours)}, and would be opened with {shown(theirs)}: "
                "another function of the same parameters. `save` writes them by rules alone."
            )


def _value(module: Any, name: str) -> Any:
    value = getattr(module, name, None)
    return tuple(value) if isinstance(value, list) else value


def read_config(folder: PathLike) -> dict[str, Any]:
    """The `config.json` of a folder.

    Raises:
        WeightsError: if it is not there, is no JSON object, or is that of a quantised model.
    """
    folder = check_path("folder", folder)
    path = folder / CONFIG
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder; load reads single files by rules of your own.")
    if (folder / "model_index.json").is_file() and not path.is_file():
        parts = sorted(each.parent.name for each in folder.glob(f"*/{CONFIG}"))
        raise WeightsError(f"{folder} is a whole pipeline: open its folders one by one, {', '.join(parts)}.")
    if not path.is_file():
        raise WeightsError(f"{folder} has no {CONFIG} to say what network it is; load reads its files by given rules.")
    config = read_json(path, "configuration of a network")
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method", "one") if isinstance(method, Mapping) else method
        raise WeightsError(f"{path} is of a quantised model ({method}): give it in bfloat16 or float32.")
    return config


def class_of(config: Mapping[str, Any], path: Path) -> str:
    """The class that a configuration names, one of `FAMILIES`.

    Raises:
        WeightsError: if it names none, or another.
    """
    name = config.get("_class_name")
    if name is None and isinstance(config.get("architectures"), list) and config["architectures"]:
        name = config["architectures"][0]
    if not isinstance(name, str):
        raise WeightsError(f"{path} names no class: it has neither '_class_name' nor 'architectures'.")
    if name == "Transformer2DModel":
        name = _OLD.get(config.get("norm_type", "layer_norm"), name)
    name = _WHOLE.get(name, name)
    if name not in FAMILIES:
        raise WeightsError(
            f"{path} is of {name}, which is not among the networks that are read: {', '.join(FAMILIES)}."
        )
    return name


def _function(name: str, what: str) -> Any:
    """One of the three functions of a family."""
    file, prefix = FAMILIES[name].split(":")
    return getattr(importlib.import_module(f"fm_jax.weights.{file}"), f"{prefix}_{what}")


def _rules_for(keys: Collection[str], name: str, module: nn.Module, options: Mapping[str, Any]) -> Rules:
    """The rules of the first layout whose keys are all there, or of that of which most are."""
    layouts = LAYOUTS.get(FAMILIES[name].split(":")[0])
    if layouts is None:
        return _rules(name, module, options)
    best, most = None, -1
    for layout in layouts:
        rules = _rules(name, module, {**options, "layout": layout})
        there = sum(key in keys for key in rules.shapes)
        if there > most:
            best, most = rules, there
        if there == len(rules.shapes):
            break
    assert best is not None
    return best


def _rules(name: str, module: nn.Module, options: Mapping[str, Any]) -> Rules:
    function = _function(name, "rules")
    known = inspect.signature(function).parameters
    return function(module, **{option: value for option, value in options.items() if option in known})
