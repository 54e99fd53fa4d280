"""The scripts of ``launch/``: what they start, proved by stand-ins for ``mgpt4``, ``srun`` and ``gcloud``."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"
STAND_IN = Path(__file__).parent / "stand_in.py"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))
FRONT = {"a100.sh": [], "a100_slurm.sh": [], "tpu_pod.sh": ["--name", "my-pod", "--zone", "us-east5-a"]}
# Every kind of word that a shell could spoil.
TRAINING = ["--config", "my runs/a.yaml", "--optim.peak_lr", "3e-5", "--text.end_symbol", "\n", "--text.instructions"]
TRAINING += ['["<Img><ImageHere></Img> What\'s \\"this\\"? $HOME `ls` 你好"]', "--mesh=data=2,fsdp=4", "--help", ""]

Bin = Path


@pytest.fixture
def record(tmp_path: Path) -> Path:
    (tmp_path / "record").mkdir()
    return tmp_path / "record"


@pytest.fixture
def programs(tmp_path: Path) -> Bin:
    """A folder of programs for PATH; ``mgpt4`` there notes how it was called."""
    (tmp_path / "bin").mkdir()
    add_program(tmp_path / "bin", "mgpt4", f'exec {shlex.quote(sys.executable)} {shlex.quote(str(STAND_IN))} "$@"')
    return tmp_path / "bin"


def add_program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


def environment(programs: Bin, record: Path | None = None, **more: object) -> dict[str, str]:
    """PATH holds our programs and the system's, but neither an ``mgpt4`` nor a ``gcloud`` that may be installed."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "XLA_", "NCCL_", "MGPT4"))}
    system = programs.parent / "system"
    if not system.exists():
        system.mkdir()
        for tool in ("bash", "env", "cat", "sh"):
            (system / tool).symlink_to(
                Path("/usr/bin", tool) if Path("/usr/bin", tool).exists() else Path("/bin", tool)
            )
    told = {"PATH": f"{programs}:{system}"} | ({"RECORD": str(record)} if record else {})
    return inherited | told | {name: str(value) for name, value in more.items()}


def launch(script: str, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LAUNCH / script), *words], capture_output=True, text=True, timeout=60, check=False, **options
    )


def notes(record: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(record.glob("*.json"))]


# --- what every script does ------------------------------------------------------------------------------


