"""One of several processes that save or restore one sharded state together.

python sharded_script.py RUN_DIR save|restore --address HOST:PORT --processes N --process I --mesh 4x1 --spec a,None

The state is so many megabytes of numbers that follow from their places. What is found is printed, a line of JSON each.
"""

import argparse
import json
import os
import re
import resource
import sys
from pathlib import Path


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("actions", nargs="+", choices=("save", "save_local", "save_bad", "restore", "other", "apart"))
    parser.add_argument("--address", required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--mesh", type=lambda text: tuple(map(int, text.split("x"))), required=True)
    parser.add_argument("--spec", required=True, help="the axes of the mesh, a and b, for those of an array: b,None")
    parser.add_argument("--megabytes", type=int, default=1)
    return parser.parse_args()


def main():
    options = parse()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = ""  # one device each
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(options.address, options.processes, options.process)
    run(options)


def run(options):
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from fm_jax.train.checkpoint import Checkpointer, CheckpointError
    from fm_jax.train.state import TrainState

    mesh = Mesh(np.array(jax.devices()).reshape(options.mesh), ("a", "b")[: len(options.mesh)])
    spread = NamedSharding(mesh, PartitionSpec(*(None if each == "None" else each for each in options.spec.split(","))))
    whole = NamedSharding(mesh, PartitionSpec())
    shape = (1920, options.megabytes * 2**20 // (1920 * 16 * 4))  # of 16 arrays

    def values(i, index):
        rows, columns = (np.arange(*part.indices(n), dtype=np.uint32) for part, n in zip(index, shape, strict=True))
        place = rows[:, None] * np.uint32(shape[1]) + columns[None] + np.uint32(i << 28)
        return (place * np.uint32(2654435761)).view(np.float32)

    def make(array):
        params = {f"w{i}": array(shape, np.float32, spread, lambda index, i=i: values(i, index)) for i in range(16)}
        step = array((), np.int32, whole, lambda _: np.int32(7))
        return TrainState(step, params, (), {})

    def struct(shape, dtype, sharding, _):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def filled(shape, dtype, sharding, callback):
        return jax.make_array_from_callback(shape, sharding, callback)

    def report(**found):
        print(json.dumps(found), flush=True)

    options.run_dir.mkdir(exist_ok=True)
    key = jax.random.key(3)
    for action in options.actions:
        if action == "apart":  # a folder of the same name, as it were, on each machine
            own = options.run_dir / str(options.process)
            (own / "checkpoints").mkdir(parents=True)
            try:
                Checkpointer(own, {})
            except CheckpointError as error:
                report(refused=str(error), left=[path.name for path in (own / "checkpoints").iterdir()])
            continue
        checkpointer = Checkpointer(options.run_dir, {"a": 2 if (action, options.process) == ("other", 1) else 1})
        try:
            if action.startswith("save"):
                state = make(filled)
                if action == "save_local":  # as if this were its own
                    state = state._replace(step=jax.numpy.int32(7))
                bad = action == "save_bad" and options.process == 1
                checkpointer.save(state, key, {"position": (7,) if bad else 7})
                checkpointer.wait()
                report(latest=checkpointer.latest_step())
            else:
                state, restored_key, position = checkpointer.restore(make(struct))
                wrong = [
                    f"w{i}"
                    for i in range(16)
                    for each in state.params[f"w{i}"].addressable_shards
                    if np.asarray(each.data).tobytes() != values(i, each.index).tobytes()
                ]
                report(
                    step=int(state.step),
                    wrong=wrong,
                    placed=all(x.sharding == spread for x in state.params.values()),
                    same_key=bool((jax.random.key_data(key) == jax.random.key_data(restored_key)).all()),
                    position=position,
                    devices=checkpointer.restored_devices,
                    processes=checkpointer.restored_processes,
                )
        except CheckpointError as error:
            report(refused=str(error))
        except ValueError as error:
            report(bad=str(error))
        checkpointer.close()
        state = None
    report(peak=peak_megabytes())


def peak_megabytes():
    """Of this program alone: what `getrusage` says begins at the size of the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    sys.exit(main())
