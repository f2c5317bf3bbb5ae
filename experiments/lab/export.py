"""A model as files for programs without this library: parameters, a sampler, a card."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export

from experiments.lab.experiment import Experiment
from experiments.lab.sampling import Generate
from fm_jax.samplers import Adaptive, DiffraxSDE
from fm_jax.types import Array, Params, Sampler

FORMAT = "1"
"""Of what a file of parameters says of itself; another number when a reader would have to know."""
LARGEST = 2_000_000_000
"""Bytes of parameters within a sampler: FlatBuffers, which `jax.export` writes, ends at 2 GiB."""
NOT_STATED = "not stated"
MARK = "<!-- Written by experiments.export. -->"
"""Stands in every card, so that no other file is replaced."""
EQX_ON_ERROR = "EQX_ON_ERROR"
"""What Equinox, and with it Diffrax, does where a solve fails: by default it calls Python."""


def flat(params: Params) -> dict[str, np.ndarray]:
    """Parameters by name, such as `block_0.kernel`, as files of parameters have them."""
    named = traverse_util.flatten_dict(params, sep=".")
    # safetensors writes the memory of an array, whatever its strides.
    return {name: np.asarray(leaf, order="C") for name, leaf in named.items()}


def nested(named: Mapping[str, Any]) -> Params:
    """The inverse of `flat`: what a Flax module takes."""
    return traverse_util.unflatten_dict(dict(named), sep=".")


def size_of(params: Params) -> int:
    """Bytes."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def check_exportable(sampler: Sampler, name: str) -> None:
    """Refuses a sampler that would call Python.

    Raises:
        ValueError: that says which can be exported.
    """
    if isinstance(sampler, Adaptive | DiffraxSDE) and os.environ.get(EQX_ON_ERROR) != "nan":
        raise ValueError(_calls_python(name))


def _calls_python(name: str) -> str:
    return (
        f"--solver {name} calls Python where a solve fails, which no exported program can: give one with fixed steps "
        f"that are not Diffrax's, such as heun, ab2, dpm_solver++_2m or ddpm. With {EQX_ON_ERROR}=nan in the "
        "environment it is exported, and gives NaN where it fails."
    )


def draw_x0(experiment: Experiment, seed: Array) -> tuple[Array, Array]:
    """The point of the source [1, ...] that a sample of this seed begins with, and the key of its noise on the way."""
    key_x0, key_sampler = jax.random.split(jax.random.key(seed))
    return experiment.draw_x0(key_x0, 1), key_sampler


def make_draw(generate: Generate, experiment: Experiment) -> Callable[..., Array]:
    """Builds `draw(params, seeds [batch], labels [batch] or None) -> samples [batch, ...]`.

    A sample depends on its own seed and label alone, whatever the batch, also with a sampler that is random.
    """

    def one(params: Params, seed: Array, label: Array | None) -> Array:
        x0, key = draw_x0(experiment, seed)
        x: Any = generate(params, key, x0, None if label is None else label[None]).x
        with jax.numpy_rank_promotion("allow"):  # as with NumPy's arrays
            return experiment.to_data(x)[0]

    def draw(params: Params, seeds: Array, labels: Array | None = None) -> Array:
        return jax.vmap(one, in_axes=(None, 0, None if labels is None else 0))(params, seeds, labels)

    return draw


def export_draw(
    draw: Callable[..., Array], params: Params, *, labelled: bool, platforms: tuple[str, ...], inside: bool
) -> export.Exported:
    """A sampler for any batch, as a program of its own.

    Args:
        draw: from `make_draw`.
        params: the network's.
        labelled: whether it takes labels.
        platforms: that it is made for.
        inside: whether the parameters are a part of it; else it takes them first, by name as `flat` does.

    Returns:
        Of the call `(seeds uint32 [batch])`, or `(seeds, labels int32 [batch])`.

    Raises:
        ValueError: if something in it calls Python.
    """
    (batch,) = export.symbolic_shape("batch")
    seeds_and_labels = [jax.ShapeDtypeStruct((batch,), dtype) for dtype in (jnp.uint32, jnp.int32)[: 1 + labelled]]
    on_host = jax.tree.map(np.asarray, params)  # wherever they are here, they belong to no device
    named = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flat(on_host).items()}

    def with_all_inside(*arguments: Array) -> Array:
        return draw(on_host, *arguments)

    def with_parameters(named: dict[str, Array], *arguments: Array) -> Array:
        return draw(nested(named), *arguments)

    sampler, arguments = (with_all_inside, []) if inside else (with_parameters, [named])
    sampler.__name__ = "draw"  # in what JAX says of a call that does not fit
    # Where this library lies on this machine is nobody's business.
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, ".*/")
    try:
        return export.export(jax.jit(sampler), platforms=platforms)(*arguments, *seeds_and_labels)
    except NotImplementedError as error:
        if "callback" not in str(error):
            raise
        raise ValueError(_calls_python("this")) from error
    finally:
        jax.config.update(name, before)


