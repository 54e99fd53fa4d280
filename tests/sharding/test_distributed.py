"""Several processes as one run: how they find each other, share the batch and agree; two of them are real."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jsonargparse import ArgumentParser
from sharding.two_processes import BATCH, MESHES, TRUTH

from mgpt4_jax.distributed import (
    Cluster,
    DistributedOptions,
    add_options,
    agree_max,
    barrier,
    find_cluster,
    first_host,
    initialize,
    is_main,
    options_from,
)
from mgpt4_jax.errors import UserError
from mgpt4_jax.sharding import arrange, batch_sharding, make_mesh, process_rows, put_batch

NONE = DistributedOptions()
WORKER = Path(__file__).parent / "two_processes.py"
SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[01-02]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}


# --- two real processes ----------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, arguments)],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "4"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    """What each of two processes, with 4 devices each, said."""
    address = f"127.0.0.1:{free_port()}"
    running = [start(address, 2, process) for process in range(2)]
    done = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], done
    return [dict(json.loads(line) for line in out.splitlines() if line.startswith('["')) for out, _ in done]


def test_two_processes_are_one_run(told: list[dict[str, Any]]) -> None:
    assert [said["who"] for said in told] == [[0, 2, 4, 8, True], [1, 2, 4, 8, False]]
    assert all(said["done"] for said in told)


def test_sigterm_is_left_to_the_program(told: list[dict[str, Any]]) -> None:
    assert all(said["sigterm"] for said in told)


@pytest.mark.parametrize("text", MESHES)
def test_each_process_loads_its_rows_and_the_batch_is_whole(told: list[dict[str, Any]], text: str) -> None:
    first, second = (said[f"mesh {text}"] for said in told)
    cut = 8 // int(dict([*[part.split("=") for part in text.split(",") if part], ("", "")]).get("tensor", 1))
    if cut == 1:  # tensor over both: they load the same rows
        assert first["rows"] == second["rows"] == [0, BATCH]
    else:
        assert [first["rows"], second["rows"]] == [[0, BATCH // 2], [BATCH // 2, BATCH]]
    for said in (first, second):
        assert said["right"]
        assert said["sum"] == TRUTH["pixels"].sum()
        assert said["shape"] == {"pixels": [BATCH, 2, 3], "ids": [BATCH]}
        assert said["shard"] == {"pixels": [BATCH // cut, 2, 3], "ids": [BATCH // cut]}


def test_a_mesh_or_batch_that_does_not_fit_is_refused_in_every_process(told: list[dict[str, Any]]) -> None:
    for said in told:
        assert said["unused"] == "mesh 'data=4' uses 4 of the 8 devices of 2 processes; use all"
        assert said["uneven"] == "batch_size 12 is not a multiple of data=4 x fsdp=2; take 8"


def test_they_agree_on_the_largest(told: list[dict[str, Any]]) -> None:
    for said in told:
        assert said["agree"] == 2**40 + 3  # more than 32 bits
        assert said["negative"] == -7


# --- failures to meet ------------------------------------------------------------------------------------


def fails(*arguments: object) -> str:
    """The error that ``initialize`` raises in a program of its own, which must end by itself."""
    program = (
        "import sys\nfrom mgpt4_jax.distributed import *\nfrom mgpt4_jax.errors import UserError\n"
        "try: initialize(DistributedOptions(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), 2))\n"
        "except UserError as error: print(error); sys.exit(2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert len(done.stdout.splitlines()) == 1
    return done.stdout


def test_no_coordinator() -> None:
    port = free_port()
    message = fails(f"127.0.0.1:{port}", 2, 1)
    assert f"process 1: no coordinator at 127.0.0.1:{port} in 2 s (Connection refused)" in message


def test_the_others_do_not_come() -> None:
    assert "not all 2 processes came in 2 s (options)" in fails(f"127.0.0.1:{free_port()}", 2, 0)


def test_the_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .* cannot be used .Address already in use.*another port"):
            initialize(DistributedOptions(f"127.0.0.1:{port}", 2, 0))


# --- who belongs together --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"coordinator": "a:1"}, "--num-processes and --process-id missing"),
        ({"num_processes": 2, "process_id": 0}, "--coordinator missing"),
        ({"process_id": 0}, "--coordinator and --num-processes missing"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process-id 2 of 2 processes: ids are 0 to 1"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": -1}, "ids are 0 to 1"),
        ({"coordinator": "a:1", "num_processes": 0, "process_id": 0}, "--num-processes counts from 1"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "'a' is not HOST:PORT"),
        ({"coordinator": "a:b", "num_processes": 2, "process_id": 0}, "'a:b' is not HOST:PORT"),
        ({"coordinator": "a:70000", "num_processes": 2, "process_id": 0}, "is not HOST:PORT"),
        ({"coordinator": "http://a:1", "num_processes": 2, "process_id": 0}, "is not HOST:PORT"),
        ({"initialization_timeout": 0}, "--initialization-timeout is in seconds from 1, got 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        DistributedOptions(**given)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("parser_class", [ArgumentParser, argparse.ArgumentParser])
def test_options_of_the_command_line(parser_class: type) -> None:
    parser = parser_class()
    add_options(parser)
    assert options_from(parser.parse_args([])) == NONE
    words = ["--coordinator", "[::1]:1234", "--num-processes", "2", "--process-id", "1"]
    options = options_from(parser.parse_args(words))
    assert options == DistributedOptions("[::1]:1234", 2, 1)
    assert (options.host, options.port) == ("::1", 1234)


def test_explicit_options_win_over_everything() -> None:
    options = DistributedOptions("a:1", 4, 3)
    assert find_cluster(options, SLURM, "tpu,cpu") == Cluster("options", options)
    assert find_cluster(DistributedOptions("a:1", 1, 0), SLURM, "tpu,cpu") is None


def test_slurm_with_one_task_a_node() -> None:
    found = find_cluster(NONE, SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}, "cuda,cpu")
    assert found == Cluster("SLURM", DistributedOptions("gpu01:62344", 2, 1), ())


def test_slurm_steps_of_one_job_have_ports_of_their_own() -> None:
    ports = {find_cluster(NONE, SLURM | {"SLURM_STEP_ID": step}, None).options.port for step in "012"}
    assert ports == {62344, 62345, 62346}


def test_slurm_coordinator_may_be_named() -> None:
    found = find_cluster(NONE, SLURM | {"JAX_COORDINATOR_ADDRESS": "ib0-gpu01:5000"}, None)
    assert found.options.coordinator == "ib0-gpu01:5000"


@pytest.mark.parametrize(
    ("visible", "on_node", "gpus"),
    [
        ("0,1,2,3", "4", (2, 3)),  # both tasks of a node see all: each takes its half
        ("2,3", "4", ()),  # SLURM gave each its own
        (None, "4", ()),
        ("0,1", None, (1,)),
    ],
)
def test_slurm_with_several_tasks_a_node(visible: str | None, on_node: str | None, gpus: tuple[int, ...]) -> None:
    told = {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    told |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    told |= {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    told |= {"SLURM_GPUS_ON_NODE": on_node} if on_node else {}
    assert find_cluster(NONE, SLURM | told, None).gpus == gpus
    assert find_cluster(NONE, SLURM | told | {"JAX_LOCAL_DEVICE_IDS": "0"}, None).gpus == ()


def test_slurm_tasks_that_cannot_share_the_gpus() -> None:
    told = {"SLURM_STEP_TASKS_PER_NODE": "2,3", "SLURM_STEP_NUM_TASKS": "5", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    with pytest.raises(UserError, match="3 tasks cannot share the 4 GPUs of a node; start one task for each node"):
        find_cluster(NONE, SLURM | told, None)


@pytest.mark.parametrize(
    "alone",
    [
        {},
        {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "1"},  # salloc
        {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},  # sbatch
        SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # an interactive shell of an allocation for two
        {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},  # in a batch script without srun
    ],
)
def test_a_process_that_is_alone_starts_nothing(alone: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    assert find_cluster(NONE, alone, "cuda,cpu") is None
    allotted_more = "SLURM_PROCID" in alone and alone["SLURM_NTASKS"] == "2"
    assert ("SLURM allotted 2 tasks, but this one runs alone: start it by srun" in caplog.text) == allotted_more


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("node1", "node1"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[3,007-015],host2", "node3"),
        ("n[1-2]-ib", "n1-ib"),
        ("rack[2-3]node[07-09],x", "rack2node07"),
        ("gpu-a-[12]", "gpu-a-12"),
    ],
)
def test_first_host_of_a_node_list(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


@pytest.mark.parametrize(
    ("environment", "platforms", "is_pod"),
    [
        ({}, "tpu,cpu", True),  # only the pod's own service knows how many hosts there are; jax asks it
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu", True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, "tpu,cpu", False),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"}, "tpu,cpu", True),
        ({"TPU_SKIP_MDS_QUERY": "1"}, "tpu,cpu", False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "cpu", False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None, False),
    ],
)
def test_tpu_pods(environment: dict[str, str], platforms: str | None, is_pod: bool) -> None:
    assert find_cluster(NONE, environment, platforms) == (Cluster("TPU", None) if is_pod else None)


def test_alone_everything_is_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("a process that is alone waits"))
    initialize(NONE)
    initialize(DistributedOptions("nowhere.invalid:1", 1, 0))
    barrier("alone")
    assert is_main()
    assert agree_max(-3) == -3


# --- meshes and batches ----------------------------------------------------------------------------------


def test_training_takes_every_device() -> None:
    assert dict(make_mesh(None, all_devices=True).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh("fsdp=4", all_devices=True).shape) == {"data": 1, "fsdp": 4, "tensor": 1}
    assert make_mesh(None).size == 1


def test_devices_left_unused_are_said(caplog: pytest.LogCaptureFixture) -> None:
    make_mesh("fsdp=4", all_devices=True)
    assert "mesh fsdp=4 leaves 4 of 8 devices unused" in caplog.text


def test_one_process_loads_all_rows() -> None:
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    assert process_rows(mesh, 12) == slice(0, 12)
    pixels = np.arange(24.0, dtype=np.float32).reshape(12, 2)
    put = put_batch(mesh, {"pixels": pixels})["pixels"]
    assert put.sharding == batch_sharding(mesh)
    assert {shard.data.shape for shard in put.addressable_shards} == {(3, 2)}
    np.testing.assert_array_equal(put, pixels)


def test_a_batch_that_does_not_divide_is_refused_with_the_figures() -> None:
    mesh = make_mesh("data=2,fsdp=4")
    with pytest.raises(UserError, match="batch_size 20 is not a multiple of data=2 x fsdp=4; take 16"):
        process_rows(mesh, 20)
    with pytest.raises(UserError, match="batch_size 3 is not a multiple of data=2 x fsdp=4; take 8"):
        process_rows(mesh, 3)
    with pytest.raises(UserError, match="20 rows of a batch cannot be cut into the 8 parts"):
        put_batch(mesh, np.zeros((20, 3)))


def processes_of(devices: np.ndarray) -> list[list[int]]:
    """Which processes hold each row of the batch."""
    return [sorted({device.process_index for device in row}) for row in devices.reshape(-1, devices.shape[2])]


def pod(kind: str = "TPU v5 lite") -> list[SimpleNamespace]:
    """A v5e 4x4: 16 chips, numbered by row, and 4 hosts with a square of 2x2 each."""
    return [
        SimpleNamespace(
            id=y * 4 + x,
            process_index=(y // 2) * 2 + x // 2,
            coords=(x, y, 0),
            core_on_chip=0,
            platform="tpu",
            device_kind=kind,
        )
        for y in range(4)
        for x in range(4)
    ]


@pytest.mark.parametrize("shape", [(16, 1, 1), (1, 16, 1), (4, 4, 1), (2, 8, 1), (4, 1, 4), (2, 2, 4)])
def test_hosts_of_a_pod_load_whole_neighbouring_rows(shape: tuple[int, ...]) -> None:
    """jax's own order winds through the hosts' squares, and knows none for some of these meshes."""
    rows = processes_of(arrange(pod(), shape))
    assert rows == [[process] for process in range(4) for _ in range(len(rows) // 4)]


def test_tensor_over_hosts_of_a_pod() -> None:
    assert processes_of(arrange(pod(), (2, 1, 8))) == [[0, 1], [2, 3]]


def test_processes_that_would_share_rows_in_part_are_refused() -> None:
    devices = [SimpleNamespace(id=i, process_index=i // 3, platform="cpu", device_kind="cpu") for i in range(6)]
    with pytest.raises(UserError, match="mesh data=3,fsdp=1,tensor=2: a process has 3 devices; tensor must divide"):
        arrange(devices, (3, 1, 2))
    assert processes_of(arrange(devices, (2, 1, 3))) == [[0], [1]]
