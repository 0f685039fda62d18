"""Families of networks: what they draw, compute, show and prepare."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax import models, norms
from bnjax.types import Norm

IMAGE = (6, 6, 1)
X = jax.random.normal(jax.random.key(9), (8, *IMAGE))
KEY = jax.random.key(0)
SMALL = {
    "mlp": {"features": (8, 8)},
    "deep": {"depth": 4, "width": 8},
    "conv": {"features": (8, 16)},
    "residual": {"features": (8, 8)},
    "residual of convolutions": {"features": (8, 16), "kind": "conv"},
}


def network(family, **options):
    options = {"num_outputs": 3} | SMALL[family] | options
    if options.get("norm") == "group":
        options["norm"] = norms.group(group_size=4)
    return models.get(family.split()[0])(**options)


def shapes(tree):
    return jax.tree.map(lambda a: (a.shape, a.dtype), tree)


@pytest.mark.parametrize(
    ("norm", "position"),
    [
        *((name, "before_activation") for name in norms.NORMS),
        ("layer", "after_activation"),
        *(pytest.param(name, "after_activation", marks=pytest.mark.slow) for name in norms.NORMS if name != "layer"),
    ],
)
@pytest.mark.parametrize("family", SMALL)
def test_every_norm_in_every_family(family, norm, position):
    """Traced only: outputs, a state that keeps its form, names that `layers` shows, kernels that are seen as such."""
    model = network(family, norm=norm, norm_position=position)
    state = jax.eval_shape(lambda: model.init(KEY, IMAGE, 0.5))
    outputs, after = jax.eval_shape(lambda s: model.apply(*s, X, train=True), state)
    assert outputs.shape == (8, 3)
    assert shapes(after) == shapes(state[1])
    _, shown = jax.eval_shape(lambda s: model.layers(*s, X, {}, train=False), state)
    last = "last/activation" if family.startswith("residual") else f"hidden_{3 if family == 'deep' else 1}/activation"
    assert {last, "output"} <= {*shown}
    assert model.config["norm"] == norm
    kernels = {name for name in bnjax.describe(model, IMAGE).names("decayed") if name != "output/kernel"}
    assert kernels == {*bnjax.describe(model, IMAGE).names("scaled")}
    counts = {"mlp": 2, "deep": 2, "conv": 2}
    assert len(kernels) == counts.get(family, 5)


@pytest.mark.parametrize("family", SMALL)
def test_layers_compute_what_apply_does(family):
    model = network(family, activation="tanh")
    state = model.init(KEY, IMAGE, 1.0)
    outputs, shown = jax.jit(lambda s: model.layers(*s, X, {}, train=True))(state)
    np.testing.assert_allclose(outputs, model.apply(*state, X, train=True)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"unknown offsets \['a'\]; allowed: "):
        model.layers(*state, X, {"a": 0.0}, train=True)
    name = [name for name in shown if name.endswith("norm")][-1]
    direction = jax.random.normal(KEY, shown[name].shape)
    moved = jax.jit(lambda s, o: model.layers(*s, X, {name: o}, train=True)[0])(state, direction)
    assert np.abs(moved - outputs).max() > 1e-3


def test_deep_is_mlp():
    """Drawn alike to the bit; outputs and gradient to rounding; its state as well."""
    deep, flat = models.deep(5, 8, 3, activation="tanh"), bnjax.mlp((8,) * 5, 3, "tanh")
    (params, stats), (expected, flat_stats) = (jax.jit(m.init, static_argnums=1)(KEY, IMAGE, 0.7) for m in (deep, flat))

    def split(tree):
        if "hidden" not in tree:
            return tree
        stacked = tree["hidden"]
        rest = {f"hidden_{i + 1}": jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(4)}
        return rest | {name: value for name, value in tree.items() if name != "hidden"}

    for one, other in ((params, expected), (stats, flat_stats)):
        jax.tree.map(np.testing.assert_array_equal, split(one), other)

    def loss(model):
        def of(params, stats):
            outputs, new = model.apply(params, stats, X, train=True)
            return (outputs**2).sum(), new

        return jax.jit(jax.value_and_grad(of, has_aux=True))

    ((value, new), slopes), ((right, flat_new), flat_slopes) = (
        loss(deep)(params, stats),
        loss(flat)(expected, flat_stats),
    )
    np.testing.assert_allclose(value, right, rtol=1e-5)
    for one, other in ((slopes, flat_slopes), (new, flat_new)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), split(one), other)


def test_a_thousand_layers_are_one_in_the_program():
    """The program of 1,000 layers has as many operations as that of 10."""

    def operations(depth):
        model = models.deep(depth, 8, 3)
        state = jax.eval_shape(lambda: model.init(KEY, IMAGE, 1.0))
        text = jax.jit(jax.grad(lambda p, s: model.apply(p, s, X, train=True)[0].sum())).lower(*state).as_text()
        return text.count("\n")

    assert operations(1000) == operations(10)


def test_convolution_by_hand():
    """Two layers with stride 1 and 2, by a loop over positions of the padded image."""
    model = models.conv((4, 5), 3, activation="tanh", norm="none")
    params, stats = model.init(KEY, IMAGE, 1.0)

    def layer(x, kernel, stride):
        total = max((-(-6 // stride) - 1) * stride + 3 - x.shape[1], 0)
        x = np.pad(x, ((0, 0), *[(total // 2, total - total // 2)] * 2, (0, 0)))
        size = (x.shape[1] - 3) // stride + 1
        windows = [x[:, i : i + stride * size : stride, j : j + stride * size : stride] for i, j in np.ndindex(3, 3)]
        return sum(w @ k for w, k in zip(windows, np.asarray(kernel).reshape(9, *kernel.shape[2:]), strict=True))

    x = np.tanh(layer(np.asarray(X), params["hidden_0"]["kernel"], 1))
    x = np.tanh(layer(x, params["hidden_1"]["kernel"], 2))
    assert x.shape == (8, 3, 3, 5)
    expected = x.mean((1, 2)) @ params["output"]["kernel"]
    np.testing.assert_allclose(model.apply(params, stats, X, train=True)[0], expected, rtol=1e-4, atol=1e-5)


class TestResidual:
    def test_by_hand(self):
        model = models.residual((8, 12), 3, activation="tanh", norm="rms")
        params, stats = model.init(KEY, IMAGE, 1.0)

        def act(x):
            return np.tanh(x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5))

        x = np.asarray(X).reshape(8, -1) @ params["stem"]["kernel"]
        for i, width in enumerate((8, 12)):
            y = act(act(x) @ params[f"block_{i}/0"]["kernel"]) @ params[f"block_{i}/1"]["kernel"]
            x = np.pad(x, ((0, 0), (0, width - x.shape[1]))) + y
        expected = act(x) @ params["output"]["kernel"]
        np.testing.assert_allclose(model.apply(params, stats, X, train=True)[0], expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", ["dense", "conv"])
    @pytest.mark.parametrize("branch", ["skipinit", "fixup"])
    def test_branches_that_start_at_zero(self, branch, kind):
        """Each block is its shortcut at first, and SkipInit's scalar or Fixup's last kernels learn."""
        model = models.residual((8, 8), 3, norm="none", branch=branch, kind=kind)
        params, stats = model.init(KEY, IMAGE, 1.0)

        def loss(params):
            outputs, shown = model.layers(params, stats, X, {}, train=True)
            return (outputs - 1).sum() ** 2, shown

        (_, shown), slopes = jax.value_and_grad(loss, has_aux=True)(params)
        np.testing.assert_array_equal(shown["block_0"], shown["stem/preactivation"])
        np.testing.assert_array_equal(shown["block_1"], shown["block_0"])
        if branch == "fixup":
            np.testing.assert_array_equal(shown["output"], 0)
            kernels = [params[f"block_0/{i}"]["kernel"] for i in (0, 1)]
            fan_in = math.prod(kernels[0].shape[:-1])
            assert float(kernels[0].std() * math.sqrt(fan_in)) == pytest.approx(math.sqrt(2 / 2), rel=0.2)
            assert not kernels[1].any()
            assert slopes["output"]["kernel"].any()
        else:
            assert abs(slopes["block_0/1"]["multiplier"]) > 1e-4

    def test_stride_of_the_stem(self):
        model = models.residual((4,), 3, kind="conv", stem_stride=2)
        shown = jax.eval_shape(lambda: model.layers(*model.init(KEY, IMAGE, 1.0), X, {}, train=True)[1])
        assert shown["stem/preactivation"].shape == shown["block_0"].shape == (8, 3, 3, 4)

    def test_a_shortcut_to_fewer_and_more(self):
        """The mean of 2 x 2 positions, of those that there are in odd images; zeros in the new channels."""
        model = models.residual((4, 6), 3, kind="conv", branch="skipinit", norm="none")
        x = X[:, :5, :5]
        params, stats = model.init(KEY, (5, 5, 1), 1.0)
        _, shown = model.layers(params, stats, x, {}, train=True)
        stem = np.pad(shown["stem/preactivation"], ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
        means = sum(stem[:, i::2, j::2] for i, j in np.ndindex(2, 2)) / 4
        np.testing.assert_allclose(shown["block_1"], np.pad(means, ((0, 0),) * 3 + ((0, 2),)), rtol=1e-5, atol=1e-6)


class TestPrepare:
    @pytest.mark.parametrize("family", SMALL)
    def test_lsuv(self, family):
        """Every product has variance 1 for that batch, whatever the scale; and nothing else changes."""
        model = network(family, initializer="lsuv", norm="none")
        found = []
        for scale in (1e-25, 30.0):
            state = model.init(KEY, IMAGE, scale)
            prepared = model.prepare(*state, X)
            assert shapes(prepared) == shapes(state)
            found.append(prepared)
            _, shown = model.layers(*prepared, X, {}, train=True)
            products = [value for name, value in shown.items() if name.endswith(("preactivation", "output"))]
            np.testing.assert_allclose([value.var() for value in products], 1, rtol=1e-3)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *found)

    @pytest.mark.parametrize("family", SMALL)
    def test_weight_normalization(self, family):
        """Every unit has mean 0 and deviation 1 over that batch (and the positions)."""
        model = network(family, norm=norms.weight(data_dependent=True))
        prepared = model.prepare(*model.init(KEY, IMAGE, 1.0), X)
        _, shown = model.layers(*prepared, X, {}, train=True)
        for name, value in shown.items():
            if name.endswith("preactivation"):
                axes = tuple(range(value.ndim - 1))
                alive = np.asarray(value.std(axes) > 0.1)
                assert alive.mean() > 0.5, name  # the others got zeros only
                np.testing.assert_allclose(value.mean(axes), 0, atol=1e-3)
                np.testing.assert_allclose(value.std(axes)[alive], 1, rtol=1e-2)

    def test_a_run_starts_from_what_the_first_batch_made_of_it(self, blobs):
        """As prepared by hand with the first batch of the shuffle, at learning rate 1e-30; in a sweep as well."""
        model = bnjax.mlp((8,), 4, initializer="lsuv", norm="none")
        config = bnjax.TrainConfig(steps=1, batch_size=64)
        hyper = bnjax.Hyperparams(seed=3, init_scale=1e3, learning_rate=1e-30)
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(0), 0), 256)
        prepared = model.prepare(*model.init(jax.random.key(3), (12,), 1e3), blobs.train_x[order[:64]])
        outputs, _ = model.apply(*prepared, blobs.test_x, train=False)
        accuracy = (outputs.argmax(-1) == blobs.test_y).mean()
        history = jax.jit(bnjax.make_train(model, config))(hyper, blobs)
        assert float(history.test_accuracy[0]) == pytest.approx(float(accuracy), abs=1e-6)
        axes = {"seed": [3], "init_scale": [1e-2, 1e3]}
        results = bnjax.sweep({"a": model}, blobs, config, axes, hyper=hyper._replace(seed=0))
        np.testing.assert_allclose(results.test_accuracy.values.ravel(), accuracy, atol=1e-6)

    @pytest.mark.parametrize(
        ("x", "words"),
        [
            (X[:1], r"at least 2 examples; got x \(1, 6, 6, 1\)"),
            (jnp.ones((4, *IMAGE)), "those of x .* are all the same"),
        ],
    )
    def test_bad_batches(self, x, words):
        model = network("mlp", initializer="lsuv")
        with pytest.raises(ValueError, match=words):
            model.prepare(*model.init(KEY, IMAGE, 1.0), x)

    def test_kernels_of_zeros_stay(self):
        """Those of Fixup, whose products have no variance."""
        model = models.residual((8, 8), 3, norm="none", branch="fixup", initializer="lsuv")
        params, _ = model.prepare(*model.init(KEY, IMAGE, 1.0), X)
        np.testing.assert_array_equal(params["block_0/1"]["kernel"], 0)
        assert jax.tree.all(jax.tree.map(lambda a: np.isfinite(a).all(), params))

    def test_data_that_cannot_prepare(self, blobs):
        model, axes = bnjax.mlp((8,), 4, initializer="lsuv"), {"seed": [0]}
        with pytest.raises(ValueError, match="batch_size must be at least 2 for a network that its first batch"):
            bnjax.sweep(model, blobs, bnjax.TrainConfig(steps=1, batch_size=1), axes)
        same = blobs._replace(train_x=np.ones_like(blobs.train_x))
        with pytest.raises(ValueError, match="train_x has examples that are all the same"):
            bnjax.sweep(model, same, bnjax.TrainConfig(steps=1, batch_size=32), axes)

    def test_none_is_needed(self):
        assert network("mlp").prepare is None
        assert network("mlp", norm="weight").prepare is None


def test_a_norm_of_ones_own():
    def init(shape):
        return {}, {"largest": jnp.ones(())}

    def apply(params, stats, x, *, train, mask=None):
        largest = jnp.abs(x).max() if train else stats["largest"]
        return x / largest, {"largest": largest}

    model = bnjax.mlp((8, 8), 3, norm=Norm(init, apply))
    params, stats = model.init(KEY, IMAGE, 1.0)
    outputs, after = model.apply(params, stats, X, train=True)
    _, shown = model.layers(params, stats, X, {}, train=True)
    assert float(jnp.abs(shown["hidden_1/norm"]).max()) == 1
    np.testing.assert_allclose(model.apply(params, after, X, train=False)[0], outputs, rtol=1e-5)
    assert model.config["norm"] == "own"

    plain = bnjax.mlp((8,), 3, norm=Norm(lambda shape: (None, None), lambda p, s, x, *, train, mask=None: (x, s)))
    params, stats = plain.init(KEY, IMAGE, 1.0)
    assert shapes(plain.apply(params, stats, X, train=True)[1]) == shapes(stats)

    for wrong, words in (
        (lambda p, s, x, *, train, mask=None: (x, {"largest": jnp.ones(3)}), r"init makes .*\(\).* apply returns .*3"),
        (lambda p, s, x, *, train, mask=None: (x, {}), "init makes statistics .*largest.* apply returns"),
        (lambda p, s, x, *, train, mask=None: (x[:, :1], s), r"must return the shape of x, \(2, 8\); got \(2, 1\)"),
    ):
        with pytest.raises(ValueError, match="norm 'mine': .*" + words):
            bnjax.mlp((8, 8), 3, norm=Norm(init, wrong, config={"norm": "mine"})).init(KEY, IMAGE, 1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bnjax.mlp(initializer="lsuv", norm="weight"), "'lsuv' has no effect beside norm 'weight'"),
        (lambda: models.residual(branch="fixup", norm="weight"), "'fixup' starts kernels at 0, .* norm 'weight' does"),
        (lambda: models.residual(branch="fixup", freeze_hidden=True), "from where freeze_hidden does not"),
        (lambda: models.residual(stem_stride=2), "stem_stride .* with kind 'dense' it must be 1, got 2"),
        (
            lambda: bnjax.mlp((8,)).apply(*bnjax.mlp((8,)).init(KEY, (5,), 1.0), jnp.ones((4, 6)), train=True),
            r"hidden_0: x has 6 features, which the kernel \(5, 8\) does not take",
        ),
        (lambda: models.get("cnov"), r"unknown model 'cnov' \(did you mean 'conv'\?\); allowed: mlp, deep, conv, res"),
        (lambda: models.deep(1), "depth must be at least 2, got 1"),
        (lambda: models.deep(5, epsilon=np.ones(5)), r"epsilon must be one number, got shape \(5,\)"),
        (lambda: models.conv((8, 8), strides=(1,)), r"strides must be one for each of 2 layers, got \(1,\)"),
        (lambda: models.conv((8,), strides=(0,)), "strides must be a positive integer, got 0"),
        (lambda: models.conv((8, 0)), r"features must be positive widths, got \(8, 0\)"),
        (lambda: models.conv((8,)).init(KEY, (16,), 1.0), r"model 'conv' takes images \[H, W, C\]; .* shape \(16,\)"),
        (lambda: models.residual((8, 4)), r"must not fall; got \(8, 4\)"),
        (lambda: models.residual(()), "of one block or more"),
        (lambda: models.residual(kind="conv", stem_stride=0), "stem_stride must be a positive integer, got 0"),
        (lambda: models.residual(kind="convolution"), "unknown kind 'convolution'"),
        (lambda: models.residual(branch="fixed"), r"unknown branch 'fixed' \(did you mean 'fixup'"),
        (lambda: models.residual(kind="conv").init(KEY, (16,), 1.0), "takes images"),
        (lambda: models.conv((8,), norm=norms.group(group_size=3)).init(KEY, IMAGE, 1.0), "group_size=3 does not div"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
