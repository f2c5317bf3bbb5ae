"""Published weights: read, written, and translated between their layouts and ours.

`open_model` and `save_model` are for folders of diffusers and transformers, `load` and `save` for files by given rules.
Each family has a file with its rules, `mmdit.py` and so on; `python -m fm_jax.weights.convert` makes
safetensors of pickles.
"""

from fm_jax.weights.folder import FAMILIES, open_model, save_model
from fm_jax.weights.formats import WeightsError
from fm_jax.weights.load import load
from fm_jax.weights.rules import Piece, Rules, rearrange, template_of
from fm_jax.weights.safetensors import Tensors, open_tensors
from fm_jax.weights.save import save

__all__ = [
    "FAMILIES",
    "Piece",
    "Rules",
    "Tensors",
    "WeightsError",
    "load",
    "open_model",
    "open_tensors",
    "rearrange",
    "save",
    "save_model",
    "template_of",
]
