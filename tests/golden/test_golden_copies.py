"""The same weights in another format make the same model directory, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cases import Case, all_cases
from conversion import Converted, convert_case

from mgpt4_jax.checkpoint import flatten, load_params

_CONVERTED_ALONE = {"eva": "vit", "qformer": "qformer"}  # kind -> the role of its one weight file
_COPIES = [
    pytest.param(case, path, id=f"{case}-{path.name}")
    for case in all_cases()
    if case.kind in _CONVERTED_ALONE
    for path in case.copies
]


@pytest.mark.parametrize(("case", "copy"), _COPIES)
def test_copy_converts_alike(case: Case, copy: Path, converted: Callable[[Case], Converted], tmp_path: Path) -> None:
    expected = flatten(load_params(converted(case).model_dir))
    other = convert_case(case, tmp_path / "model", **{_CONVERTED_ALONE[case.kind]: copy})
    actual = flatten(load_params(other.model_dir))
    assert actual.keys() == expected.keys()
    for path, leaf in actual.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
