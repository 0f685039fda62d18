"""The decades of init_scale over which a network still trains, by a finished sweep.

The robust range at a threshold q is the longest contiguous run of the grid's scales at which the median
seed's final test accuracy is at least q times the best such median over all networks and scales. Its
length is log10(highest / lowest scale) decades; it is a lower bound where the range touches an end of
the grid. A diverged run counts as chance. With further axes, such as several learning rates, a scale counts
with the setting of the best median there (chosen on the test split, for every network alike).
"""

import html
import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

THRESHOLDS = (0.7, 0.8, 0.9, 0.95)
UNNAMED = "network"  # what tables call a network that was swept without a name
COLUMNS = 80  # of the text
TITLE = "Robust range: decades of init_scale over which a network trains"


class RobustRange(NamedTuple):
    """The longest contiguous run of scales that pass."""

    decades: float  # log10(high / low): 0 for one scale, NaN for none
    low: float  # lowest scale of the run, NaN for none
    high: float  # highest scale
    open_low: bool  # the run touches the grid's lowest scale,
    open_high: bool  # or its highest: then `decades` is a lower bound
    holes: tuple[float, ...]  # scales that fail between the lowest and the highest that pass

    @property
    def open(self) -> bool:
        """True if a wider grid could have a longer range."""
        return self.open_low or self.open_high


class Summary(NamedTuple):
    """A network's robust range at one threshold, with its uncertainty and what qualifies it."""

    range: RobustRange
    interval: tuple[RobustRange, RobustRange] | None  # 95%, bootstrap over seeds; None with one seed
    above_low: float  # median accuracy above the baseline's at the range's lowest scale, a fraction
    above_high: float  # and at its highest; NaN without a baseline or a range


class Best(NamedTuple):
    """Where a network is at its best, and how many of its runs diverged."""

    accuracy: float  # the highest median over seeds, a fraction
    scale: float  # the init_scale there
    diverged: int  # runs, of all scales, seeds and settings
    runs: int


class Robustness(NamedTuple):
    """The robust ranges of a sweep's networks; prints as a table of 80 columns, and as HTML in notebooks."""

    summaries: Mapping[str, Mapping[float, Summary]]  # {network: {threshold: Summary}}
    best: Mapping[str, Best]  # {network: Best}
    baselines: Mapping[str, str]  # {network: the network that the ends of its range are compared to}
    seeds: int  # how many each median is over
    chosen: tuple[str, ...]  # the further axes, of which each scale counts with the best setting

    def __repr__(self) -> str:
        """A paragraph of aligned rows for each network, between a title and a legend."""
        rows = {name: self._rows(name) for name in self.summaries}
        shown = [self._header(), *(cells for several in rows.values() for cells, _ in several)]
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        while sum(widths) + 2 * len(widths) > COLUMNS:
            widths[widths.index(max(widths))] -= 1
        note_indent = " " * (widths[0] + 4)

        def lines(cells):
            parts = itertools.zip_longest(*map(textwrap.wrap, cells, widths), fillvalue="")
            return ["  " + "  ".join(map(str.ljust, part, widths)).rstrip() for part in parts]

        found = [TITLE, "", *lines(self._header())]
        for name, several in rows.items():
            found += ["", *_wrapped(self._heading(name), "    ")]
            for cells, note in several:
                found += [*lines(cells), *_wrapped(note, note_indent, first=note_indent)]
        found += ["", *(part for sentence in self._legend() for part in _wrapped(sentence, "  "))]
        return "\n".join(found)

    def _repr_html_(self) -> str:
        """The same table for notebooks."""
        header, escape = self._header(), html.escape

        def whole(text, tag):
            return f'<tr><{tag} colspan="{len(header)}" style="text-align: left">{escape(text)}</{tag}></tr>'

        def row(cells, tag="td"):
            inside = (f'<{tag} style="text-align: left">{escape(cell)}</{tag}>' for cell in cells)
            return f"<tr>{''.join(inside)}</tr>"

        body = ""
        for name in self.summaries:
            body += whole(self._heading(name), "th")
            body += "".join(row(cells) + (whole(note, "td") if note else "") for cells, note in self._rows(name))
        return (
            f"<table><caption>{TITLE}</caption><thead>{row(header, 'th')}</thead><tbody>{body}</tbody></table>"
            f"<p>{'<br>'.join(map(escape, self._legend()))}</p>"
        )

    def _header(self):
        interval = ["95% interval"] if self.seeds > 1 else []
        return ["of best", "decades", "scales", *interval, *(["above baseline"] if self.baselines else [])]

    def _heading(self, name):
        best, median = self.best[name], "median " * (self.seeds > 1)
        return (
            f"{name}: best {median}{best.accuracy:.1%} at scale {scale_text(best.scale)}; "
            f"{best.diverged} of {best.runs} runs diverged"
        )

    def _rows(self, name):
        """[(cells, what is to be said beneath them)] for each threshold."""
        found = []
        for threshold, summary in self.summaries[name].items():
            cells = [f"{100 * threshold:.4g}%", _decades_text(summary.range), _scales_text(summary.range)]
            if self.seeds > 1:
                cells.append(_interval_text(*summary.interval))
            if self.baselines:
                ends = {summary.range.low: summary.above_low, summary.range.high: summary.above_high}
                cells.append(", ".join(f"{100 * a:+.1f}" for a in ends.values() if not math.isnan(a)))
            holes = ", ".join(map(scale_text, summary.range.holes))
            found.append((cells, f"fails at {holes}, between scales that pass" if holes else ""))
        return found

    def _legend(self):
        """In sentences, a line each."""
        best, several = max(one.accuracy for one in self.best.values()), self.seeds > 1
        median = f"the median test accuracy over {self.seeds} seeds" if several else "the test accuracy"
        found = [
            f"Of best: the share of {best:.1%} that {median} reaches.",
            "At least, or more: the range reaches an end of the grid." + " Interval: bootstrap." * several,
        ]
        if any(one.diverged for one in self.best.values()):
            found.append("Runs that diverged count as guessing.")
        if self.chosen:
            found.append(f"Each scale has its best {' and '.join(self.chosen)}, chosen on the test split.")
        if self.baselines:
            found.append("Above baseline: in points, at the lowest and the highest scale of the range.")
        for baseline in dict.fromkeys(self.baselines.values()):
            of = "; ".join(name for name, other in self.baselines.items() if other == baseline)
            found.append(f"Baseline of {of}: {baseline}.")
        return found


