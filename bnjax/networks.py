"""Any network as a model, and what of it is scaled and decayed."""

import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from bnjax import tables, tracing
from bnjax.interop import functions
from bnjax.types import Model, some_of, takes_extra, taking_extra, with_extra

ACCEPTED = (
    "a bnjax.Model, a Flax linen module, an NNX or Equinox network, or a pair of functions (init(key, input_shape) -> "
    "params, apply(params, x) -> outputs)"
)


def as_model(
    network: Any,
    *,
    scaled: Collection[str] | None = None,
    arguments: Callable[[bool], Mapping[str, Any]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Model:
    """Any network as a `bnjax.Model`. `bnjax.sweep` and `bnjax.probes` call it themselves.

    What `init_scale` multiplies is read off what the network computes (`bnjax.tracing`): the kernels of all products
    but the readouts; `bnjax.describe` shows it.

    Args:
      network: a `Model` (returned as it is); a Flax linen module; an NNX or Equinox network, which stands for its own
        single draw (`bnjax.interop.nnx.as_model` and `bnjax.interop.equinox.as_model` take a function that draws one,
        anew for each seed); or a pair of functions: init(key, input_shape) -> params, apply(params, x) -> outputs.
      scaled: the kernels that `init_scale` multiplies, by path, or what has them in it (`Dense_0`). None: all but those
        of the readouts.
      arguments: the keyword arguments of a Flax network in training (True) and evaluation (False). None: the usual
        ones that its `__call__` has, such as `train` or `deterministic`.
      config: says in words what the network is, in stored results; what JSON holds.

    Returns:
      `Model`.

    Raises:
      ValueError: for something else, or options that it does not take.
    """
    options = {"scaled": scaled, "config": config}
    kind = _kind(network)
    if arguments is not None and kind not in ("flax", "nnx"):
        raise ValueError(f"arguments are those of a Flax network; got {_short(network)}")
    if kind == "model":
        if scaled is not None or config is not None:
            raise ValueError("scaled and config are for networks that are no bnjax.Model yet")
        return network
    if kind == "pair":
        return _from_pair(*network, **options)
    if not kind:
        raise ValueError(f"a network must be {ACCEPTED}; got {_short(network)}")
    if kind != "equinox":
        options["arguments"] = arguments
    return _interop(kind).as_model(network, **options)


def drawn_anew(network: Any) -> Any:
    """The model that draws anew for each seed, in the place of a network with a draw of its own, if there is one."""
    kind = _kind(network)
    draw = _interop(kind).drawn_anew(network) if kind in ("nnx", "equinox") else None
    return network if draw is None else _interop(kind).as_model(draw)


def is_network(value: Any) -> bool:
    """True if `as_model` takes it."""
    return _kind(value) != ""


def _kind(value) -> str:
    """Either "model", "pair", the name of its module in `bnjax.interop`, or "". No library is imported to find out."""
    if isinstance(value, Model):
        return "model"
    if "flax" in sys.modules:
        from flax import linen, nnx

        if isinstance(value, linen.Module):
            return "flax"
        if isinstance(value, nnx.Module):
            return "nnx"
    if "equinox" in sys.modules and _interop("equinox").is_network(value):
        return "equinox"
    return "pair" if isinstance(value, tuple) and len(value) == 2 and all(map(callable, value)) else ""


def _interop(name):
    """A module of `bnjax.interop`, whose library is needed only now."""
    return importlib.import_module(f"bnjax.interop.{name}")


def _from_pair(init, apply, *, scaled, config) -> Model:
    def draw(key, input_shape, *, extra):
        return with_extra(init, extra)(key, input_shape), {}

    def run(params, batch_stats, x, *, train, extra):
        return with_extra(apply, extra)(params, x), batch_stats

    if config is None:
        names = {
            what: getattr(f, "__qualname__", type(f).__qualname__) for what, f in (("init", init), ("apply", apply))
        }
        config = functions.in_words(scaled, model="functions", **names)
    draw, run = taking_extra(draw, takes_extra(init)), taking_extra(run, takes_extra(apply))
    return functions.as_model(draw, run, scaled=scaled, config=config)


def _short(value):
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' * (len(text) > 60)}"


class Row(NamedTuple):
    """A parameter."""

    name: str
    shape: tuple[int, ...]
    role: str  # "kernel", "readout", "frozen kernel" or ""
    scaled: bool  # multiplied by init_scale
    decayed: bool  # by weight_decay
    drawn: bool  # whether it depends on the seed


@dataclasses.dataclass(frozen=True)
class Description:
    """The parts of a network that `init_scale` scales and `weight_decay` decays; a table when printed."""

    parameters: tuple[Row, ...]
    parts: tuple[str, ...]  # products, norms and nonlinearities, as `bnjax.probes` names them
    not_seen: Mapping[str, str]  # {parameter: why its products are not shown}

    def names(self, what: str) -> list[str]:
        """Of the parameters that are "scaled", "decayed" or "drawn"."""
        return [row.name for row in self.parameters if getattr(row, what)]

    def __str__(self):
        def row(one):
            yes = ("yes" if one.scaled else "-", "yes" if one.decayed else "-")
            return one.name, " x ".join(map(str, one.shape)) or "scalar", one.role or "-", *yes

        table = tables.text(("layer", "shape", "role", "scaled", "decayed"), map(row, self.parameters))
        unseen = [f"not seen: {name}: {why}" for name, why in self.not_seen.items()]
        return "\n".join([table, *unseen])

    __repr__ = __str__


def describe(
    model: Any, input_shape: tuple[int, ...], *, extra: Mapping[str, Any] = MappingProxyType({})
) -> Description:
    """Describes the parts of a network that are scaled, decayed and seen. Nothing is computed.

    Args:
      model: whatever `as_model` takes.
      input_shape: of one example.
      extra: what the network takes as `Hyperparams.extra`.

    Returns:
      `Description`; printed, it is a table.

    Raises:
      ValueError: for examples that the network does not take.

    Example:
      >>> print(bnjax.describe(bnjax.mlp((8,), 3, norm="none"), (4,)))
      layer            shape   role      scaled   decayed
      ────────────────────────────────────────────────────
      hidden_0/bias    8       -         -        -
      hidden_0/kernel  4 x 8   kernel    yes      yes
      output/bias      3       -         -        -
      output/kernel    8 x 3   readout   -        yes
    """
    model, names = as_model(model), tuple(extra)
    return _described(model.init, model.apply, tuple(input_shape), names)


@functools.lru_cache(maxsize=64)  # each sweep asks for it
def _described(draw, apply, input_shape, names):
    draw, apply = (with_extra(function, some_of(names)) for function in (draw, apply))

    def init(key, init_scale):
        return draw(key, input_shape, init_scale)

    # Argument 0 is the key, 1 the scale.
    state, depends = tracing.dependent(init, jax.random.key(0), 1.0)
    reading, _ = tracing.read_examples(apply, *state, input_shape)
    rows = []
    for tree, depending, frozen in ((state[0], depends[0], False), (state[1], depends[1], True)):
        leaves = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(depending), strict=True)
        for (path, leaf), on in leaves:
            name = tracing.name_of(path)
            role = "readout" if name in reading.readouts else "kernel" if name in reading.kernels else ""
            if role or not frozen:
                decayed = bool(role) and not frozen
                rows.append(Row(name, leaf.shape, "frozen " * frozen + role, 1 in on, decayed, 0 in on))
    return Description(tuple(rows), tuple(part.name for part in reading.parts if part.where), reading.not_seen)
