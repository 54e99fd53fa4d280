"""The training benchmark at tiny sizes: both of its programs run, and both sides do the same work."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROWS = 2


@pytest.fixture(scope="module")
def train_step() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    threads = torch.get_num_threads()
    import train_step

    yield train_step
    torch.set_num_threads(threads)
    sys.path.remove(folder)


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
