"""Prints what became of every type of adapter below the results, workers or not."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Collect the rows that tests recorded, and print them as tables."""
    tables: dict[str, set[str]] = {"peft": set(), "combined": set()}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", []):
                if name in tables and not str(value).endswith("\tfailed"):
                    tables[name].add(str(value))
    titles = {
        "peft": "adapters: type, base, what became of it, largest relative difference or why",
        "combined": "adapters added: case, relative error of pack, of PEFT's add_weighted_adapter",
    }
    for name, rows in tables.items():
        if rows:
            terminalreporter.section(titles[name])
            for row in sorted(rows):
                cells = row.split("\t")
                terminalreporter.write_line(
                    "".join(f"{cell:<25}" for cell in cells[:-1]) + cells[-1]
                )
