"""Class-conditional flow matching on CIFAR-10 (32x32) with the 35.7M U-Net of TorchCFM.

Paper: Tong et al. 2023 (arXiv:2302.00482), appendix E: Adam 2e-4, 5,000 steps of warm-up, gradient norm 1, batch 128,
400,000 steps, EMA 0.9999, horizontal flips, dropout 0.1.
Command: `python -m experiments.cifar10 --dtype bfloat16` (once before it: `python -m fm_jax.data.images cifar10`);
with a transformer, `--model dit_s/2`; `--coupling minibatch_ot` is OT-CFM.
Hardware: an accelerator. The arithmetic floor of the paper's run is 0.7 hours of one H200; measured times are in
`experiments/README.md`.
Expect: the paper reports FID 3.6 for the unconditional model with an adaptive solver (134 to 146 NFE). FID is not
measured here yet.
"""

from pathlib import Path

from experiments.lab.data import Data
from experiments.lab.images import Config, main
from experiments.lab.sampling import Sampling
from experiments.lab.training import Training

CONFIG = Config(
    data=Data(dataset="cifar10"),
    model="cifar10",
    flip=True,
    dropout=0.1,
    training=Training(
        run_dir=Path("runs/cifar10"),
        total_steps=400_000,
        learning_rate=2e-4,
        warmup_steps=5000,
        ema_decays=(0.9999,),
        log_every=100,
        save_every=10_000,
        sample_every=10_000,
    ),
    sampling=Sampling(solver="heun", steps=25, guidance=2.0),
)

if __name__ == "__main__":
    main(CONFIG, __doc__)
