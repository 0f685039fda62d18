"""Measured numbers as text, and tables."""

from collections.abc import Callable

import numpy as np
import xarray as xr
from rich.table import Table

from experiments.scaling.trajectories import Growth


def number(value: float | xr.DataArray) -> str:
    """A deviation, for a table."""
    return "0" if value == 0 else f"{float(value):.1e}"


def span(values: np.ndarray, form: Callable = number) -> str:
    """Least and greatest, or the one value."""
    values = np.ravel(values)[~np.isnan(np.ravel(values))]
    if not len(values):
        return "-"
    low, high = form(values.min()), form(values.max())
    return low if low == high else f"{low} .. {high}"


def power(bounds: xr.DataArray) -> str:
    """The least and greatest power of a."""
    return span(bounds.values.round(3) + 0.0, lambda v: f"{v:.3g}")


def measured_range(values: xr.DataArray, dim: str) -> str:
    """From which to which exponent anything was measured."""
    measured = values.notnull().any([d for d in values.dims if d != dim])
    return span(values[dim].where(measured), "{:.0f}".format)


def make_table(title: str, *columns: str) -> Table:
    """With its words to the left and its numbers to the right."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def grows_as(fit: Growth) -> str:
    """Which law of the step t, at which rate, between which steps."""
    if fit.kind == "power":
        return f"t^{span(fit.rate, '{:.2f}'.format)}, t {fit.start} .. {fit.end}"
    if fit.kind == "exponential":
        return f"x e in {span(1 / fit.rate, '{:.0f}'.format)} steps, t {fit.start} .. {fit.end}"
    return "too few steps to tell"
