"""One of two real processes, started by ``test_distributed.py``: does what a trainer does and prints JSON lines.

Arguments: the coordinator, the number of processes, which one this is.
"""

from __future__ import annotations

import json
import signal
import sys

import numpy as np

from mgpt4_jax.distributed import DistributedOptions, agree_max, barrier, initialize, is_main
from mgpt4_jax.errors import UserError

MESHES = ["", "fsdp=8", "data=2,fsdp=2,tensor=2", "data=2,tensor=4", "tensor=8", "fsdp=2,tensor=4"]
BATCH = 16
TRUTH = {"pixels": np.arange(BATCH * 6, dtype=np.float32).reshape(BATCH, 2, 3), "ids": np.arange(BATCH) * 10}


def say(name: str, value: object) -> None:
    print(json.dumps([name, value]), flush=True)


def refusal(function, *arguments) -> str:
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return "not refused"


def put(text: str) -> dict[str, object]:
    """Load only this process's rows, put them together, and read every row back."""
    import jax
    from jax.experimental import multihost_utils

    from mgpt4_jax.sharding import make_mesh, process_rows, put_batch

    mesh = make_mesh(text or None, all_devices=True)
    rows = process_rows(mesh, BATCH)
    batch = put_batch(mesh, {name: array[rows] for name, array in TRUTH.items()})
    whole = multihost_utils.process_allgather(batch, tiled=True)
    return {
        "rows": [rows.start, rows.stop],
        "shape": {name: array.shape for name, array in batch.items()},
        "shard": {name: array.addressable_shards[0].data.shape for name, array in batch.items()},
        "right": all(np.array_equal(whole[name], TRUTH[name]) for name in TRUTH),
        "sum": float(jax.jit(lambda batch: batch["pixels"].sum())(batch)),
    }


def main() -> None:
    coordinator, num_processes, process_id = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    before = signal.getsignal(signal.SIGTERM)
    initialize(DistributedOptions(coordinator, num_processes, process_id, 60))
    initialize(DistributedOptions(coordinator, num_processes, process_id, 60))  # a second call changes nothing

    import jax

    from mgpt4_jax.sharding import make_mesh, process_rows

    say("who", [jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count(), is_main()])
    say("sigterm", signal.getsignal(signal.SIGTERM) is before)
    for text in MESHES:
        say(f"mesh {text}", put(text))
    say("unused", refusal(make_mesh, "data=4"))
    say("uneven", refusal(process_rows, make_mesh("data=4,fsdp=2"), 12))
    say("agree", agree_max([5, 2**40 + 3][process_id]))
    say("negative", agree_max([-7, -9][process_id]))
    barrier("the end")
    say("done", True)


if __name__ == "__main__":
    main()
