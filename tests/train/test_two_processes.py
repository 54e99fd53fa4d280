"""Two real processes train as one run: they stop, save, fail and go on together, and one process goes on from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from mgpt4_jax.checkpoint import load_params, read_manifest
from mgpt4_jax.cli import main
from mgpt4_jax.config import IGNORED
from mgpt4_jax.data.batching import pad_sequences
from mgpt4_jax.data.images import load_image, normalise, resize
from mgpt4_jax.data.prompts import get_template
from mgpt4_jax.data.rows import RowBuilder
from mgpt4_jax.data.samples import Sample
from mgpt4_jax.models import build
from mgpt4_jax.train.run_log import read_log, read_losses
from mgpt4_jax.train_config import TextConfig
from tests.train.world import config_of, write_pictures, write_tiny_model

ROOT = Path(__file__).parent.parent.parent
PROGRAM = Path(sys.executable).parent / "mgpt4"
STEPS, EVERY = 40, 4
LIMIT = 240  # seconds for two starts on a busy machine; jax alone would wait 300 for a process that failed


@dataclass(frozen=True)
class World:
    """Tiny data with pictures that cannot be read, and the configuration of all runs here."""

    folder: Path
    config: Path

    def train(self, run: Path, *options: object) -> int:
        """One process, this one."""
        return main(["train", "--config", str(self.config), "--run", str(run), *map(str, options)])

    def start(self, run: Path, *options: object, second: tuple[object, ...] = (), script: bool = False) -> Pair:
        """Two processes with 4 of the 8 devices each; ``second``: options of the second one alone."""
        command = [ROOT / "launch" / "a100.sh"] if script else [PROGRAM, "train"]
        shared = ["--config", self.config, "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2]
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "MGPT4": str(PROGRAM)}
        running = []
        for process in range(2):
            own = ["--process-id", process, "--run", run, *options, *(second if process else ())]
            words = [str(word) for word in (*command, *shared, *own)]
            screen = run.with_name(f"{run.name}.{process}.txt")
            with screen.open("w") as file:
                running.append(subprocess.Popen(words, env=environment, stdout=file, stderr=file))
        return Pair(run, running)


@dataclass(frozen=True)
class Pair:
    run: Path
    processes: list[subprocess.Popen[bytes]]

    def wait(self) -> list[int]:
        end = time.monotonic() + LIMIT
        try:
            return [process.wait(max(end - time.monotonic(), 1)) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"they hang: {self.said()}") from None
        finally:
            for process in self.processes:
                process.kill()

    def said(self) -> list[str]:
        return [self.run.with_name(f"{self.run.name}.{process}.txt").read_text() for process in range(2)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def source(path: Path) -> str:
    return json.dumps([{"kind": "jsonl", "path": str(path)}])


def spoil(data: Path, numbers: list[int]) -> None:
    for number in numbers:
        (data.parent / f"{number:05d}.png").write_bytes(b"no picture")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("two")
    train, validation = write_pictures(folder / "train", 40, 1), write_pictures(folder / "validation", 11, 2)
    spoil(train, [3, 14, 25])
    spoil(validation, [9])
    config = config_of(
        write_tiny_model(folder / "model"),
        folder / "unused",
        train,
        validation,
        mesh="data=8",
        steps_per_epoch=STEPS,
        data={"max_bad_share": 0.5},
        checkpoint={"every": EVERY},
        log={"every": EVERY, "validate_every": 2 * EVERY},
    )
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return World(folder, path)


@pytest.fixture(scope="module")
def alone(world: World) -> Path:
    """The run of one process that nothing interrupts."""
    assert world.train(world.folder / "alone") == 0
    return world.folder / "alone"


@pytest.fixture(scope="module")
def stopped(world: World) -> tuple[Path, int]:
    """A run of two processes, started by the script, of which one got SIGTERM; and the step it stopped at."""
    pair = world.start(world.folder / "stopped", script=True)
    log = pair.run / "log.jsonl"
    end = time.monotonic() + LIMIT
    while not (log.exists() and read_losses(log)):
        assert time.monotonic() < end and all(process.poll() is None for process in pair.processes), pair.said()
        time.sleep(0.01)
    pair.processes[1].send_signal(signal.SIGTERM)
    assert pair.wait() == [128 + signal.SIGTERM] * 2, pair.said()
    assert "step 1/" in pair.said()[0] and "step 1/" not in pair.said()[1]
    return pair.run, max(map(int, os.listdir(pair.run / "checkpoints")))


@pytest.fixture(scope="module")
def finished(world: World, stopped: tuple[Path, int]) -> Pair:
    """Two processes go on from there on another mesh, to the end."""
    run = Path(shutil.copytree(stopped[0], world.folder / "finished"))
    pair = world.start(run, "--mesh", "fsdp=2,tensor=2,data=2")
    assert pair.wait() == [0, 0], pair.said()
    return pair


def assert_same_numbers(run: Path, alone: Path) -> None:
    """The losses of all steps, each logged once, and all validations."""
    losses, expected = read_losses(run / "log.jsonl"), read_losses(alone / "log.jsonl")
    assert list(losses) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-5, atol=1e-5)
    validations, expected = validation_losses(run), validation_losses(alone)
    assert [step for step, _ in validations] == list(range(2 * EVERY, STEPS + 1, 2 * EVERY))
    np.testing.assert_allclose(validations, expected, rtol=1e-5, atol=1e-5)
    logged = [record["losses"] for record in read_log(run / "log.jsonl") if record["kind"] == "train"]
    assert sum(map(len, logged)) == STEPS


def validation_losses(run: Path) -> list[tuple[int, float]]:
    return [
        (record["step"], record["loss"]) for record in read_log(run / "log.jsonl") if record["kind"] == "validation"
    ]


def test_both_stop_together_and_save(stopped: tuple[Path, int], alone: Path) -> None:
    """One of them was told to stop: both ended with its code after the same step, which is saved and logged."""
    run, step = stopped
    assert step % EVERY == 0 and 0 < step < STEPS
    losses = read_losses(run / "log.jsonl")
    assert list(losses) == list(range(1, step + 1))
    expected = read_losses(alone / "log.jsonl")
    np.testing.assert_allclose(list(losses.values()), [expected[step] for step in losses], rtol=1e-5, atol=1e-5)
    assert (run / "model" / "model.json").exists() and (run / "curves.png").exists()


@pytest.mark.parametrize("mesh", ["data=8", "data=1"])
def test_one_process_goes_on(mesh: str, world: World, stopped: tuple[Path, int], alone: Path) -> None:
    run = Path(shutil.copytree(stopped[0], world.folder / f"one {mesh}"))
    assert world.train(run, "--mesh", mesh) == 0
    assert_same_numbers(run, alone)
    assert f"goes on from checkpoint {stopped[1]}" in events(run)


def test_two_processes_go_on_with_the_model_cut_up(finished: Pair, alone: Path, stopped: tuple[Path, int]) -> None:
    assert_same_numbers(finished.run, alone)
    told = events(finished.run)
    assert f"goes on from checkpoint {stopped[1]}" in told
    assert "changed: mesh: 'data=8,fsdp=1,tensor=1' -> 'data=2,fsdp=2,tensor=2'" in told


def test_one_process_goes_on_from_a_model_that_was_cut_up(world: World, finished: Pair, alone: Path) -> None:
    run, step = Path(shutil.copytree(finished.run, world.folder / "last")), STEPS - 2 * EVERY
    assert world.train(run, "--resume-from", step) == 0
    assert f"goes on from checkpoint {step}" in events(run)
    assert_same_numbers(run, alone)


def test_bad_samples_are_named_by_the_process_that_met_them(finished: Pair, alone: Path) -> None:
    """Both processes meet some, at different steps, and neither waits for the other in vain."""
    expected = {line.rpartition("/")[2].split(":")[0] for line in bad_samples(events(alone))}
    assert expected == {"00003.png", "00014.png", "00025.png", "00009.png"}
    first, second = bad_samples(events(finished.run)), bad_samples(finished.said()[1])
    assert first and second
    assert all(line.startswith("process 1: step ") for line in second)
    met = {line.rpartition("/")[2].split(":")[0] for line in (*first, *second)}
    assert met <= expected and "00009.png" in met  # of the validation set


def test_a_validation_counts_each_token_once(world: World, alone: Path) -> None:
    """11 pictures, of which one is bad, in batches of 8: by hand, from the model that was written."""
    config = yaml.safe_load(world.config.read_text())
    model, text = read_manifest(alone / "model").config, TextConfig(**config["text"])
    rows = RowBuilder(alone / "model" / "tokenizer", text, get_template("vicuna_v0"), model.tokens_per_image)
    folder = world.folder / "validation"
    lines = [json.loads(line) for number, line in enumerate((folder / "data.jsonl").open()) if number != 9]
    sequences = [rows.row(Sample("", folder / line["image"], line["caption"])) for line in lines]
    batch = pad_sequences(sequences, text.max_length, pad_id=rows.tokenizer.pad_id)
    pixels = np.stack([normalise(resize(load_image(folder / line["image"]), 28)) for line in lines])[:, None]
    module, params = build(model), load_params(alone / "model")
    logits = jax.jit(module.apply)({"params": params}, batch.ids, batch.slots, pixels, batch.mask)
    logits, targets = np.asarray(logits, np.float64)[:, :-1], batch.targets[:, 1:]
    chosen = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    losses = np.log(np.exp(logits).sum(axis=-1)) - chosen
    assert losses[targets != IGNORED].mean() == pytest.approx(validation_losses(alone)[-1][1], rel=1e-5)


def test_an_error_in_one_process_ends_both(world: World) -> None:
    """All pictures of the second process are bad: jax alone would let the first wait for it, and then abort both."""
    folder = Path(shutil.copytree(world.folder / "train", world.folder / "spoilt"))
    spoil(folder / "data.jsonl", list(range(40)))
    pair = world.start(world.folder / "failed", second=("--data.train", source(folder / "data.jsonl")))
    assert pair.wait() == [2, 2], pair.said()
    first, second = (said.splitlines()[-1] for said in pair.said())
    assert "40 samples were tried for one row and all are bad" in second and "spoilt" in second
    assert first == second.replace("error: ", "error: process 1 stopped: ")


def events(run: Path) -> str:
    return "\n".join(record["text"] for record in read_log(run / "log.jsonl") if record["kind"] == "event")


def bad_samples(text: str) -> list[str]:
    return [line for line in text.splitlines() if "bad sample, replaced" in line or "bad validation sample" in line]
