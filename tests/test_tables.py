"""What results print as."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax import plots, probes
from bnjax.tables import ByLayer


@pytest.fixture
def measured():
    model = bnjax.mlp((8, 8), 4, "sigmoid")
    state, x = model.init(jax.random.key(0), (12,)), jax.random.normal(jax.random.key(1), (32, 12))
    return model, state, x


def test_signals_print_as_a_table(measured):
    model, state, x = measured
    found = probes.signals(model, *state, x)
    header, line, *rows = str(found).splitlines()
    assert header.split() == ["layer", *probes.Signal._fields]
    assert {*line} == {"─"}
    assert [row.split()[0] for row in rows] == list(found)
    row = next(row for row in rows if row.startswith("hidden_0/activation")).split()
    np.testing.assert_allclose([float(v) for v in row[1:]], found["hidden_0/activation"], rtol=1e-3)
    assert max(map(len, [header, *rows])) <= 80
    assert "<th>spread</th>" in found._repr_html_()
    assert found._repr_html_().count("<tr>") == 1 + len(found)


def test_gradients_print_as_two_tables(measured):
    model, state, x = measured
    text = str(probes.gradients(model, *state, x, lambda outputs: outputs[:, 0].mean()))
    assert "gradients to intermediates\nlayer" in text
    assert "\n\ngradients to weights\nlayer" in text
    assert "hidden_1  " in text


def test_a_tree_that_keeps_its_order():
    given = ByLayer(b=jnp.ones(()), a=jnp.zeros(3))
    doubled = jax.jit(lambda tree: jax.tree.map(lambda v: 2 * v, tree))(given)
    assert list(doubled) == ["b", "a"]
    assert float(doubled["b"]) == 2
    assert "float32[3]" in str(doubled)
    assert [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(given)] == ["['b']", "['a']"]
    traced = []
    jax.jit(lambda tree: traced.append(str(tree)))(given)
    assert "float32[]" in traced[0]
    assert "float32[]" in str(jax.eval_shape(lambda: given))
    assert "x" in str(ByLayer(a="x"))
    assert str(bnjax.Dataset(0, None, 0, None)).splitlines()[1] == "  train_x  0"


def test_models_and_data_on_one_screen(measured):
    model, _, _ = measured
    assert repr(model).startswith("Model(model='mlp'")
    ds = bnjax.data.load()
    assert str(ds).splitlines()[:2] == ["Dataset", "  train_x  10000 x 28 x 28 x 1      float32"]
    assert len(str(ds).splitlines()) == 5


def test_a_figure_shows_itself():
    image, size = plots.Figure(figsize=(4, 3))._repr_png_()
    assert image.startswith(b"\x89PNG")
    assert size == {"width": 384, "height": 288}
