"""PyTorch's pickles as safetensors: `python -m fm_jax.weights.convert in.pt out.safetensors`.

The one place that reads pickles, by `torch.load(weights_only=True)`, which builds tensors and plain containers alone.
PyTorch before 2.10 is refused: what was to be safe there was not (CVE-2025-32434, CVE-2026-24747).
"""

import argparse
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.checks import imported, shown
from fm_jax.weights.files import check_path
from fm_jax.weights.formats import EMBEDDED, WeightsError, is_embedded, is_safetensors, read_ends, what_it_is
from fm_jax.weights.safetensors import DTYPES, PathLike
from fm_jax.weights.save import METADATA
from fm_jax.weights.write import Lazy, write_tensors

LEAST = (2, 10)
"""The version of PyTorch from which on `weights_only` is relied upon."""
CHOICES = ("ema", "model_ema", "model", "state_dict")
"""What holds the tensors of a checkpoint of a training; the first that is there is taken."""
_AS_INTEGERS = {"BF16": "int16", "F8_E4M3": "uint8", "F8_E5M2": "uint8"}


def convert(source: PathLike, target: PathLike, *, key: str | None = None) -> list[str]:
    """Writes the tensors of a pickle as safetensors, one at a time.

    Of a checkpoint of a training the average is taken, `CHOICES` says in which order. Tensors that share memory are
    written one by one, those of `argparse` options and optimisers not at all.

    Args:
        source: a file as `torch.save` writes.
        target: ends with `.safetensors`.
        key: of what is taken of a dict of dicts, "ema"; of one within another "state_dict.model".

    Returns:
        Lines that say what was taken, and what was left.

    Raises:
        ImportError: without PyTorch, or with one before 2.10.
        WeightsError: if the file is no such pickle, if reading it would run code, or if what is taken holds anything
            but tensors by name.
        OSError: if a file cannot be read or written.
    """
    source, target = check_path("source", source), check_path("target", target)
    if key is not None and not isinstance(key, str):
        raise ValueError(f"key must be a name, or names joined by dots, got {shown(key)}.")
    torch = _torch()
    if target.suffix != ".safetensors":
        raise WeightsError(f"target must end with .safetensors, got {target}.")
    content = _unpickled(torch, source)
    tensors, said = _chosen(torch, source, content, key)
    dtypes = {f"torch.{each.name}": name for name, each in DTYPES.items()}
    lazy = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            kind = "quantised" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
            raise WeightsError(f"{name!r} of {source} is {kind}; dense tensors with numbers in them are written.")
        if str(tensor.dtype) not in dtypes:
            raise WeightsError(f"{name!r} of {source} is {tensor.dtype}; what is written is {', '.join(DTYPES)}.")
        dtype = dtypes[str(tensor.dtype)]
        lazy[name] = Lazy(tuple(tensor.shape), DTYPES[dtype], partial(_array, tensor, dtype))
    write_tensors(target, lazy, metadata=METADATA)
    count = sum(int(np.prod(each.shape)) for each in lazy.values())
    return [*said, f"{len(lazy)} tensors with {count:,} numbers are in {target}."]


def _torch() -> Any:
    torch = imported("torch", "fm_jax.weights.convert", '"torch>=2.10"')
    version = tuple(int(each) for each in re.findall(r"\d+", torch.__version__)[:2])
    if version < LEAST:
        raise ImportError(
            f"fm_jax.weights.convert needs torch>=2.10, got {torch.__version__}: before it a pickle could run code in "
            "spite of weights_only (CVE-2025-32434, CVE-2026-24747)."
        )
    return torch


def _unpickled(torch: Any, source: Path) -> Any:
    if not source.is_file():
        raise WeightsError(f"{source} is not there, or no file.")
    head, tail = read_ends(source)
    if is_safetensors(head):
        raise WeightsError(f"{source} is safetensors already: load reads it as it is.")
    if is_embedded(head):
        raise WeightsError(f"{source} is not read: {EMBEDDED}")
    is_zip = head.startswith(b"PK")
    if not is_zip and not head.startswith(b"\x80"):
        raise WeightsError(what_it_is(source, head, tail))
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated storages
            return torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError:
        raise
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+) was not an allowed|Unsupported (?:global|class|operand)[^.\n]*", str(error))
        why = refused.group(0) if refused else str(error).strip().partition("\n")[0]
        raise WeightsError(
            f"{source} is not read, since it holds more than tensors and plain containers, or is damaged ({why}). "
            "Nothing of it was run. Save the state_dict alone with PyTorch, where you trust the file."
        ) from None


def _chosen(torch: Any, source: Path, content: Any, key: str | None) -> tuple[dict[str, Any], list[str]]:
    """The tensors by name that are wanted of what was unpickled, and what to say of it."""
    said, place = [], ""
    name: str | None
    wanted = key.split(".") if key else []
    while True:
        if not isinstance(content, Mapping):
            raise WeightsError(f"{source}{place} holds {_kind(content)}, not tensors by name.")
        if wanted:
            name = wanted.pop(0)
            if name not in content:
                raise WeightsError(f"{source}{place} has no {name!r}, it has {', '.join(map(repr, content))}.")
        else:
            name = next((each for each in CHOICES if isinstance(content.get(each), Mapping)), None)
            if name is None or key:
                break
        others = [f"{each!r}" for each in content if each != name]
        said.append(f"{name!r} is taken of {source}{place}" + f", and {', '.join(others)} left out." * bool(others))
        content, place = content[name], f"{place}[{name!r}]"
    if not content:
        raise WeightsError(f"{source}{place} is empty.")
    tensors = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            hint = "; --key names what is to be taken of it" if isinstance(value, Mapping) else ""
            raise WeightsError(f"{source}{place} holds {_kind(value)} under {name!r}, not a tensor{hint}.")
        tensors[name] = value.detach()
    return tensors, said


def _kind(value: Any) -> str:
    article = "an" if type(value).__name__[:1].lower() in "aeiou" else "a"
    return f"{article} {type(value).__name__}"


def _array(tensor: Any, dtype: str) -> np.ndarray:
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    if dtype not in _AS_INTEGERS:
        return tensor.numpy()
    torch = imported("torch", "fm_jax.weights.convert")
    return tensor.view(getattr(torch, _AS_INTEGERS[dtype])).numpy().view(DTYPES[dtype])


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m fm_jax.weights.convert", description="PyTorch's pickles as safetensors."
    )
    parser.add_argument("source", help="a file of torch.save: .pt, .pth, .ckpt, .bin")
    parser.add_argument("target", help="the file to write, *.safetensors")
    parser.add_argument("--key", help="what to take of a checkpoint; by default the first of " + ", ".join(CHOICES))
    options = parser.parse_args(arguments)
    try:
        said = convert(options.source, options.target, key=options.key)
    except (ImportError, ValueError, OSError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    print("\n".join(said))


if __name__ == "__main__":
    main()
