"""One update of a small FLUX.1 on one device and on eight simulated ones: tensor parallel on two, cut over four.

Prints a line of JSON: the number of devices, the part of all numbers that lie on some devices alone, and the largest
relative distance of what the update adds to a leaf.
"""

import json
import os


def spec(path, shape):
    """Heads and hidden layers over `tensor`, the longest of the other axes that four divide over `fsdp`."""
    from jax.sharding import PartitionSpec

    names = [entry.key for entry in path]
    first = 1 if names[0] in ("doubles", "singles") else 0  # layers are not cut
    axes = [None] * len(shape)
    if names[-1] == "kernel" and first:
        layer = names[-2]
        inputs = any(name in layer for name in ("query", "key", "value", "mlp_in"))
        if inputs or layer.endswith("out"):
            axes[first + 1 if inputs else first] = "tensor"
    left = [i for i in range(first, len(shape)) if axes[i] is None and shape[i] % 4 == 0]
    if names[-1] == "kernel" and left:
        axes[max(left, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*axes)


def main():
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from fm_jax.losses import flow_matching
    from fm_jax.models import linen_apply
    from fm_jax.models.conditioning import Conditions
    from fm_jax.models.flux import make_flux
    from fm_jax.paths import AffinePath

    module = make_flux("tiny", guidance=True)
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731
    seen = jnp.asarray(np.arange(12) < np.arange(5, 13)[:, None])
    cond = Conditions(vector=normal(1, 8, 32), tokens=normal(2, 8, 12, 64), mask=seen, guidance=jnp.arange(8) + 0.5)
    batch = {"x1": normal(3, 8, 8, 12, 4), "cond": cond}
    template = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(8), batch["x1"], cond)["params"]
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[1:-1])))  # noqa: E731
    params = jax.tree.map(lambda leaf: draw(leaf).astype(np.float32), template)

    loss, optimizer = flow_matching(linen_apply(module), AffinePath()), optax.sgd(1e-2, momentum=0.9)

    def update(params, batch):
        grads, _ = jax.grad(loss, has_aux=True)(params, jax.random.key(4), batch)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    placed = jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, spec(path, leaf.shape)), params)
    examples = jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec("fsdp")), batch)
    many = jax.jit(update, out_shardings=placed)(jax.device_put(params, placed), jax.device_put(batch, examples))
    one = jax.jit(update)(*jax.device_put((params, batch), jax.devices()[0]))

    whole = sum(leaf.size for leaf in jax.tree.leaves(many) if leaf.sharding.is_fully_replicated)
    pairs = [map(np.asarray, pair) for pair in zip(*map(jax.tree.leaves, (one, many)), strict=True)]
    far = [float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in pairs]
    cut = 1 - whole / sum(leaf.size for leaf in jax.tree.leaves(many))
    print(json.dumps({"devices": len(jax.devices()), "cut": cut, "difference": max(far)}))


if __name__ == "__main__":
    main()