def robustness(
    results: xr.Dataset,
    thresholds: Sequence[float | int] = THRESHOLDS,
    *,
    baselines: Mapping[str, str] = MappingProxyType({}),
    chance: float | int | None = None,
) -> Robustness:
    """Over how many decades of init_scale each network of a sweep trains, at each threshold.

        results = bnjax.sweep(models, ds, config, {"seed": range(5), "init_scale": [1e-2, 1.0, 1e2]})
        found = bnjax.robustness(results)
        print(found)                                        # a table; notebooks show it by themselves
        found.summaries["BN"][0.8].range.decades            # by the names in `models`

    Args:
      results: a finished sweep over "init_scale"; of one network without a name, too, which is called "network".
        Without an axis "seed" there is one seed, and no interval. Of other axes (learning_rate, momentum,
        weight_decay) each network counts at each scale with the setting of its best median there. That is chosen on
        the test split, for every network alike.
      thresholds: which fractions of the best median test accuracy of all networks count as training, in (0, 1].
      baselines: {network: the network that the ends of its range are compared to}.
      chance: the accuracy that a diverged run counts as, a fraction. None: as in the results (`final_accuracy`).

    Returns:
      `Robustness`: {network: {threshold: Summary}} and what the table says beside it; lengths in decades
      (factors of 10) of init_scale, accuracies as fractions.

    Raises:
      ValueError: if the results lack init_scale or have a dimension that no sweep has, are not finished, or do not
        say what a diverged run counts as; for a threshold outside (0, 1] or a baseline that is no network's name.
    """
    accuracy = final_accuracy(results, chance)
    diverged = _labelled(results.diverged)
    medians = at_best(accuracy).median("seed")

    def best(name):
        one, failed = medians.sel(model=name), diverged.sel(model=name)
        return Best(float(one.max()), float(one.idxmax("init_scale")), int(failed.sum()), failed.size)

    return Robustness(
        summaries=summarize(accuracy, thresholds, baselines=baselines),
        best={name: best(name) for name in map(str, accuracy.model.values)},
        baselines=dict(baselines),
        seeds=accuracy.sizes["seed"],
        chosen=tuple(dim for dim in _further(accuracy) if accuracy.sizes[dim] > 1),
    )


