"""Tables in text; and figures by layer, which print as one."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import rich.box
import rich.console
import rich.table
import rich.text

COLUMNS = 80


def text(header: Sequence[str], rows: Iterable[Sequence[str]], columns: int = COLUMNS) -> str:
    """Aligned columns under a line; what is too long is broken into lines."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*map(rich.text.Text, row))
    console = rich.console.Console(width=columns, color_system=None, force_jupyter=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


@jax.tree_util.register_pytree_with_keys_class
class ByLayer(dict):
    """{layer: a figure, or a NamedTuple of figures}. Prints as a table; to JAX a tree that keeps its order."""

    def tree_flatten_with_keys(self):
        """Called by JAX."""
        return [(jax.tree_util.DictKey(name), self[name]) for name in self], (*self,)

    def tree_flatten(self):
        """Called by JAX."""
        return [*self.values()], (*self,)

    @classmethod
    def tree_unflatten(cls, names: tuple, values: Iterable):
        """Called by JAX."""
        return cls(zip(names, values, strict=True))

    def __repr__(self) -> str:
        """A row for each layer."""
        return text(*self._table())

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        header, rows = self._table()
        head = "".join(f"<th>{html.escape(one)}</th>" for one in header)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _table(self):
        fields = getattr(next(iter(self.values()), None), "_fields", ())
        rows = [[name, *map(_shown, value if fields else [value])] for name, value in self.items()]
        return ["layer", *(fields or ["norm"])], rows


def _shown(value: Any) -> str:
    """A number, or the form of an array or of what is traced."""
    known = hasattr(value, "__float__") and not isinstance(value, jax.core.Tracer)
    if known and getattr(value, "ndim", 0) == 0:
        return f"{float(value):.4g}"
    return f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else repr(value)
