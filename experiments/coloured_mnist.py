"""Composed digits in colour: two of MNIST's on 32x32 from a sentence, "a red three to the left of a blue seven".

Paper: Rombach et al. 2021 (arXiv:2112.10752) for attention to words in a U-Net.
Command: `python -m experiments.coloured_mnist` (once before it: `python -m fm_jax.data.images mnist`).
Hardware and results: two CPU cores, an hour; see `experiments/README.md`.
Expect: two blots of the right colours where they belong after a thousand steps, whose times lean towards noise, where
words alone say what is there; then their strokes, digit by digit.
"""

import dataclasses
from pathlib import Path

from experiments.lab.method import Method
from experiments.text_to_image import CONFIG as GREY
from experiments.text_to_image import main

CONFIG = dataclasses.replace(
    GREY,
    dataset="mnist",
    training=dataclasses.replace(
        GREY.training,
        run_dir=Path("runs/coloured_mnist"),
        total_steps=8700,
        batch_size=32,
        learning_rate=1.5e-3,
        warmup_steps=100,
    ),
    method=Method(times="logit_normal", time_shift=2.0, first_steps=1500),
)

if __name__ == "__main__":
    main(CONFIG, __doc__)
