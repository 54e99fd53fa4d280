"""Nothing that was recorded is passed over in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import Case, all_cases, is_claimed
from claims import GIVEN, is_checked, is_given
from unserved import UNSERVED, unserved

_CASES = [pytest.param(case, id=str(case)) for case in all_cases()]
_OURS = Path(__file__).parent / "data"


@pytest.mark.parametrize("case", _CASES)
def test_every_quantity_is_checked_given_or_declared_unserved(case: Case) -> None:
    assert case.kind != "unknown", f"{case.directory}: no test knows this kind of case"
    waiting = dict(unserved(case))
    claims = {
        quantity: is_checked(case, quantity) + is_given(case, quantity) + (quantity in waiting)
        for quantity in case.quantities
    }
    assert {quantity: count for quantity, count in claims.items() if count != 1} == {}


def test_every_declaration_stands_for_something() -> None:
    """On the cases of this repository; another set may lack some."""
    cases = [Case(path.parent) for path in sorted(_OURS.glob("*/config.json"))]
    for kind, patterns in [*GIVEN.items(), *UNSERVED.items()]:
        quantities = [quantity for case in cases if case.kind == kind for quantity in case.quantities]
        for pattern in patterns:
            assert any(is_claimed(quantity, (pattern,)) for quantity in quantities), f"{kind}: {pattern}"
