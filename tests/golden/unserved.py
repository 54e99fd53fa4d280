"""What was recorded and the library cannot do yet: the declared list, which can only become shorter.

An entry stands for quantities that no test claims. ``test_golden_coverage.py`` fails when a quantity is in
neither list, when one is in both, and when an entry stands for nothing; the run's last table is this list.
"""

from __future__ import annotations

from cases import Case, is_claimed

NOT_RECORDED = "nothing: the answers that were ranked are not recorded"

UNSERVED = {"minigpt4": {"config.multi_select_ranks": NOT_RECORDED}}


def unserved(case: Case) -> list[tuple[str, str]]:
    """(quantity, the capability that brings it), as declared; a kind that nobody knows is told whole."""
    entries = UNSERVED.get(case.kind, {"*": f"unknown kind of case ({case})"} if case.kind == "unknown" else {})
    found = {}
    for quantity in case.quantities:
        for pattern, capability in entries.items():
            if is_claimed(quantity, (pattern,)):
                found[quantity] = capability
    return list(found.items())
