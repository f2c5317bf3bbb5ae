r"""Which function implements which equation of the notebooks, and the equations themselves, read from the notebooks.

In a notebook an equation is an anchor, a blank line and a display with the tag of the same number:

    <a id="eq-5-3"></a>

    $$
    L_{CFM} = L_{FM} + C \tag{5.3}
    $$
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"

TABLE: dict[str, tuple[str, ...]] = {
    "fm_jax.types.VelocityFn": ("1.1",),
    "fm_jax.types.PathSample": ("3.4",),
    "fm_jax.types.Prediction": ("5.6",),
    "fm_jax.types.Coefficients": ("3.2",),
    "fm_jax.types.Diffusion": ("2.2",),
    "fm_jax.types.LossFn": ("11.1",),
    "fm_jax.schedules.Linear": ("3.2",),
    "fm_jax.schedules.Cosine": ("3.2",),
    "fm_jax.schedules.Polynomial": ("3.2",),
    "fm_jax.schedules.VP": ("2.9",),
    "fm_jax.schedules.LinearVP": ("3.2",),
    "fm_jax.schedules.VE": ("3.2",),
    "fm_jax.schedules.EDM": ("3.2",),
    "fm_jax.schedules.DDPM": ("2.9", "5.8"),
    "fm_jax.schedules.linear_betas": ("5.8",),
    "fm_jax.schedules.coefficients": ("3.2",),
    "fm_jax.schedules.log_snr": ("3.6",),
    "fm_jax.paths.AffinePath": ("3.2", "3.4"),
    "fm_jax.paths.targets": ("3.4", "3.5"),
    "fm_jax.paths.BrownianBridge": ("8.8",),
    "fm_jax.couplings.independent": ("8.1",),
    "fm_jax.couplings.ExactOT": ("8.6",),
    "fm_jax.couplings.minibatch_ot": ("8.6",),
    "fm_jax.couplings.EntropicOT": ("8.7",),
    "fm_jax.couplings.schrodinger_bridge_ot": ("8.7",),
    "fm_jax.losses.flow_matching": ("5.2", "5.3", "10.4"),
    "fm_jax.losses.score_matching": ("5.5",),
    "fm_jax.losses.noise_prediction": ("5.5",),
    "fm_jax.losses.error_scale": ("5.7",),
    "fm_jax.losses.SNRWeight": ("5.7", "10.4"),
    "fm_jax.losses.MinSNRWeight": ("10.4",),
    "fm_jax.losses.EDMWeight": ("10.4",),
    "fm_jax.losses.bridge_matching": ("8.8",),
    "fm_jax.parameterization.convert": ("4.10", "5.6"),
    "fm_jax.parameterization.velocity_fn": ("5.6",),
    "fm_jax.parameterization.score_fn": ("5.6",),
    "fm_jax.parameterization.reschedule": ("10.1", "10.2"),
    "fm_jax.guidance.classifier": ("6.2", "6.3"),
    "fm_jax.guidance.classifier_free": ("6.4",),
    "fm_jax.guidance.classifier_free_batched": ("6.4",),
    "fm_jax.guidance.Extrapolate": ("6.4",),
    "fm_jax.samplers.sample_ode": ("1.1", "1.4"),
    "fm_jax.samplers.ode_step": ("1.4",),
    "fm_jax.samplers.sample_ddim": ("5.9", "5.10", "5.11"),
    "fm_jax.samplers.sample_sde": ("2.2", "4.6", "4.7"),
    "fm_jax.samplers.sde_step": ("2.3", "4.7"),
    "fm_jax.samplers.sample_sde_diffrax": ("2.2", "4.7"),
    "fm_jax.likelihood.log_prob": ("7.4", "7.6"),
    "fm_jax.likelihood.encode_and_log_prob": ("7.4", "7.6"),
    "fm_jax.likelihood.sample_and_log_prob": ("7.4", "7.6"),
    "fm_jax.likelihood.bits_per_dim": ("7.8",),
    "fm_jax.divergence.Exact": ("7.1",),
    "fm_jax.divergence.Hutchinson": ("7.7",),
    "fm_jax.fewstep.reflow": ("8.9",),
    "fm_jax.oracles.log_prob": ("3.1",),
    "fm_jax.oracles.prediction": ("4.4", "4.8"),
    "fm_jax.oracles.velocity": ("4.2", "4.4"),
    "fm_jax.oracles.flow_map": ("1.2",),
    "fm_jax.oracles.bures_distance": ("8.5",),
    "fm_jax.oracles.monge_map": ("8.5",),
    "fm_jax.oracles.optimal_plan": ("8.5",),
    "fm_jax.oracles.entropic_plan": ("8.7",),
    "fm_jax.oracles.schroedinger_bridge": ("8.7", "8.8"),
    "fm_jax.metrics.path_energy": ("8.2",),
    "fm_jax.metrics.straightness": ("8.2",),
    "fm_jax.models.layers.sinusoidal_features": ("9.2",),
    "fm_jax.models.layers.TimeEmbedding": ("9.3",),
    "fm_jax.models.embed.add_condition": ("9.3",),
    "fm_jax.models.unet.ResBlock": ("9.4",),
    "fm_jax.models.UNet": ("9.5",),
    "fm_jax.models.DiT": ("9.6",),
    "fm_jax.models.dit.patchify": ("9.6",),
    "fm_jax.models.dit.DiTBlock": ("9.7",),
    "fm_jax.models.dit.modulate": ("9.7",),
    "fm_jax.train.parallel.pmap_step": ("11.3",),
    "fm_jax.train.parallel.shard_map_step": ("11.3",),
}
"""By what the reference calls an object: the equations that it implements."""

DISPLAY = re.compile(r'^<a id="eq-(\d+)-(\d+)"></a>\n\n\$\$\n(?P<latex>.*?)\n\$\$$', re.MULTILINE | re.DOTALL)
TAG = re.compile(r"\\tag\{([^}]*)\}")


class Equation(NamedTuple):
    """A numbered equation: `number` "5.3", in `notebook` "05_losses" under the heading `section`."""

    number: str
    notebook: str
    title: str
    section: str
    latex: str

    @property
    def anchor(self) -> str:
        """What a link to the equation ends in."""
        return "eq-" + self.number.replace(".", "-")


def read(folder: Path = NOTEBOOKS) -> dict[str, Equation]:
    """All numbered equations by their number, in the order of the notebooks.

    Raises:
        ValueError: for a tag without an anchor, with another's, or within an environment, where MathJax allows none;
            for a number used twice.
    """
    found: dict[str, Equation] = {}
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        text = "\n\n".join(markdown_cells(path))
        headings = list(re.finditer(r"^#+ (.*)", text, re.MULTILINE))
        displays = list(DISPLAY.finditer(text))
        for display in displays:
            number, latex = f"{display[1]}.{display[2]}", display["latex"]
            if TAG.findall(latex) != [number]:
                raise ValueError(f"{path.name}: the equation at eq-{display[1]}-{display[2]} is not ({number}).")
            if r"\end{" in latex.partition(r"\tag{")[2]:
                raise ValueError(f"{path.name}: the tag of ({number}) must come after the end of the environment.")
            if number in found:
                raise ValueError(f"{path.name}: ({number}) is in {found[number].notebook} too.")
            section = [each[1] for each in headings if each.start() < display.start()][-1]
            found[number] = Equation(number, path.stem, headings[0][1], section, latex)
        if len(displays) != len(TAG.findall(text)):
            raise ValueError(f"{path.name}: {len(TAG.findall(text))} tags, but {len(displays)} anchors with displays.")
    return found


def markdown_cells(path: Path) -> list[str]:
    """The texts of a notebook."""
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


def implementers(number: str) -> list[str]:
    """The objects that implement an equation."""
    return [name for name, numbers in TABLE.items() if number in numbers]


def implemented_by(name: str, known: dict[str, Equation]) -> list[str]:
    """Lines of reST that lead from an object to its equations; none if it has none."""
    by_notebook: dict[str, list[Equation]] = {}
    for number in TABLE.get(name, ()):
        if number in known:  # the check of the table says if not
            by_notebook.setdefault(known[number].notebook, []).append(known[number])
    places = [
        ", ".join(f":ref:`({each.number}) <{each.anchor}>`" for each in group)
        + f" in :doc:`{group[0].title} </notebooks/{notebook}>`"
        for notebook, group in by_notebook.items()
    ]
    word = "Equations" if len(TABLE.get(name, ())) > 1 else "Equation"
    return ["", ".. container:: derived", "", f"   {word} {'; '.join(places)}.", ""] if places else []
