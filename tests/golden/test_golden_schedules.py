"""Learning rates of the originals' schedules, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from cases import Case, recorded
from claims import SCHEDULES
from comparing import Compare, Tolerance

from mgpt4_jax.optim import learning_rate
from mgpt4_jax.train_config import OptimConfig

EXACT = Tolerance(rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("case", "quantity"), recorded("lr_schedule", *SCHEDULES))
def test_schedule(case: Case, quantity: str, compare: Compare) -> None:
    name = quantity.removesuffix("_lr")
    said, steps = case.config[name], case.outputs[f"{name}_epoch_step"]
    # LAVIS counts epochs alone: any number of steps that holds the recorded ones will do
    per_epoch = said.get("iters_per_epoch", int(steps[:, 1].max()) + 1)
    config = OptimConfig(
        peak_lr=said["init_lr"],
        min_lr=said["min_lr"],
        warmup_lr=said["warmup_start_lr"],
        warmup_steps=said["warmup_steps"],
        schedule="minigpt4" if said["family"].startswith("minigpt4") else "lavis",
    )
    rates = [
        learning_rate(config, int(epoch * per_epoch + step), epochs=said["max_epoch"], steps_per_epoch=per_epoch)
        for epoch, step in steps
    ]
    compare.close(np.array(rates), case.outputs[quantity], EXACT)
