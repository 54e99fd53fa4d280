"""Several processes as one run: who they are, how they find each other, and the little that they agree on.

A run is one process for each host (or as many as a launcher starts), all with the same command. They are told of each
other by explicit options, by SLURM or by a TPU pod; a process that is alone starts nothing and waits for nobody.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from mgpt4_jax.errors import UserError

GRACE = 5.0
"""Seconds that a process has to end by itself, when another one has told of its error."""
_ERROR, _LEFT = "mgpt4/error", "mgpt4/left"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistributedOptions:
    """The explicit options: the first three all, or none of them.

    Args:
      coordinator: ``HOST:PORT`` where process 0 listens and that all others can reach.
      num_processes: of the whole run.
      process_id: of this one, from 0.
      initialization_timeout: seconds that a process waits for the others.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    initialization_timeout: int = 300

    def __post_init__(self) -> None:
        given = {"--coordinator": self.coordinator, "--num-processes": self.num_processes}
        given["--process-id"] = self.process_id
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            raise UserError(
                f"{' and '.join(missing)} missing: --coordinator, --num-processes and --process-id go together"
            )
        if self.initialization_timeout < 1:
            raise UserError(f"--initialization-timeout is in seconds from 1, got {self.initialization_timeout}")
        if missing:
            return
        if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):\d{1,5}", self.coordinator) or not 0 < self.port < 65536:
            raise UserError(f"--coordinator {self.coordinator!r} is not HOST:PORT, for example 10.0.0.1:1234")
        if self.num_processes < 1:
            raise UserError(f"--num-processes counts from 1, got {self.num_processes}")
        if not 0 <= self.process_id < self.num_processes:
            last = self.num_processes - 1
            raise UserError(f"--process-id {self.process_id} of {self.num_processes} processes: ids are 0 to {last}")

    @property
    def host(self) -> str:
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.coordinator.rpartition(":")[2])


@dataclass(frozen=True)
class Cluster:
    """What a process was told: ``options`` to be followed, or None where a TPU pod knows them.

    Args:
      source: ``options``, ``SLURM`` or ``TPU``: for messages.
      gpus: numbers of the GPUs that are this process's; () is all that it sees.
    """

    source: str
    options: DistributedOptions | None
    gpus: tuple[int, ...] = ()


def add_options(parser: Any) -> None:
    """Add the explicit options to a parser of ``argparse`` or ``jsonargparse``."""
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 of several listens")
    parser.add_argument("--num-processes", type=int, metavar="N", help="processes of this run, over all hosts")
    parser.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    parser.add_argument(
        "--initialization-timeout", type=int, default=300, metavar="SECONDS", help="how long to wait for the others"
    )


def options_from(arguments: Any) -> DistributedOptions:
    """The options that ``add_options`` added, from the parser's namespace."""
    return DistributedOptions(
        arguments.coordinator, arguments.num_processes, arguments.process_id, arguments.initialization_timeout
    )


def initialize(options: DistributedOptions | None = None) -> None:
    """Join the other processes of this run, if there are any; to be called before anything asks for a device.

    jax's preemption service stays off: it would take SIGTERM away from the program.

    Raises:
      UserError: the others are not found in time, or the coordinator's port is taken.
    """
    import jax

    options = options or DistributedOptions()
    if jax.distributed.is_initialized():
        return
    cluster = find_cluster(options, os.environ, jax.config.jax_platforms)
    if cluster is None:
        return
    jax.config.update("jax_enable_preemption_service", False)
    seconds = float(options.initialization_timeout)
    if cluster.options is None:
        _join(cluster, seconds, {})
    else:
        _join(cluster, _meet(cluster.options), _explicit(cluster))
    _log.info("process %d of %d, told by %s", jax.process_index(), jax.process_count(), cluster.source)