def final_accuracy(results: xr.Dataset, chance: float | int | None = None) -> xr.DataArray:
    """Test accuracy after the last step, that of guessing where the run diverged, scales ascending.

    Args:
      results: from `bnjax.sweep` over "init_scale"; the axes "seed", "learning_rate", "momentum" and "weight_decay"
        and the dimension "model" may be there.
      chance: the accuracy that diverged runs count as, a fraction. None: results have that of guessing there
        already; in those that earlier versions stored it is put there, by the number of outputs that the networks'
        configurations name.

    Returns:
      Array of dimensions (model, init_scale, *further axes, seed), fractions. One network without a name is called
        "network"; the model and the seed have length 1 where the results have no such dimension.

    Raises:
      ValueError: if `results` lack test_accuracy, diverged or init_scale, have dimensions beside those, have cells
        that are not done or without a figure, or have diverged runs whose accuracy is not known;
        or if `chance` is no fraction.
    """
    if chance is not None and not 0 <= chance <= 1:
        raise ValueError(f"chance is a fraction in [0, 1], got {chance}")
    for name in ("test_accuracy", "diverged"):
        if name not in results:
            raise ValueError(f"robustness needs the results of bnjax.sweep, these lack {name}")
    if "done" in results and not results.done.all():
        raise ValueError(
            f"robustness needs a finished sweep: {int(results.done.sum())} of {results.done.size} cells are done. "
            "The same sweep trains the rest; or select a part that is done"
        )
    ends = {name: _last(results[name]) for name in ("test_accuracy", "test_loss") if name in results}
    accuracy = ends["test_accuracy"]
    if "init_scale" not in accuracy.dims:
        raise ValueError(f"robustness needs an axis init_scale; the results have {list(accuracy.dims)}")
    replaced = results.diverged
    if chance is None and "test_loss" in ends:
        # Earlier versions stored a diverged run's last finite state, today's store an infinite loss.
        replaced = replaced & np.isfinite(ends["test_loss"])
        chance = guessing(results)
        if chance is None and replaced.any():
            raise ValueError(
                "these results have the accuracy of diverged runs before they diverged, and do not say what "
                "guessing would have; pass it as chance="
            )
    if chance is not None:
        accuracy = accuracy.where(~replaced, chance)
    if missing := int((~np.isfinite(accuracy)).sum()):
        raise ValueError(f"test_accuracy is not finite in {missing} of {accuracy.size} cells")
    accuracy = _labelled(accuracy)
    return accuracy.transpose("model", "init_scale", *_further(accuracy), "seed").sortby("init_scale")


def guessing(results: xr.Dataset) -> float | None:
    """The accuracy of guessing, 1 / K, by the networks' configurations; None if they do not (all) say the same K."""
    outputs = {config.get("num_outputs") for config in results.attrs.get("models", {}).values()}
    (found,) = outputs if len(outputs) == 1 else (None,)
    return None if found is None else 1 / found


def at_best(accuracy: xr.DataArray) -> xr.DataArray:
    """Of the further axes, such as learning rates, the setting of the best median over seeds.

    Args:
      accuracy: from `final_accuracy`.

    Returns:
      Array of dimensions (model, init_scale, seed); its coordinates say what was chosen, [model, init_scale] each.
    """
    further = _further(accuracy)
    if not further:
        return accuracy
    flat = accuracy.stack(setting=further, create_index=False)
    best = flat.isel(setting=flat.median("seed").argmax("setting"))
    return best.transpose("model", "init_scale", "seed")


def robust_range(passes: Bool[np.ndarray, " scales"], scales: Float[np.ndarray, " scales"]) -> RobustRange:
    """The longest contiguous run of scales that pass; of equally long ones the first.

    Args:
      passes: whether the network trains at each scale.
      scales: in ascending order.

    Returns:
      `RobustRange`, its lengths in decades (factors of 10), its ends as scales.
    """
    # A rise of the padded indicator starts a run, a fall ends it.
    edges = np.diff(np.concatenate([[0], passes.astype(int), [0]]))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1
    if len(starts) == 0:
        return RobustRange(np.nan, np.nan, np.nan, False, False, ())
    decades = np.log10(scales[stops] / scales[starts])
    longest = int(decades.argmax())
    low, high = starts[longest], stops[longest]
    between = slice(starts[0], stops[-1] + 1)
    return RobustRange(
        decades=float(decades[longest]),
        low=float(scales[low]),
        high=float(scales[high]),
        open_low=bool(low == 0),
        open_high=bool(high == len(scales) - 1),
        holes=tuple(float(s) for s in scales[between][~passes[between]]),
    )


