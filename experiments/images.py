"""Flow matching on your own images: a folder of pictures, arrays, a data set of TFDS, or ArrayRecord.

Paper: Lipman et al. 2022 (arXiv:2210.02747) for the method, Ho & Salimans 2022 (arXiv:2207.12598) for the guidance.
Command: `python -m experiments.images --folder DIR --size 64`; with `--npz FILE`, `--tfds NAME`, `--array-record FILE`
or `--dataset NAME` in place of a folder. Classes are the subfolders, or those of `--csv FILE`; without any the network
is unconditional. Pictures are cropped to the size (`--fit crop`), resized or padded.
Hardware: two CPU cores for small pictures and `--model tiny`; an accelerator for more.
Expect: samples beside real images, the training images nearest to them, an animation from noise to data, the loss.
`docs/howto/own_images.md` goes through it.
"""

from pathlib import Path

from experiments.lab.data import Data
from experiments.lab.images import Config, main
from experiments.lab.sampling import Sampling
from experiments.lab.training import Training

CONFIG = Config(
    data=Data(),
    training=Training(
        run_dir=Path("runs/images"),
        total_steps=5000,
        batch_size=64,
        warmup_steps=100,
        decay="cosine",
        ema_decays=(0.995,),
        sample_every=1000,
    ),
    sampling=Sampling(sample_batch=50),
    num_samples=100,
)

if __name__ == "__main__":
    main(CONFIG, __doc__)