class Card(NamedTuple):
    """What a card is made of."""

    name: str
    """Of the files, without their endings."""
    facts: dict[str, Any]
    """Of the data, as in `data.json`."""
    config: dict[str, Any]
    """Of the run."""
    results: dict[str, Any]
    """As in `results.json`."""
    sampler: dict[str, Any]
    """What is fixed in the sampler."""
    step: int
    average: str
    shape: tuple[int, ...]
    num_classes: int | None
    num_params: int
    inside: bool
    license: str | None
    data_license: str | None


def portable(config: Any) -> dict[str, Any]:
    """A configuration as JSON values; of paths the last part alone, which say nothing away from their machine."""
    text = json.dumps(dataclasses.asdict(config), default=lambda x: x.name if isinstance(x, Path) else str(x))
    return json.loads(text)


def read_data(run_dir: Path, config: Any) -> dict[str, Any]:
    """What is known of the data of a run: its `data.json`, or else their name alone."""
    try:
        facts = json.loads((run_dir / "data.json").read_bytes())
        if isinstance(facts, dict):
            return facts
    except (OSError, ValueError):  # a run of toy data, or of an older version
        pass
    data = getattr(config, "dataset", None) or getattr(config, "data", None)
    name = data if isinstance(data, str) else getattr(data, "dataset", None)
    return {} if name is None else {"source": name}


_LICENSES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bsd bsd-2-clause bsd-3-clause cc cc0-1.0 "
    "cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-4.0 cc-by-nc-sa-4.0 gpl gpl-2.0 gpl-3.0 lgpl lgpl-3.0 agpl-3.0 mpl-2.0 unlicense wtfpl"
)
"""That the Hugging Face Hub knows by these names; any other is `other`, with a name of its own."""


def _front_matter(card: Card) -> list[str]:
    lines = ["---"]
    if card.license is not None and card.license.lower() in _LICENSES.split():
        lines.append(f"license: {card.license.lower()}")
    elif card.license is not None:
        lines += ["license: other", f"license_name: {json.dumps(card.license, ensure_ascii=False)}"]
    kind = "unconditional" if card.num_classes is None else "class-conditional"
    return [*lines, "library_name: fm_jax", "tags:", *(f"- {tag}" for tag in ("flow-matching", "jax", kind)), "---"]


