"""The training benchmarks at tiny sizes: their programs run, all sides do the same work, and the counts are right."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROWS = 2


@pytest.fixture(scope="module")
def _benchmarks() -> Iterator[None]:
    folder = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def train_step(_benchmarks: None) -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    import train_step

    yield train_step
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scaling(_benchmarks: None) -> ModuleType:
    import stage1_scaling

    return stage1_scaling


def answers(module: ModuleType, sides: dict[str, Any], tasks: dict[str, Any]) -> Any:
    return {
        task: {name: [run(seed=seed, **fields) for seed in range(3)] for name, run in sides.items()}
        for task, fields in tasks.items()
    }


def test_both_sides_train_alike_from_converted_weights(
    train_step: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step.write_models(tmp_path, 1, 64)
    sides = {
        "torch": train_step.torch_side(tmp_path, None, "cpu", ROWS),
        "jax": train_step.jax_side(tmp_path, None, ROWS),
    }
    found = answers(train_step, sides, train_step.TASKS)
    train_step.check_losses(found)
    losses = [answer["loss"] for answer in found["whole"]["jax"]]
    assert len(set(losses)) == 3
    assert all(answer["seconds"] > 0 and answer["peak_mb"] > 100 for answer in found["whole"]["torch"])
    train_step.print_table(found, "tiny")
    train_step.print_peaks(found)
    assert capsys.readouterr().out.count("| whole |") == 2
    found["whole"]["jax"][1]["loss"] += 0.01
    with pytest.raises(AssertionError):
        train_step.check_losses(found)


def test_the_program_for_true_sizes(train_step: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights made on the device, bfloat16, batch and length of stage 1; the processor stands for the accelerator."""
    sides = {
        "torch": train_step.torch_side(None, "tiny", "cpu", ROWS),
        "jax": train_step.jax_side(None, "tiny", ROWS),
    }
    found = answers(train_step, sides, {"whole": train_step.TASKS["whole"]})
    first = found["whole"]["jax"][0]
    assert 0 < first["flops_of_jax"] < first["flops_of_torch"]
    assert first["peak_flops"] == 0  # nobody promised any of a processor
    assert torch.get_default_dtype() == torch.float32
    train_step.print_device_table(found, ROWS)
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows[0].startswith("| torch |") and rows[1].startswith("| jax |") and "unknown" in rows[1]


@pytest.mark.parametrize(("size", "parameters"), [("7b", 6.74e9), ("13b", 13.02e9)])
def test_true_sizes_are_the_published_ones(train_step: ModuleType, size: str, parameters: float) -> None:
    from mgpt4_jax.config import ModelConfig
    from mgpt4_jax.models import num_parameters

    config = train_step.true_config(size)
    assert config.tokens_per_image == 32 and config.vit.num_layers == 39
    assert num_parameters(ModelConfig("llama", llama=config.llama)) == pytest.approx(parameters, rel=1e-3)


def test_stage_1_against_batch_and_devices(scaling: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Two devices' steps are done; that they are those of one is tested where the objective is."""
    run = scaling.side(2, "tiny")
    answers = [run(rows=8, seed=seed) for seed in range(2)]
    assert answers[0]["loss"] != answers[1]["loss"] and math.isfinite(answers[1]["loss"])
    assert answers[0]["flops"] == scaling.step_flops("tiny", 8)
    scaling.print_batches({"8": answers, "16": [{**each, "seconds": 3 * each["seconds"]} for each in answers]})
    assert "| 3.00 | 3.00 .. 3.00 | 1.00 |" in capsys.readouterr().out.splitlines()[-1]
    others = [{**each, "loss": 1.01 * each["loss"]} for each in answers]
    assert scaling.loss_difference({"1": answers, "2": others}) == pytest.approx(0.01)
    scaling.print_devices({"1": answers, "2": others})
    assert capsys.readouterr().out.splitlines()[-3].startswith("| 2 |")


def test_the_speed_of_stage_1_at_one_size(scaling: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """bfloat16, weights made on the device; the processor stands for the accelerator."""
    found = scaling.speed("tiny", "cpu", 4, 1)
    assert len(found) == 1 and math.isfinite(found[0]["loss"]) and found[0]["peak_flops"] == 0
    scaling.print_speed(found, 4)
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| 4 |") and "unknown" in row


def test_nothing_but_the_contrast_grows_with_the_square_of_the_batch(scaling: ModuleType) -> None:
    """What a batch of 16 takes beyond two of 8 is the square's; four products of each similarity's size make it."""
    config, one, two = scaling.model_config("tiny"), scaling.step_flops("tiny", 8), scaling.step_flops("tiny", 16)
    counted = scaling.contrast_flops(config, 8)
    assert counted == 4 * 2 * 8 * 8 * config.qformer.num_queries * config.projection_size
    assert (two - 2 * one) / 2 == counted


@pytest.mark.parametrize("rows", [100, 1680])
def test_the_contrast_is_a_small_part_of_the_work(scaling: ModuleType, rows: int) -> None:
    """At the paper's sizes, counted: 100 pairs of one device, and all 1680, of which every text meets every picture."""
    whole, part = scaling.step_flops("true", rows), scaling.contrast_flops(scaling.model_config("true"), rows)
    assert 0 < part < 0.05 * whole
    assert whole / rows == pytest.approx(761e9, rel=0.15)  # the hand count of the picture side and the passes