def test_all_scripts_are_here() -> None:
    assert SCRIPTS == sorted(FRONT)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script: str) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    found = subprocess.run(
        [shellcheck, "--norc", "--severity=style", "--enable=deprecate-which,quote-safe-variables", LAUNCH / script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_starts_nothing_wherever_it_stands(script: str, tmp_path: Path, programs: Bin, record: Path) -> None:
    for tool in ("srun", "gcloud"):
        add_program(programs, tool, f": >{record}/started.json")
    first = launch(script, "--dry-run", *FRONT[script], *TRAINING, cwd=tmp_path, env=environment(programs, record))
    last = launch(script, *FRONT[script], *TRAINING, "--dry-run", cwd=tmp_path, env=environment(programs, record))
    assert (first.returncode, first.stderr) == (0, "")
    assert last.stdout == first.stdout
    assert len(first.stdout.splitlines()) == 1
    assert list(record.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_its_example(script: str, programs: Bin) -> None:
    """The example of ``--help`` is a command that the script takes."""
    add_program(programs, "sbatch", 'while [[ $1 != *.sh ]]; do shift; done; exec "$@"')
    for word in ("--help", "-h"):
        done = launch(script, word, env=environment(programs))
        assert (done.returncode, done.stderr) == (0, "")
        assert f"launch/{script}" in done.stdout.splitlines()[0]
        assert max(map(len, done.stdout.splitlines())) <= 120
    examples = [
        line for line in done.stdout.replace("\\\n", "").splitlines() if re.match(rf"  (\S+ )*launch/{script} ", line)
    ]
    assert examples
    for example in examples:
        command = example.replace(f"launch/{script}", f"launch/{script} --dry-run")
        done = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env=environment(programs), capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "train --config configs/minigpt4_stage1_" in done.stdout.replace("\\", "") or "--coordinator" in command


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("words", [["--dryrun", "--config", "a.yaml"], ["--nmae", "x"], ["stray"], ["--optim.lr", "1"]])
def test_unknown_options_are_refused(script: str, words: list[str], programs: Bin, record: Path) -> None:
    done = launch(script, *FRONT[script], *words, env=environment(programs, record))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: unknown option {words[0]}: options of mgpt4 train come after --config")
    assert len(done.stderr.splitlines()) == 1
    assert notes(record) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_to_train(script: str, programs: Bin) -> None:
    done = launch(script, *FRONT[script], env=environment(programs))
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing to train: give --config FILE")


@pytest.mark.parametrize(
    ("script", "more", "says"),
    [
        ("a100.sh", {}, "mgpt4: not found; activate its environment, or set MGPT4 to its path"),
        ("a100.sh", {"MGPT4": "/no/such"}, "/no/such: not found"),
        ("a100_slurm.sh", {"SLURM_JOB_ID": "5"}, "mgpt4: not found"),
        ("a100_slurm.sh", {}, "not in a SLURM job: sbatch launch/a100_slurm.sh"),
        ("tpu_pod.sh", {}, "gcloud: not found"),
    ],
)
def test_a_program_that_is_missing(script: str, more: dict[str, str], says: str, programs: Bin) -> None:
    (programs / "mgpt4").unlink()
    done = launch(script, *FRONT[script], *TRAINING, env=environment(programs, **more))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {says}")


def test_both_kinds_of_gpu_host_get_the_same_environment(programs: Bin) -> None:
    one = launch("a100.sh", "--dry-run", *TRAINING, env=environment(programs)).stdout
    many = launch("a100_slurm.sh", "--dry-run", *TRAINING, env=environment(programs)).stdout
    assert many.startswith("srun ")
    assert many.endswith(f" {one}")


# --- a100.sh ---------------------------------------------------------------------------------------------


def test_a100_hands_everything_on(tmp_path: Path, programs: Bin, record: Path) -> None:
    done = launch("a100.sh", *TRAINING, cwd=tmp_path, env=environment(programs, record))
    assert (done.returncode, done.stderr) == (0, "")
    (note,) = notes(record)
    assert note["words"] == ["train", *TRAINING]
    assert note["folder"] == str(tmp_path)  # relative paths are the caller's
    assert note["environment"] == {
        "XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true",
        "XLA_CLIENT_MEM_FRACTION": "0.92",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": None,
        "NCCL_DEBUG": "WARN",
    }


def test_a100_prints_exactly_what_it_runs(tmp_path: Path, programs: Bin, record: Path) -> None:
    printed = launch("a100.sh", "--dry-run", *TRAINING, cwd=tmp_path, env=environment(programs, record)).stdout
    launch("a100.sh", *TRAINING, cwd=tmp_path, env=environment(programs, record))
    subprocess.run(["bash", "-c", printed], cwd=tmp_path, env=environment(programs, record), check=True)
    ran, pasted = notes(record)
    assert ran == pasted


def test_a100_keeps_what_the_user_set(programs: Bin, record: Path) -> None:
    mine = {"XLA_FLAGS": "--xla_a=1 --xla_b=2", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".5", "NCCL_DEBUG": "INFO"}
    launch("a100.sh", *TRAINING, env=environment(programs, record, **mine))
    assert notes(record)[0]["environment"] == {
        "XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true --xla_a=1 --xla_b=2",  # theirs wins
        "XLA_CLIENT_MEM_FRACTION": ".5",  # jax refuses both names together
        "XLA_PYTHON_CLIENT_MEM_FRACTION": None,
        "NCCL_DEBUG": "INFO",
    }


def test_a100_ends_as_the_trainer_does(programs: Bin, record: Path) -> None:
    done = launch("a100.sh", *TRAINING, env=environment(programs, record, STAND_IN_EXIT=143))
    assert done.returncode == 143


def test_a100_finds_the_program_by_variable(tmp_path: Path, programs: Bin, record: Path) -> None:
    (programs / "mgpt4").rename(tmp_path / "my mgpt4")
    done = launch("a100.sh", *TRAINING, cwd=tmp_path, env=environment(programs, record, MGPT4="./my mgpt4"))
    assert done.returncode == 0
    assert notes(record)[0]["words"] == ["train", *TRAINING]


def test_the_flags_are_known_to_xla(programs: Bin) -> None:
    """An unknown one ends the program: a jaxlib that drops one must be noticed here."""
    printed = shlex.split(launch("a100.sh", "--dry-run", *TRAINING, env=environment(programs)).stdout)
    (flags,) = (word.partition("=")[2] for word in printed if word.startswith("XLA_FLAGS="))
    program = "import jax; print(jax.devices()[0].platform)"
    for given, fine in ((flags, True), (f"{flags} --xla_no_such_flag=true", False)):
        done = subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "XLA_FLAGS": given}, capture_output=True, check=False
        )
        assert (done.returncode == 0) == fine


def free_port(*numbers: int) -> int:
    for number in numbers or (0,):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", number))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise AssertionError("no port is free")


def test_a100_starts_two_processes_that_find_each_other(programs: Bin, record: Path) -> None:
    words = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
    env = environment(programs, record, STAND_IN_JOIN=1, JAX_NUM_CPU_DEVICES=1)
    both = [
        subprocess.Popen(
            [str(LAUNCH / "a100.sh"), *words, str(process), "--config", "a.yaml"], env=env, stderr=subprocess.PIPE
        )
        for process in range(2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    found = sorted(notes(record), key=lambda note: note["joined"]["process"])
    for process, note in enumerate(found):
        assert note["words"] == ["train", *words, str(process), "--config", "a.yaml"]
        assert note["joined"] == {"process": process, "processes": 2, "sum": 41}


# --- a100_slurm.sh ---------------------------------------------------------------------------------------

# Two tasks on two nodes, as SLURM would start them, but on this host: everything from `env` on is the task's command.
SRUN = """
printf '%s\\n' "$@" >"$RECORD/srun.txt"
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=127.0.0.1,other2
export SLURM_STEP_TASKS_PER_NODE='1(x2)' SLURM_LOCALID=0
SLURM_PROCID=1 SLURM_NODEID=1 "$@" &
SLURM_PROCID=0 SLURM_NODEID=0 "$@"
status=$?
wait $! || status=$?
exit $status
"""


@pytest.fixture
def slurm(programs: Bin, record: Path) -> dict[str, str]:
    add_program(programs, "srun", SRUN)
    add_program(programs, "scontrol", f'printf "%s " "$@" >"{record}/scontrol.txt"')
    job = free_port(*range(61440, 65535)) - 61440  # whose port is free
    return environment(programs, record, SLURM_JOB_ID=job, JAX_NUM_CPU_DEVICES=1)


def test_slurm_starts_two_tasks_that_find_each_other(slurm: dict[str, str], record: Path) -> None:
    done = launch("a100_slurm.sh", *TRAINING, env=slurm | {"STAND_IN_JOIN": "1"})
    assert done.returncode == 0, done.stderr
    found = notes(record)
    assert [note["words"] for note in found] == [["train", *TRAINING]] * 2
    joined = sorted((note["joined"] for note in found), key=lambda joined: joined["process"])
    assert joined == [{"process": process, "processes": 2, "sum": 41} for process in range(2)]
    assert not (record / "scontrol.txt").exists()


def test_slurm_one_task_a_node_with_all_its_cores(slurm: dict[str, str], record: Path) -> None:
    launch("a100_slurm.sh", *TRAINING, env=slurm | {"SLURM_CPUS_PER_TASK": "64"})
    words = (record / "srun.txt").read_text().splitlines()
    given = ["--ntasks-per-node=1", "--cpus-per-task=64", "--cpu-bind=none", "--kill-on-bad-exit=0"]
    assert words[: words.index("env")] == given


def test_slurm_prints_exactly_what_it_runs(slurm: dict[str, str], record: Path) -> None:
    printed = launch("a100_slurm.sh", "--dry-run", *TRAINING, env=slurm).stdout
    launch("a100_slurm.sh", *TRAINING, env=slurm)
    ran = (record / "srun.txt").read_text()
    subprocess.run(["bash", "-c", printed], env=slurm, check=True)
    assert (record / "srun.txt").read_text() == ran


@pytest.mark.parametrize(("code", "again"), [(143, True), (0, False), (1, False), (130, False)])
def test_slurm_queues_a_saved_run_again(slurm: dict[str, str], record: Path, code: int, again: bool) -> None:
    done = launch("a100_slurm.sh", *TRAINING, env=slurm | {"STAND_IN_EXIT": str(code)})
    assert done.returncode == code
    asked = (record / "scontrol.txt").read_text() if (record / "scontrol.txt").exists() else None
    assert asked == (f"requeue {slurm['SLURM_JOB_ID']} " if again else None)


def test_slurm_asks_for_what_saving_needs() -> None:
    """sbatch reads these lines up to the first command."""
    head = (LAUNCH / "a100_slurm.sh").read_text().split("set -euo")[0]
    asked = set(re.findall(r"^#SBATCH (.+)$", head, re.MULTILINE))
    assert {"--requeue", "--signal=TERM@300", "--open-mode=append", "--ntasks-per-node=1", "--gpus-per-node=8"} <= asked


# --- tpu_pod.sh ------------------------------------------------------------------------------------------


def test_tpu_runs_the_same_command_on_all_workers(tmp_path: Path, programs: Bin, record: Path) -> None:
    """The fake gcloud hands --command to a shell in another folder, as a worker's ssh does."""
    home = tmp_path / "worker"
    (home / "my code").mkdir(parents=True)
    add_program(
        programs,
        "gcloud",
        f'last=${{@: -1}}\nprintf "%s\\n" "${{@:1:$#-1}}" >"{record}/gcloud.txt"\n'
        f'cd "{home}"\nexec bash -c "${{last#--command=}}"',
    )
    front = [*FRONT["tpu_pod.sh"], "--project=p1", "--directory", "my code"]
    done = launch("tpu_pod.sh", *front, *TRAINING, cwd=tmp_path, env=environment(programs, record))
    assert (done.returncode, done.stderr) == (0, "")
    asked = (record / "gcloud.txt").read_text().split("\n")[:-1]
    expected = ["compute", "tpus", "tpu-vm", "ssh", "my-pod", "--zone=us-east5-a", "--project=p1", "--worker=all"]
    assert asked == expected
    (note,) = notes(record)
    assert note["words"] == ["train", *TRAINING]
    assert note["folder"] == str(home / "my code")
    printed = launch(
        "tpu_pod.sh", "--dry-run", *front, *TRAINING, cwd=tmp_path, env=environment(programs, record)
    ).stdout
    subprocess.run(["bash", "-c", printed], cwd=tmp_path, env=environment(programs, record), check=True)
    assert notes(record)[0] == notes(record)[1]


def test_tpu_names_the_program_of_the_workers(programs: Bin) -> None:
    done = launch(
        "tpu_pod.sh", *FRONT["tpu_pod.sh"], "--dry-run", "--config", "a", env=environment(programs, MGPT4="b/c d")
    )
    words = shlex.split(done.stdout)
    assert words[-1] == r"--command=b/c\ d train --config a"
    assert "--project" not in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config", "a"], "--name POD is missing"),
        (["--name", "a", "--config", "a"], "--zone ZONE is missing"),
        (["--name", "--zone", "z"], "--name needs a value, got --zone"),
        (["--name=a", "--zone"], "--zone needs a value"),
        (["--name", "", "--zone=z", "--config", "a"], "--name POD is missing"),
    ],
)
def test_tpu_what_is_missing_is_said(words: list[str], says: str, programs: Bin) -> None:
    done = launch("tpu_pod.sh", *words, env=environment(programs))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {says}")