def find_cluster(options: DistributedOptions, environment: Mapping[str, str], platforms: str | None) -> Cluster | None:
    """Who this process belongs to, by its options and environment alone; None: it is alone.

    Args:
      options: explicit ones win over everything.
      environment: as ``os.environ``.
      platforms: jax's, which names ``tpu`` on a machine that has one, unless the user chose another.
    """
    if options.coordinator is not None:
        return Cluster("options", options) if options.num_processes > 1 else None
    if "SLURM_JOB_ID" in environment and "SLURM_PROCID" in environment:
        return _slurm(options, environment)
    if "tpu" in (platforms or "").split(","):
        hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
        told = hosts is not None or "TPU_SKIP_MDS_QUERY" in environment
        return None if told and "," not in (hosts or "") else Cluster("TPU", None)
    return None


def is_main() -> bool:
    """Whether this is process 0, which alone writes what is written once."""
    import jax

    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all processes are here; the name must be the same in all of them."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree_max(value: int) -> int:
    """The largest of the processes' values (of 64 bits), the same in all; waits for all of them and their devices."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    words = np.array([value], np.int64).view(np.uint32)  # jax would cut an int64 down to 32 bits
    return int(np.ascontiguousarray(multihost_utils.process_allgather(words)).view(np.int64).max())


# --- ending ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Around a run of the command line: an error in one of several processes ends all, in seconds, with its words.

    Left to jax, the others would wait five minutes for the one that failed, and then be aborted.
    """
    import jax

    if jax.process_count() == 1:
        yield
        return
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(over,), name="other processes", daemon=True)
    watch.start()
    try:
        with telling_others():
            yield
    except BaseException as error:
        atexit.register(_leave, _exit_code(error))  # before jax's own, which waits for the others
        raise
    finally:
        over.set()
        watch.join()


@contextlib.contextmanager
def telling_others() -> Iterator[None]:
    """Within ``ending_together``, around what comes before a clean-up that waits for the other processes."""
    import jax

    try:
        yield
    except BaseException as error:
        if jax.process_count() > 1:
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            _note(_ERROR, json.dumps([jax.process_index(), _exit_code(error), " ".join(text.split())]))
        raise


def _exit_code(error: BaseException) -> int:
    """As ``cli.main`` has it."""
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def _client() -> Any:
    """jax's line to its coordinator, which keeps notes for all processes."""
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()


def _note(key: str, text: str) -> None:
    """The first of several that leave the same note is heard; a coordinator that is gone hears none."""
    with contextlib.suppress(RuntimeError):
        _client().key_value_set(key, text)


def _watch(over: threading.Event) -> None:
    """End this process once another has told of its error, unless it does so by itself."""
    client = _client()
    while not over.wait(1.0):
        try:
            process, code, text = json.loads(client.key_value_try_get(_ERROR))
        except RuntimeError:  # no such note
            continue
        if not over.wait(GRACE):
            print(f"error: process {process} stopped: {text}", file=sys.stderr)
            _leave(code)


def _leave(code: int) -> None:
    """Exit without waiting for anything, but for the coordinator: it stays until the others have left."""
    import jax

    client, this = _client(), jax.process_index()
    sys.stdout.flush()
    sys.stderr.flush()
    _note(f"{_LEFT}/{this}", "")
    end = time.monotonic() + 3 * GRACE
    for other in range(1, jax.process_count() if this == 0 else 0):
        with contextlib.suppress(RuntimeError):
            client.blocking_key_value_get(f"{_LEFT}/{other}", max(int(1000 * (end - time.monotonic())), 1))
    os._exit(code)


# --- SLURM -----------------------------------------------------------------------------------------------