def summarize(
    accuracy: xr.DataArray,
    thresholds: Sequence[float | int],
    *,
    baselines: Mapping[str, str] = MappingProxyType({}),
    resamples: int = 1000,
) -> dict[str, dict[float, Summary]]:
    """The robust range of each network at each threshold.

    The interval is the 2.5th to the 97.5th percentile over `resamples` draws of the seeds with
    replacement (Efron 1979), the same seeds for all networks and scales; the reference (the best median)
    is drawn anew with them. With n seeds it knows no more than n runs can say.

    Args:
      accuracy: from `final_accuracy`.
      thresholds: fractions of the best median, in (0, 1].
      baselines: {network: the network that the ends of its range are compared to}.
      resamples: number of bootstrap draws.

    Returns:
      {network: {threshold: Summary}}.

    Raises:
      ValueError: if there is no threshold or one outside (0, 1], or if a name in `baselines` is no network's.
    """
    if len(thresholds) == 0:
        raise ValueError("thresholds is empty")
    for threshold in thresholds:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    models = [str(m) for m in accuracy.model.values]
    for name in (*baselines, *baselines.values()):
        if name not in models:
            raise ValueError(f"baselines must name networks, of {models}, got {name!r}")
    scales = accuracy.init_scale.values
    medians = _medians(accuracy.values)
    draws = np.random.default_rng(0).integers(accuracy.sizes["seed"], size=(resamples, accuracy.sizes["seed"]))
    drawn_medians = [_medians(accuracy.values[..., seeds]) for seeds in draws]

    def above_baseline(m, scale):
        if models[m] not in baselines or np.isnan(scale):
            return float("nan")
        (at,) = np.flatnonzero(scales == scale)
        return float(medians[m, at] - medians[models.index(baselines[models[m]]), at])

    def summary(m, threshold):
        found = robust_range(medians[m] >= threshold * medians.max(), scales)
        interval = None
        if accuracy.sizes["seed"] > 1:
            ranges = [robust_range(drawn[m] >= threshold * drawn.max(), scales) for drawn in drawn_medians]
            ranges.sort(key=lambda r: (np.nan_to_num(r.decades, nan=-1.0), r.open))
            interval = ranges[int(0.025 * resamples)], ranges[int(np.ceil(0.975 * resamples)) - 1]
        return Summary(found, interval, above_baseline(m, found.low), above_baseline(m, found.high))

    return {name: {q: summary(m, q) for q in thresholds} for m, name in enumerate(models)}


def _medians(accuracy):
    """[model, scale, *further, seed] -> [model, scale]: the median over seeds at the best setting."""
    return np.median(accuracy, axis=-1).reshape(*accuracy.shape[:2], -1).max(axis=-1)


def scale_text(scale: float | int) -> str:
    """A scale in as few characters as it takes: 1, 0.316, 1e-4."""
    if 0.01 <= scale < 1000:
        return f"{scale:.3g}"
    mantissa, exponent = f"{scale:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _decades_text(found):
    """`at least 8.0`, `1.5` or `none`."""
    if math.isnan(found.decades):
        return "none"
    return f"{'at least ' * found.open}{found.decades:.1f}"


def _scales_text(found):
    """`1e-4 to 1e4`, `only at 1` or `at no scale`."""
    if math.isnan(found.decades):
        return "at no scale"
    low, high = scale_text(found.low), scale_text(found.high)
    return f"{low} to {high}" if found.decades > 0 else f"only at {low}"


def _interval_text(low, high):
    """`5.5 to 8.0 or more`, `1.5`, `none to 2.0` or `none`. Where `low` is open, too, the text is as cautious."""
    ends = ["none" if math.isnan(one.decades) else f"{one.decades:.1f}" for one in (low, high)]
    return " to ".join(dict.fromkeys(ends)) + " or more" * high.open


def _wrapped(text: str, indent: str = "", first: str = "") -> Iterable[str]:
    return textwrap.wrap(text, COLUMNS, initial_indent=first, subsequent_indent=indent)


def _last(values):
    """After the last step, without the coordinates of what was selected before."""
    return values.isel(step=-1, drop=True) if "step" in values.dims else values


def _labelled(values):
    """With the dimensions "model" and "seed"; what was selected of them keeps its name."""
    for dim, unnamed in (("model", UNNAMED), ("seed", 0)):
        if dim not in values.dims:
            named = values if dim in values.coords else values.assign_coords({dim: unnamed})
            values = named.expand_dims(dim)
    return values.assign_coords(model=[str(name) for name in values.model.values])


def _further(accuracy):
    """The dimensions of which each scale counts with the best setting."""
    return [str(dim) for dim in accuracy.dims if dim not in ("model", "init_scale", "seed")]
