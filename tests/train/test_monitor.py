"""The log holds every loss once and to the bit, whatever happened; the screen, the trackers and the guard."""

from __future__ import annotations

import io
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgpt4_jax.errors import TrainingStopped, UserError
from mgpt4_jax.train import run_log, screen
from mgpt4_jax.train.monitor import LossGuard, Monitor, Speed, compact
from mgpt4_jax.train.run_log import RunLog, read_log, read_losses
from mgpt4_jax.train_config import LogConfig

FLOPS, PEAK = 3e12, 1e14


def make(run_dir: Path, *, num_steps: int = 100, start_step: int = 0, **options: Any) -> Monitor:
    log = options.pop("log", LogConfig(every=10))
    speed = Speed(batch_size=8, flops_per_step=FLOPS, peak_flops=PEAK, num_devices=2)
    return Monitor(run_dir, log, num_steps=num_steps, speed=speed, start_step=start_step, **options)


def loss_at(step: int) -> float:
    """A float32, as the device gives it: no short decimal."""
    return float(np.float32(3) / np.float32(step))


def train(monitor: Monitor, first: int, last: int) -> None:
    for step in range(first, last + 1):
        metrics = {"loss": loss_at(step), "learning_rate": step * 1e-5, "padding": 0.25, "bad_samples": step // 4}
        monitor.step(step, metrics, data_wait=0.002)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that stands until it is told to go on."""
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr("mgpt4_jax.train.monitor.time", types.SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


class TerminalText(io.StringIO):
    def isatty(self) -> bool:
        return True


# -- the log --------------------------------------------------------------------------------------


def test_a_line_sums_up_its_steps(tmp_path: Path, clock: Any) -> None:
    with make(tmp_path) as monitor:
        for step in range(1, 21):
            clock.seconds += 7.0 if step == 1 else 0.5  # the first one compiles
            metrics = {"loss": float(step), "learning_rate": step * 1e-5, "grad_norm": 2.0, "bad_samples": step}
            monitor.step(step, metrics, data_wait=0.002)
    first, second = read_log(tmp_path / "log.jsonl")
    assert first.pop("time") <= second.pop("time")
    assert first == {
        "kind": "train",
        "step": 10,
        "loss": 5.5,
        "learning_rate": 10 * 1e-5,
        "grad_norm": 2.0,
        "bad_samples": 10,
        "samples_per_second": 16.0,
        "tflops_per_device": 3.0,  # 3 TFLOP in half a second on two devices
        "mfu": 0.03,
        "data_wait_ms": 2.0,
        "losses": [float(step) for step in range(1, 11)],
    }
    assert second["samples_per_second"] == 16.0 and second["losses"][0] == 11.0


def test_pauses_do_not_count(tmp_path: Path, clock: Any) -> None:
    with make(tmp_path) as monitor:
        for step in range(1, 11):
            clock.seconds += 0.5
            with monitor.paused():
                clock.seconds += 100
            monitor.step(step, {"loss": 1.0}, data_wait=0.0)
    assert read_log(tmp_path / "log.jsonl")[0]["samples_per_second"] == 16.0


def test_flops_of_a_step_may_differ_or_be_unknown(tmp_path: Path, clock: Any) -> None:
    speed = Speed(batch_size=8)
    with Monitor(tmp_path, LogConfig(every=2), num_steps=4, speed=speed) as monitor:
        for step in range(1, 5):
            clock.seconds += 1
            monitor.step(step, {"loss": 1.0}, data_wait=0.0, flops=2e12 if step > 2 else None)
    unknown, known = read_log(tmp_path / "log.jsonl")
    assert unknown["tflops_per_device"] is None and unknown["mfu"] is None
    assert known["tflops_per_device"] == 2.0 and known["mfu"] is None


def test_every_loss_is_kept_to_the_bit(tmp_path: Path) -> None:
    with make(tmp_path, num_steps=37) as monitor:
        train(monitor, 1, 37)
    assert read_losses(tmp_path / "log.jsonl") == {step: loss_at(step) for step in range(1, 38)}
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [10, 20, 30, 37]


def test_flushing_before_a_save_keeps_its_losses(tmp_path: Path) -> None:
    """Saved at 15, killed at 18: the steps 11 to 15 have a line of their own."""
    monitor = make(tmp_path).__enter__()
    train(monitor, 1, 15)
    monitor.flush()
    train(monitor, 16, 18)
    with make(tmp_path, start_step=15) as resumed:  # as if the other one had been killed
        train(resumed, 16, 20)
    assert read_losses(tmp_path / "log.jsonl") == {step: loss_at(step) for step in range(1, 21)}
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [10, 15, 20]


def test_resuming_takes_back_what_was_beyond(tmp_path: Path) -> None:
    """One line for each step, also where a line reaches over the checkpoint."""
    with make(tmp_path) as monitor:
        train(monitor, 1, 20)
        monitor.validation(20, {"loss": 2.0})
        monitor.event(20, "saved")
        train(monitor, 21, 40)
        monitor.validation(40, {"loss": 1.0})
    with make(tmp_path, start_step=25) as monitor:
        monitor.event(25, "resumed")
        train(monitor, 26, 30)
    records = read_log(tmp_path / "log.jsonl")
    assert [(record["kind"], record["step"]) for record in records] == [
        ("train", 10),
        ("train", 20),
        ("validation", 20),
        ("event", 20),
        ("train", 25),
        ("event", 25),
        ("train", 30),
    ]
    cut = records[4]
    assert cut["losses"] == [loss_at(step) for step in range(21, 26)]
    assert cut["loss"] == pytest.approx(sum(cut["losses"]) / 5)
    assert read_losses(tmp_path / "log.jsonl") == {step: loss_at(step) for step in range(1, 31)}


def test_starting_again_before_the_first_save_begins_a_new_log(tmp_path: Path) -> None:
    with make(tmp_path) as monitor:
        train(monitor, 1, 30)
    with make(tmp_path) as monitor:
        train(monitor, 1, 10)
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [10]


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_line_that_was_cut_off_in_writing_is_mended(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "log.jsonl"
    with make(tmp_path) as monitor:
        train(monitor, 1, 20)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert len(read_log(path)) == (2 if cut == 1 else 1)
    with RunLog(path, 20) as log:
        log.write({"kind": "event", "step": 20, "text": "resumed"})
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == ([10, 20, 20] if cut == 1 else [10, 20])


def test_a_crash_in_the_rewriting_leaves_the_old_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(tmp_path) as monitor:
        train(monitor, 1, 20)
    before = (tmp_path / "log.jsonl").read_bytes()

    def crash(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_log.os, "fsync", crash)
    with pytest.raises(UserError, match=r"log\.jsonl: cannot be written \(No space left"):
        make(tmp_path, start_step=5).__enter__()
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_a_log_without_anything_to_drop_is_left_alone(tmp_path: Path) -> None:
    with make(tmp_path) as monitor:
        train(monitor, 1, 20)
    before = (tmp_path / "log.jsonl").stat().st_ino
    with make(tmp_path, start_step=20):
        pass
    assert (tmp_path / "log.jsonl").stat().st_ino == before


def test_a_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    with make(tmp_path) as monitor:
        train(monitor, 1, 10)
        monitor.captions(10, [("a.jpg", "a cat", "a dog")])
        lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[1])["captions"] == [{"name": "a.jpg", "reference": "a cat", "text": "a dog"}]


def test_numbers_that_json_has_not_become_null(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped), make(tmp_path) as monitor:
        monitor.step(1, {"loss": math.nan, "grad_norm": math.inf}, data_wait=0.0)
        raise TrainingStopped("the loss is nan")
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert "NaN" not in line and "Infinity" not in line
    record = json.loads(line)
    assert record["loss"] is None and record["grad_norm"] is None and record["losses"] == [None]
    assert math.isnan(read_losses(tmp_path / "log.jsonl")[1])


def test_words_that_are_no_utf8_do_not_stop_a_run(tmp_path: Path) -> None:
    with make(tmp_path) as monitor:
        monitor.event(0, "bad sample caf\udce9.jpg")
    assert len(read_log(tmp_path / "log.jsonl")) == 1


def test_a_step_out_of_order_is_refused(tmp_path: Path) -> None:
    with make(tmp_path, start_step=7) as monitor, pytest.raises(ValueError, match="step 9 does not follow step 7"):
        monitor.step(9, {"loss": 1.0}, data_wait=0.0)


def test_other_processes_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with make(tmp_path, is_main_process=False) as monitor:
        train(monitor, 1, 20)
        monitor.validation(20, {"loss": 1.0})
        monitor.captions(20, [("a", "b", "c")])
        monitor.event(20, "saved")
        monitor.flush()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_a_run_directory_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"run/log\.jsonl: cannot be written"):
        make(tmp_path / "run").__enter__()


# -- the screen -----------------------------------------------------------------------------------


def test_plain_lines_come_at_most_every_ten_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = types.SimpleNamespace(seconds=50.0)
    monkeypatch.setattr(screen, "time", types.SimpleNamespace(monotonic=lambda: now.seconds))
    with make(tmp_path) as monitor:
        for step in range(1, 101):
            now.seconds += 0.5
            train(monitor, step, step)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" · ")[0] for line in lines] == [f"step {n}/100" for n in (1, 21, 41, 61, 81, 100)]


def test_the_screen_shows_what_a_person_looks_for(tmp_path: Path, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "stderr", terminal := TerminalText())
    with make(tmp_path) as monitor:
        for step in range(1, 101):
            clock.seconds += 36.0
            monitor.step(step, {"loss": 2.0, "learning_rate": 1e-4}, data_wait=0.002)
        assert monitor._describe()[1] == 0
        monitor.event(100, "saved [bold]\x1b[31m")
    text = terminal.getvalue()
    for part in ("loss 2.0000", "learning rate 1.00e-04", "0.222 samples/s", "0.0417 TFLOP/s per device"):
        assert part in text
    for part in ("MFU 0.0%", "data wait 2 ms", "100/100", "step 100: saved [bold] [31m"):
        assert part in text


def test_seconds_left_follow_the_wall_clock(tmp_path: Path, clock: Any) -> None:
    with make(tmp_path, num_steps=10) as monitor:
        for step in range(1, 6):
            clock.seconds += 2.0
            monitor.step(step, {"loss": 1.0}, data_wait=0.0)
        assert monitor._describe()[1] == pytest.approx(10.0)


def test_numbers_are_short() -> None:
    assert [compact(value) for value in (0.01234, 1.2345, 142.3, 3120.4)] == ["0.0123", "1.23", "142", "3120"]


# -- trackers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"log\.{key} is true .* pip install 'mgpt4-jax\[logging\]'"):
        make(tmp_path, log=LogConfig(**{key: True})).__enter__()


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    with make(tmp_path, log=LogConfig(every=10, tensorboard=True), start_step=10) as monitor:
        train(monitor, 11, 20)
        monitor.validation(20, {"loss": 1.5})
        monitor.captions(20, [("a|b.jpg", "a cat\nand more", "a dog")])
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events = file.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    values = {(value.tag, event.step): value for event in events for value in event.summary.value}
    assert values["train/samples_per_second", 20].simple_value > 0
    assert values["train/learning_rate", 20].simple_value == pytest.approx(20e-5)
    assert values["validation/loss", 20].simple_value == 1.5
    assert not any(tag == "train/losses" for tag, _ in values)
    (table,) = values["captions/text_summary", 20].tensor.string_val
    assert b"| a\\|b.jpg | a cat and more | a dog |" in table
    assert any(event.session_log.status == 1 and event.step == 11 for event in events)  # hides what was beyond


class FakeWandb(types.ModuleType):
    """Records what it is told, as a run without a network."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.options: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.exit_code: int | None = None
        self.problem = ""

    def init(self, **options: Any) -> FakeWandb:
        if self.problem:
            raise self.Error(self.problem)
        self.options.append(options)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code

    def Table(self, columns: list[str], data: list[list[str]]) -> Any:
        return columns, data


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    return fake


def test_wandb_gets_the_numbers_and_goes_on_in_one_run(tmp_path: Path, wandb: FakeWandb) -> None:
    log = LogConfig(every=10, wandb=True)
    with make(tmp_path / "stage1", log=log, settings={"batch_size": 8}) as monitor:
        train(monitor, 1, 10)
        monitor.captions(10, [("a.jpg", "a cat", "a dog")])
    (step, values), (_, captions) = wandb.logged
    assert step == 10 and values["train/padding"] == 0.25 and "train/losses" not in values
    assert captions["captions"] == (["picture", "reference", "model"], [["a.jpg", "a cat", "a dog"]])
    assert wandb.exit_code == 0
    with pytest.raises(KeyboardInterrupt), make(tmp_path / "stage1", log=log, start_step=10):
        raise KeyboardInterrupt
    first, second = wandb.options
    assert first["config"] == {"batch_size": 8} and first["name"] == "stage1" and first["resume"] == "allow"
    assert first["id"] == second["id"] and len(first["id"]) == 8
    assert wandb.exit_code == 1


def test_what_wandb_refuses_is_one_line(tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.problem = "api_key not configured\n(no-tty)"
    with pytest.raises(UserError, match=r"^log\.wandb: api_key not configured \(no-tty\); .*$"):
        make(tmp_path, log=LogConfig(wandb=True)).__enter__()


# -- the guard ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_training(loss: float) -> None:
    with pytest.raises(TrainingStopped, match="step 3: the loss is"):
        LossGuard(0.0).check(3, loss)


def test_a_spike_stops_training() -> None:
    guard = LossGuard(3.0)
    for step in range(1, 20):
        guard.check(step, 2.0)
    guard.check(20, 100.0)  # 19 values say too little
    with pytest.raises(TrainingStopped, match=r"step 21: the loss 6.1 is over 3 times the median 2 of the last 20"):
        guard.check(21, 6.1)
    guard.check(21, 5.9)


def test_the_median_is_of_the_last_hundred() -> None:
    guard = LossGuard(3.0, history=[1.0] * 1000)
    for step in range(1, 101):
        guard.check(step, 2.9)
    guard.check(101, 8.0)


def test_the_guard_knows_the_losses_of_a_resumed_run() -> None:
    with pytest.raises(TrainingStopped):
        LossGuard(3.0, history=[1.0] * 20).check(21, 3.1)


def test_without_a_factor_only_what_is_no_number_stops() -> None:
    guard = LossGuard(0.0, history=[1.0] * 100)
    guard.check(101, 1e30)
