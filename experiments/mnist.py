"""Class-conditional flow matching on MNIST (28x28).

Paper: Lipman et al. 2022 (arXiv:2210.02747); a network of the size of TorchCFM's MNIST notebook, with labels.
Command: `python -m experiments.mnist` (once before it: `python -m fm_jax.data.images mnist`).
Hardware and results: see `experiments/README.md`.
Expect: digits of every class that a person reads at once.
"""

from pathlib import Path

from experiments.lab.data import Data
from experiments.lab.images import Config, main
from experiments.lab.sampling import Sampling
from experiments.lab.training import Training

CONFIG = Config(
    data=Data(dataset="mnist"),
    model="mnist",
    training=Training(
        run_dir=Path("runs/mnist"),
        total_steps=5000,
        learning_rate=1e-3,
        warmup_steps=100,
        decay="cosine",
        ema_decays=(0.999,),
        log_every=25,
        save_every=250,
        sample_every=1000,
    ),
    sampling=Sampling(solver="heun", steps=15, guidance=2.0),
)

if __name__ == "__main__":
    main(CONFIG, __doc__)
