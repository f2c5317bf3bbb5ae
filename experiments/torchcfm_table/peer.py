"""Trains TorchCFM's methods between two-dimensional distributions, for `experiments.torchcfm_table` to judge.

Paper: Tong et al. 2023 (arXiv:2302.00482), and 2307.03672 for [SF]2M; the public classes of the package `torchcfm`.
Command: run by the table, in any interpreter that has torch, torchcfm and numpy; nothing of JAX is needed.
Hardware: one CPU core, 10 to 60 seconds a training of 20,000 steps.
Expect: for each training a file with the weights of TorchCFM's own 3 x 64 network and the seconds that it took.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

METHODS = ("I-CFM", "OT-CFM", "SB-CFM", "[SF]2M", "FM", "VP-CFM")


def make_matcher(method: str, sigma: float, bridge_sigma: float):
    """TorchCFM's object of that method, with its own default for everything but the noise level."""
    from torchcfm import conditional_flow_matching as cfm

    match method:
        case "I-CFM":
            return cfm.ConditionalFlowMatcher(sigma=sigma)
        case "OT-CFM":
            return cfm.ExactOptimalTransportConditionalFlowMatcher(sigma=sigma)
        case "SB-CFM" | "[SF]2M":
            return cfm.SchrodingerBridgeConditionalFlowMatcher(sigma=bridge_sigma, ot_method="exact")
        case "FM":
            return cfm.TargetConditionalFlowMatcher(sigma=sigma)
        case "VP-CFM":
            return cfm.VariancePreservingConditionalFlowMatcher(sigma=sigma)
    raise ValueError(f"method must be one of {METHODS}, got {method!r}.")


def train(job: dict) -> None:
    """Trains as the job says and writes the weights, in the layout of `fm_jax.models.PlainMLP`."""
    import torch
    from torchcfm.models.models import MLP

    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    np.random.seed(job["seed"])  # noqa: NPY002  TorchCFM draws its pairs from NumPy's global generator
    with np.load(job["data"]) as data:
        x1_train = torch.from_numpy(data["x1_train"])
        x0_train = torch.from_numpy(data["x0_train"]) if "x0_train" in data else None
    matcher = make_matcher(job["method"], job["sigma"], job["bridge_sigma"])
    with_score, batch = job["method"] == "[SF]2M", job["batch_size"]
    networks = [MLP(dim=2, w=64, time_varying=True) for _ in range(1 + with_score)]
    parameters = [p for network in networks for p in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=job["learning_rate"], weight_decay=job["weight_decay"])
    start = time.perf_counter()
    for _ in range(job["steps"]):
        x1 = x1_train[torch.randint(len(x1_train), (batch,))]
        x0 = torch.randn(batch, 2) if x0_train is None else x0_train[torch.randint(len(x0_train), (batch,))]
        optimizer.zero_grad()
        if with_score:
            t, x_t, u_t, noise = matcher.sample_location_and_conditional_flow(x0, x1, return_noise=True)
            inputs, weight = torch.cat([x_t, t[:, None]], dim=1), matcher.compute_lambda(t)[:, None]
            loss = ((networks[0](inputs) - u_t) ** 2).mean() + ((weight * networks[1](inputs) + noise) ** 2).mean()
        else:
            t, x_t, u_t = matcher.sample_location_and_conditional_flow(x0, x1)
            loss = ((networks[0](torch.cat([x_t, t[:, None]], dim=1)) - u_t) ** 2).mean()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    layers = {
        f"{n}/Dense_{i}/{name}": value.detach().numpy().T
        for n, network in enumerate(networks)
        for i, layer in enumerate(each for each in network.net if isinstance(each, torch.nn.Linear))
        for name, value in (("kernel", layer.weight), ("bias", layer.bias))
    }
    out = Path(job["out"])
    unfinished = out.with_name(f".{os.getpid()}-{out.name}")
    np.savez(unfinished, seconds=seconds, **layers)
    os.replace(unfinished, out)  # so that what is there is whole


def main() -> None:
    """Runs the jobs of a JSON file, one after another; those whose result exists are done."""
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if not Path(job["out"]).exists():
            train(job)


if __name__ == "__main__":
    main()
