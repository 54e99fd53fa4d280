"""Tolerances of the golden cases (their README), and comparisons that leave their figures for the summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    rtol: float
    atol: float

    def __str__(self) -> str:
        if self.rtol in (0.0, self.atol):
            return f"{self.atol:.0e}"
        return f"{self.atol:.0e} + {self.rtol:.0e} rel"


ACTIVATION = Tolerance(rtol=1e-4, atol=2e-4)
LOSS = Tolerance(rtol=1e-4, atol=1e-4)
PIXEL = Tolerance(rtol=0.0, atol=1e-6)
GRADIENT = 1e-3  # of the largest entry of each tensor
# A gradient that is zero in truth (of a key bias: it shifts all logits of a row alike) is recorded as rounding
# noise, of which no digit can be reproduced. What is this far below the largest gradient of the model is noise.
GRADIENT_NOISE = 1e-6
COLUMNS = ("case", "quantity", "max error", "tolerance", "of the tolerance")


class Compare:
    """Compares one quantity of one case, and records a row of ``COLUMNS``."""

    def __init__(self, case: Any, quantity: str, record: Callable[[str, Any], None]):
        self._case, self._quantity, self._record = str(case), quantity, record

    def close(self, actual: Any, expected: Any, tolerance: Tolerance = ACTIVATION) -> None:
        """``|actual - expected| <= atol + rtol * |expected|`` everywhere."""
        actual, expected = np.asarray(actual), np.asarray(expected)
        assert actual.shape == expected.shape
        difference = np.abs(actual.astype(np.float64) - expected)
        share = np.max(difference / (tolerance.atol + tolerance.rtol * np.abs(expected)), initial=0.0)
        self._leave(np.max(difference, initial=0.0), str(tolerance), share)
        assert share <= 1.0, f"{self._case} {self._quantity}: largest error {difference.max():.3g}, allowed {tolerance}"

    def gradients(self, actual: Mapping[str, Any], expected: Mapping[str, np.ndarray]) -> None:
        """Each tensor within ``GRADIENT`` of its own largest entry; errors are told relative to that."""
        assert not (missing := sorted(set(expected) - set(actual))), f"no gradient of {missing}"
        largest = max(np.abs(value).max() for value in expected.values())
        errors = {}
        for name, value in expected.items():
            assert actual[name].shape == value.shape, f"{name}: {actual[name].shape}, expected {value.shape}"
            scale = max(np.abs(value).max(), GRADIENT_NOISE / GRADIENT * largest)
            errors[name] = np.abs(np.asarray(actual[name], np.float64) - value).max() / scale
        worst = max(errors, key=errors.__getitem__)
        self._leave(errors[worst], f"{GRADIENT:.0e} of max", errors[worst] / GRADIENT)
        assert errors[worst] <= GRADIENT, f"{self._case} {self._quantity}: {worst} is {errors[worst]:.3g} off"

    def equal(self, actual: Any, expected: Any) -> None:
        """Ids, texts, bytes: the same."""
        self._leave(0.0 if _is_same(actual, expected) else 1.0, "equal", 0.0)
        if isinstance(expected, np.ndarray):
            np.testing.assert_array_equal(actual, expected)
        else:
            assert actual == expected

    def _leave(self, error: float, tolerance: str, share: float) -> None:
        self._record("golden", (self._case, self._quantity, float(error), tolerance, float(share)))


def _is_same(actual: Any, expected: Any) -> bool:
    if isinstance(expected, np.ndarray):
        return np.array_equal(np.asarray(actual), expected)
    return bool(actual == expected)