def _slurm(options: DistributedOptions, environment: Mapping[str, str]) -> Cluster | None:
    """What ``srun`` says of this task; None for a task that is alone.

    jax's own detection counts the tasks of the allocation, and would wait in vain in an interactive shell that has
    one; it gives each task one GPU; and it misreads node lists such as ``n[1-2]-ib``. The port is of its range.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1:
        if (allotted := int(environment.get("SLURM_NTASKS", "1"))) > 1:
            _log.warning("SLURM allotted %d tasks, but this one runs alone: start it by srun", allotted)
        return None
    port = 61440 + (int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])) % 4096
    told = environment.get("JAX_COORDINATOR_ADDRESS")
    coordinator = told or f"{first_host(environment['SLURM_STEP_NODELIST'])}:{port}"
    found = DistributedOptions(coordinator, tasks, int(environment["SLURM_PROCID"]), options.initialization_timeout)
    return Cluster("SLURM", found, _slurm_gpus(environment))


def first_host(node_list: str) -> str:
    """The first name of a SLURM node list: ``a[007-9,12]-ib,b3`` -> ``a007-ib``."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", node_list)[0]
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def _slurm_gpus(environment: Mapping[str, str]) -> tuple[int, ...]:
    """This task's share of the GPUs that it sees: all, unless it sees those of other tasks on its node too."""
    per_node = environment["SLURM_STEP_TASKS_PER_NODE"]  # "4(x2),2" is 4, 4, 2
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node)
    tasks = [int(count) for count, nodes in counts for _ in range(int(nodes or 1))][int(environment["SLURM_NODEID"])]
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    is_shared = len(visible) >= int(environment.get("SLURM_GPUS_ON_NODE", "0"))
    if tasks == 1 or not visible or not is_shared or "JAX_LOCAL_DEVICE_IDS" in environment:
        return ()
    if len(visible) % tasks:
        raise UserError(f"{tasks} tasks cannot share the {len(visible)} GPUs of a node; start one task for each node")
    share, task = len(visible) // tasks, int(environment["SLURM_LOCALID"])
    return tuple(range(task * share, (task + 1) * share))


# --- meeting ---------------------------------------------------------------------------------------------


def _explicit(cluster: Cluster) -> dict[str, Any]:
    options = cluster.options
    return {
        "coordinator_address": options.coordinator,
        "num_processes": options.num_processes,
        "process_id": options.process_id,
        "local_device_ids": cluster.gpus or None,
        "cluster_detection_method": "deactivate",  # all is said; it would ask the network, and share out GPUs
    }


def _meet(options: DistributedOptions) -> float:
    """Try the coordinator's port, as jaxlib ends the whole program where it cannot be used; seconds that are left."""
    end = time.monotonic() + options.initialization_timeout
    if options.process_id == 0:
        _check_free(options)
        return options.initialization_timeout
    while True:
        try:
            socket.create_connection((options.host, options.port), timeout=max(end - time.monotonic(), 0.1)).close()
            return max(end - time.monotonic(), 1.0)
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > end:
            raise UserError(
                f"process {options.process_id}: no coordinator at {options.coordinator} in "
                f"{options.initialization_timeout} s ({reason}); is process 0 running, and its port open to this host?"
            )
        time.sleep(0.2)


def _check_free(options: DistributedOptions) -> None:
    """Raise where another program listens on the port: two coordinators could share it, and mix two runs up."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", options.port))
        except OSError as error:
            raise UserError(
                f"port {options.port} of coordinator {options.coordinator} cannot be used ({error.strerror}); "
                "is another run on this host? Choose another port"
            ) from error


def _join(cluster: Cluster, seconds: float, options: dict[str, Any]) -> None:
    """Call jax's initialize in a thread: after its own time-out it ends the program, and meanwhile it is deaf to ^C."""
    import jax

    joined: Future[None] = Future()

    def run() -> None:
        try:
            jax.distributed.initialize(**options, initialization_timeout=int(seconds) + 3600)
        except BaseException as error:  # handed to the caller, below
            joined.set_exception(error)
        else:
            joined.set_result(None)

    threading.Thread(target=run, name="jax.distributed", daemon=True).start()
    try:
        joined.result(timeout=seconds)
    except TimeoutError as error:
        count = f"all {cluster.options.num_processes} processes" if cluster.options else "all hosts of the pod"
        raise UserError(
            f"not {count} came in {seconds:.0f} s ({cluster.source}); start the same command for each of them at the "
            "same time, or give more --initialization-timeout"
        ) from error
    except ValueError as error:  # JAX_PLATFORMS=tpu where no TPU is
        raise UserError(f"{cluster.source}: {error}; give --coordinator, --num-processes and --process-id") from error
