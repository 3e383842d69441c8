"""Formats results as tables for a terminal."""

import math
from collections.abc import Sequence
from typing import Any

from imagereward_jax.agreement.bootstrap import Estimate
from imagereward_jax.terminal import escape

Table = tuple[list[str], list[list[str]]]  # header, rows


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Formats a table for a terminal; the first column is left-aligned, the others right-aligned."""
    cells = [[escape(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def percent(estimate: Estimate) -> str:
    """Formats a share in per cent: "65.14 [63.90, 66.38]", or "-" if there are no cases."""
    return number(estimate, 100, 2)


def number(estimate: Estimate, scale: float = 1.0, digits: int = 4) -> str:
    """Formats a value with its interval."""
    if math.isnan(estimate.value):
        return "-"
    value, low, high = (f"{scale * x:.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def agreement_table(results: dict[str, dict[str, Estimate]]) -> Table:
    """Makes table 3 of {model: {metric: Estimate}}, one row per model: (header, rows)."""
    names = list(next(iter(results.values())))
    return ["model", *(f"{name} %" for name in names)], [
        [model, *(percent(row[name]) for name in names)] for model, row in results.items()
    ]


def generator_table(results: dict[str, tuple[dict[str, Estimate], Estimate | None]]) -> Table:
    """Makes table 1 of {model: (means, rho)}, one row per generator and a last one for rho: (header, rows)."""
    first, rho = next(iter(results.values()))
    best_first = sorted(first, key=lambda name: -first[name].value)
    rows = [[name, *(number(means[name]) for means, _ in results.values())] for name in best_first]
    if rho is not None:
        rows.append(["Spearman rho to people", *(number(rho, digits=2) for _, rho in results.values())])
    return ["generator", *results], rows
