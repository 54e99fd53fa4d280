"""Fixtures of the golden cases, and the two tables at the end of the run: errors, and what is not served yet."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from cases import Case, all_cases
from comparing import COLUMNS, Compare
from conversion import Converted, convert_case
from unserved import unserved


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Converted]:
    """Each case's weights, converted once a session."""
    return cache(lambda case: convert_case(case, tmp_path_factory.mktemp(str(case)) / "model"))


@pytest.fixture
def compare(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Compare:
    """Comparisons of the test's own case and quantity."""
    arguments = request.node.callspec.params
    return Compare(
        arguments["case"], arguments.get("quantity", request.node.originalname.removeprefix("test_")), record_property
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Every quantity when these tests ran alone, else the worst one of each case."""
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    rows = sorted({tuple(value) for report in reports for name, value in report.user_properties if name == "golden"})
    if not rows:
        return
    is_alone = all("test_golden_" in report.nodeid for report in reports)
    worst = {row[0]: row for row in sorted(rows, key=lambda row: row[-1])}
    shown = rows if is_alone else sorted(worst.values())
    terminalreporter.section(f"golden: {len(rows)} quantities of {len(worst)} cases, largest errors")
    cells = [(case, name, f"{error:.1e}", allowed, f"{share:.0%}") for case, name, error, allowed, share in shown]
    terminalreporter.write_line(_table(COLUMNS, cells))
    waiting = [row for case in all_cases() for row in _waiting(case)]
    if waiting:
        terminalreporter.section("golden: not served yet")
        terminalreporter.write_line(_table(("case", "comes with", "quantities"), waiting))


def _waiting(case: Case) -> list[tuple[str, str, str]]:
    """A row for each capability that a case waits for."""
    quantities: dict[str, list[str]] = {}
    for quantity, capability in unserved(case):
        quantities.setdefault(capability, []).append(quantity)
    return [
        (str(case), capability, f"all {len(names)}" if len(names) == len(case.quantities) else ", ".join(names))
        for capability, names in quantities.items()
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the tests of this folder for which the set has no case: pytest would call them skipped."""
    ours = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    empty = [item for item in ours for mark in item.iter_markers("skip") if "empty parameter set" in str(mark.kwargs)]
    config.hook.pytest_deselected(items=empty)
    items[:] = [item for item in items if item not in empty]


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(line.rstrip() for line in lines)
