"""Class-conditional flow matching on Fashion-MNIST (28x28).

Paper: Lipman et al. 2022 (arXiv:2210.02747); Xiao et al. 2017 (arXiv:1708.07747) for the data.
Command: `python -m experiments.fashion_mnist` (once before it: `python -m fm_jax.data.images fashion_mnist`).
Hardware and results: see `experiments/README.md`.
Expect: garments of the requested class. A classifier on pixels names real held-out images right in about nine of ten.
"""

from pathlib import Path

from experiments.lab.data import Data
from experiments.lab.images import Config, main
from experiments.lab.sampling import Sampling
from experiments.lab.training import Training

CONFIG = Config(
    data=Data(dataset="fashion_mnist"),
    model="mnist",
    flip=True,
    training=Training(
        run_dir=Path("runs/fashion_mnist"),
        total_steps=10_000,
        learning_rate=1e-3,
        warmup_steps=100,
        decay="cosine",
        ema_decays=(0.999,),
        save_every=500,
        sample_every=2000,
    ),
    sampling=Sampling(solver="heun", steps=20, guidance=2.0),
)

if __name__ == "__main__":
    main(CONFIG, __doc__)