def write_card(card: Card) -> str:
    """The text of a card: what is not known is not guessed."""
    labelled, shape = card.num_classes is not None, ", ".join(map(str, card.shape))
    images = len(card.shape) == 3
    source = _of(card.facts, "source")
    what = "images" if images else "points"
    classes = f" of {card.num_classes} classes" if labelled else ""
    parameters = [] if card.inside else ["import safetensors.numpy", ""]
    known = f"0 to {(card.num_classes or 0) - 1}"
    if card.config.get("label_dropout"):
        known += f", or {card.num_classes} for none"
    first = "" if card.inside else "params, "
    of_params = [] if card.inside else [f'params = safetensors.numpy.load_file("{card.name}.safetensors")']
    given = f"{first}seeds, labels" if labelled else f"{first}seeds"
    lines = [
        *_front_matter(card),
        MARK,
        "",
        f"# {card.name}",
        "",
        f"A flow-matching model that draws {what}{classes} [{shape}], trained with fm_jax on: {source}.",
        "",
        "## Data",
        "",
        *_table(_data_rows(card)),
        "",
        "## Training",
        "",
        *_table(_training_rows(card)),
        "",
        "## Results",
        "",
    ]
    if rows := _leaves(card.results):
        lines += [
            "As the run measured them when it ended, with its own sampler and its first average; they were not "
            "measured again for these files.",
            "",
            *_table(rows),
        ]
    else:
        lines.append(f"{NOT_STATED.capitalize()}.")
    lines += [
        "",
        "## Use",
        "",
        "With JAX and flatbuffers alone:",
        "",
        "```python",
        "import jax.export",
        "import numpy as np",
        *parameters,
        "",
        f'with open("{card.name}.jax_export", "rb") as file:',
        "    draw = jax.export.deserialize(bytearray(file.read())).call",
        *of_params,
        "seeds = np.arange(16, dtype=np.uint32)",
        *([f"labels = np.arange(16, dtype=np.int32) % {card.num_classes}"] if labelled else []),
        f"x = draw({given})  # float32 [16, {shape}]",
        "```",
        "",
        *_table(
            [
                ("seeds", "uint32 [batch]: a sample is a function of its own seed"),
                *([("labels", f"int32 [batch], {known}; others give NaN")] if labelled else []),
                ("returned", _returned(card)),
                *_leaves(card.sampler),
            ]
        ),
        "",
        "The parameters, as a Flax module takes them:",
        "",
        "```python",
        "import flax.traverse_util",
        "import safetensors.numpy",
        "",
        f'named = safetensors.numpy.load_file("{card.name}.safetensors")',
        'params = flax.traverse_util.unflatten_dict(named, sep=".")',
        "```",
        "",
        "## Limits",
        "",
        f"* The sampler runs on {', '.join(card.sampler['platforms'])}, and under a JAX up to six months newer, or "
        f"three weeks older, than {card.sampler['jax']}. The parameters have no such term.",
        "* Sampler, steps and guidance are fixed in it.",
        *(["* Samples are NaN where the solver does not reach its tolerance."] if "tolerance" in card.sampler else []),
        "* It draws what is like its data, with what they lack and overstate; it was not examined for anything else.",
        "",
        "## Licence",
        "",
        *_table([("model", card.license or NOT_STATED), ("data", card.data_license or NOT_STATED)]),
        "",
    ]
    return "\n".join(lines)


def _returned(card: Card) -> str:
    shape = ", ".join(map(str, card.shape))
    if len(card.shape) != 3:
        return f"float32 [batch, {shape}]"
    if card.facts.get("mean") is not None:
        return f"float32 [batch, {shape}], latents with the mean and variance of the data"
    return f"float32 [batch, {shape}], about -1 to 1; (x + 1) / 2, clipped, is a picture"


def _data_rows(card: Card) -> list[tuple[str, Any]]:
    names = card.facts.get("class_names")
    if isinstance(names, list | tuple) and names:
        classes = f"{len(names)}: {', '.join(map(str, names))}"
    else:
        classes = "none" if card.num_classes is None else str(card.num_classes)
    return [
        ("source", _of(card.facts, "source")),
        ("examples trained on", _of(card.facts, "num_images")),
        ("held out", _of(card.facts, "num_test")),
        ("classes", classes),
        ("checksum", _of(card.facts, "checksum")),
        ("licence", card.data_license or NOT_STATED),
    ]


def _training_rows(card: Card) -> list[tuple[str, Any]]:
    training, method, config = card.config.get("training", {}), card.config.get("method", {}), card.config
    network = config.get("model") or (
        f"MLP, {config['depth']} x {config['width']}" if "width" in config else NOT_STATED
    )
    warm, decay = training.get("warmup_steps"), training.get("decay")
    return [
        ("network", f"{network}, {card.num_params:,} parameters"),
        ("path", method.get("path", NOT_STATED)),
        ("prediction", method.get("prediction", NOT_STATED)),
        ("coupling", method.get("coupling", NOT_STATED)),
        ("steps", f"{card.step:,} of {_of(training, 'total_steps')}"),
        ("batch", _of(training, "batch_size")),
        ("optimiser", f"Adam, learning rate {_of(training, 'learning_rate')}, {warm} steps of warm-up, then {decay}"),
        ("clipped at norm", "none" if training.get("clip_norm", 0) is None else _of(training, "clip_norm")),
        ("weight decay", _of(training, "weight_decay")),
        ("average of the parameters", card.average),
        ("computed in", config.get("dtype", "float32")),
        ("seed", _of(training, "seed")),
    ]


def _of(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    return NOT_STATED if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _leaves(record: Mapping[str, Any], within: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            found += _leaves(value, f"{within}{name}, ")
        elif value is not None:
            found.append((within + str(name), " ".join(map(str, value)) if isinstance(value, list | tuple) else value))
    return found


def _table(rows: list[tuple[str, Any]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows)]


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
