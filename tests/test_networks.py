"""Networks of others' making as models: what is scaled, decayed and shown, with right gradients; roads into a sweep.

Gradients are compared in float64, relative to the largest entry: 1e-9 (seen: 1e-12).
"""

import json
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import own_networks
import pytest
from flax import linen as nn
from flax import nnx
from own_networks import IMAGE, NETWORKS

import bnjax
from bnjax import probes, tracing, training
from bnjax.interop import equinox as from_equinox
from bnjax.interop import flax as from_flax
from bnjax.interop import nnx as from_nnx

every = pytest.mark.parametrize("name", NETWORKS)
# All that need programs are slow but for one.
some = pytest.mark.parametrize(
    "name", [n if n == "plain JAX" else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS]
)


def images(count=12, dtype=np.float32):
    return np.random.default_rng(0).normal(size=(count, *IMAGE)).astype(dtype)


def dataset(count=64):
    y = np.arange(count, dtype=np.int32) % 10
    return bnjax.Dataset(images(count), y, images(20), y[:20])


def leaves(tree):
    return {tracing.name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def floats(tree, dtype):
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def drawn(model, init_scale=1.0, key=0):
    return jax.jit(partial(model.init, input_shape=IMAGE))(jax.random.key(key), init_scale=init_scale)


@every
def test_what_is_read(name):
    """Every product, norm and nonlinearity, in the order of the computation; nothing is not seen."""
    expected = NETWORKS[name]
    model = bnjax.as_model(expected.network)
    found = bnjax.describe(model, IMAGE)
    assert found.parts == tuple(expected.parts.split())
    assert found.not_seen == {}
    products = [part for part in found.parts if part in leaves(drawn_shapes(model)[0])]
    assert {row.name for row in found.parameters if row.role} == {*products}
    assert [row.name for row in found.parameters if row.role == "readout"] == [expected.readout]
    assert {*found.names("decayed")} == {*products}
    assert {*found.names("scaled")} == {*products} - {expected.readout}
    assert all(len(line) <= 80 for line in str(found).splitlines())
    # In evaluation, where running statistics are constants, the norms are the same.
    reading = tracing.read(model.apply, *drawn_shapes(model), jnp.asarray(images()), train=False)
    assert tuple(part.name for part in reading.parts) == found.parts


def drawn_shapes(model):
    return jax.eval_shape(partial(model.init, input_shape=IMAGE), jax.random.key(0))


@some
def test_what_is_scaled(name):
    """Norms at scale 100 over 1. Behind batch normalization a kernel's scale does not change the outputs."""
    expected = NETWORKS[name]
    model = bnjax.as_model(expected.network)
    (params, stats), (scaled, _) = drawn(model), drawn(model, 100.0)
    hidden = {*expected.parts.split()} & {*leaves(params)} - {expected.readout}
    for path, value in leaves(params).items():
        factor = 100 if path in hidden else 1
        np.testing.assert_allclose(np.linalg.norm(leaves(scaled)[path]), factor * np.linalg.norm(value), rtol=1e-5)

    @jax.jit
    def outputs(params):
        return model.apply(params, stats, images(), train=True)[0]

    reference = outputs(params)
    for path in hidden:
        tripled = jax.tree_util.tree_map_with_path(
            lambda p, v, path=path: 3 * v if tracing.name_of(p) == path else v, params
        )
        change = np.abs(outputs(tripled) - reference).max() / np.abs(reference).max()
        # epsilon over the variance, 1e-5 / 0.05 or less, is what is left
        assert (change < 2e-3) == (path in expected.behind_batch_norm), (path, change)


@some
def test_what_is_decayed(name):
    """One step of SGD with decay and without differs by rate * decay * W in kernels, and in nothing else."""
    expected = NETWORKS[name]
    config = bnjax.TrainConfig(steps=1, batch_size=16)
    start, advance = training.make_run(bnjax.as_model(expected.network), config)

    @jax.jit
    def trained(decay):
        hyper = bnjax.Hyperparams(seed=0, learning_rate=0.1, momentum=0.0, weight_decay=decay)
        state = start(hyper, dataset())
        return state.params, advance(state, hyper, dataset(), 0, 1).params

    (first, without), (_, decayed) = trained(0.0), trained(0.5)
    for path, value in leaves(first).items():
        difference = leaves(without)[path] - leaves(decayed)[path]
        kernel = path in expected.parts.split()
        np.testing.assert_allclose(difference, 0.05 * value if kernel else 0 * value, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "train"),
    [
        ("plain JAX", False),
        ("Equinox MLP", True),
        *(pytest.param(n, True, marks=pytest.mark.slow) for n in NETWORKS if n != "Equinox MLP"),
        pytest.param("linen CNN", False, marks=pytest.mark.slow),
    ],
)
def test_gradients(x64, name, train):
    """The gradient to what adds a bias is, summed, the gradient to the bias: by jax.grad of `apply` itself."""
    expected = NETWORKS[name]
    model = bnjax.as_model(expected.network)
    params, stats = floats(drawn(model), jnp.float64)
    x, c = images(dtype=np.float64), np.random.default_rng(1).normal(size=(12, 10))

    def both(params, offsets):
        outputs, shown = model.layers(params, stats, x, offsets, train=train)
        return (outputs * c).sum(), shown

    def by_hand(params):
        return (model.apply(params, stats, x, train=train)[0] * c).sum()

    _, shown = jax.eval_shape(both, params, {})
    assert [*shown] == sorted(expected.parts.split())  # JAX has sorted them
    offsets = {name: np.zeros(value.shape, value.dtype) for name, value in shown.items()}

    @jax.jit
    def values_and_gradients(params, offsets):
        return jax.value_and_grad(both, (0, 1), has_aux=True)(params, offsets), jax.value_and_grad(by_hand)(params)

    (((total, _), (to_params, to_offsets)), (by_hand_total, reference)) = values_and_gradients(params, offsets)
    np.testing.assert_allclose(total, by_hand_total, rtol=1e-12)
    reference = leaves(reference)
    for path, gradient in leaves(to_params).items():
        np.testing.assert_allclose(gradient, reference[path], atol=1e-9 * np.abs(reference[path]).max() + 1e-12)
    for part, bias in expected.biases.items():
        summed = to_offsets[part].sum(tuple(range(to_offsets[part].ndim - reference[bias].ndim)))
        np.testing.assert_allclose(summed, reference[bias], atol=1e-9 * np.abs(reference[bias]).max() + 1e-12)


class Marked(nn.Module):
    """The CNN, with Flax's own marks at its norms and activations."""

    @nn.compact
    def __call__(self, x, train):
        x = self.perturb("Conv_0/norm", nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)))
        x = nn.max_pool(self.perturb("Conv_0/activation", nn.relu(x)), (2, 2), (2, 2))
        x = self.perturb("Conv_1/norm", nn.BatchNorm(use_running_average=not train)(nn.Conv(6, (3, 3))(x)))
        x = self.perturb("Conv_1/activation", nn.gelu(x))
        return nn.Dense(10)(x.mean((1, 2)))


@pytest.mark.slow
def test_gradients_to_activations(x64):
    """Against `flax.linen.Module.perturb`."""
    model, x = bnjax.as_model(own_networks.CNN()), images(dtype=np.float64)
    params, stats = floats(drawn(model), jnp.float64)
    variables = Marked().init(jax.random.key(0), x, False)
    marks = floats(variables["perturbations"], jnp.float64)

    def theirs(marks):
        variables = {"params": params, "batch_stats": stats, "perturbations": marks}
        return jnp.sin(Marked().apply(variables, x, True, mutable=["batch_stats"])[0]).sum()

    def ours(offsets):
        return jnp.sin(model.layers(params, stats, x, offsets, train=True)[0]).sum()

    reference = jax.jit(jax.grad(theirs))(marks)
    found = jax.jit(jax.grad(ours))({name: jnp.zeros_like(mark) for name, mark in marks.items()})
    for name, gradient in reference.items():
        np.testing.assert_allclose(found[name], gradient, atol=1e-9 * np.abs(gradient).max())


# Roads into a sweep.


def sweep(network, axes, ds=None, **options):
    config = bnjax.TrainConfig(steps=3, batch_size=16, eval_every=1)
    return bnjax.sweep(network, ds or dataset(), config, axes, progress=False, **options)


@pytest.mark.slow
def test_networks_of_each_kind_beside_one_another():
    chosen = ("NNX CNN", "Equinox MLP", "plain JAX")
    models = {"mlp": bnjax.mlp((6,)), **{name: NETWORKS[name].network for name in chosen}}
    found = sweep(models, {"seed": [0, 1], "init_scale": [1.0, 100.0]})
    assert found.model.values.tolist() == [*models]
    losses = found.train_loss.isel(step=0)
    assert np.isfinite(losses).all()
    assert (losses.isel(seed=0) != losses.isel(seed=1)).all()  # instances are drawn anew
    # epsilon apart, the scale behind batch normalization changes nothing at the first step
    assert (losses.sel(model="plain JAX").diff("init_scale") != 0).all()
    kernels = found.attrs["kernels"]
    assert kernels["mlp"] == {
        "scaled": ["hidden_0/kernel"],
        "decayed": ["hidden_0/kernel", "output/kernel"],
        "not_seen": {},
    }
    assert kernels["NNX CNN"]["scaled"] == ["conv/kernel", "layers/0/kernel"]


@pytest.mark.slow
def test_linen_networks_in_a_sweep():
    models = {"cnn": own_networks.CNN(), "transformer": own_networks.Transformer()}
    found = sweep(models, {"seed": [0, 1], "init_scale": [1.0, 100.0]})
    assert np.isfinite(found.train_loss.sel(init_scale=1.0)).all()
    (alone,) = sweep(models["transformer"], {"seed": [1]}).train_loss.values
    np.testing.assert_allclose(found.train_loss.sel(model="transformer", seed=1, init_scale=1.0), alone, rtol=1e-5)


@pytest.mark.parametrize("name", ["Equinox MLP", "NNX CNN"])
def test_an_instance_is_its_own_draw(name):
    """Times the scale, whatever the key; a function draws anew."""
    network = NETWORKS[name].network
    model, module = bnjax.as_model(network), from_equinox if name == "Equinox MLP" else from_nnx
    (a, _), (b, _) = (model.init(jax.random.key(seed), IMAGE, 1.0) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    own = network[0].layers[0].weight if name == "Equinox MLP" else network.conv.kernel[...]
    path = "layers/0/weight" if name == "Equinox MLP" else "conv/kernel"
    np.testing.assert_array_equal(leaves(a)[path], own)
    draw = module.drawn_anew(network)
    (a, _), (b, _) = (module.as_model(draw).init(jax.random.key(seed), IMAGE, 1.0) for seed in (0, 1))
    assert not np.array_equal(leaves(a)[path], leaves(b)[path])


class Sized(nnx.Module):
    def __init__(self, width, rngs):
        self.hidden = nnx.Linear(64, width, rngs=rngs)
        self.output = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.relu(self.hidden(x.reshape(len(x), -1))))


def test_seeds_of_an_instance_that_cannot_be_drawn_anew():
    mlp = eqx.nn.MLP(64, 10, 6, 1, key=jax.random.key(0))
    for network in (Sized(6, nnx.Rngs(0)), eqx.nn.Sequential([eqx.nn.Lambda(jnp.ravel), mlp])):
        with pytest.raises(ValueError, match=r"seed is swept, but the network does not draw.*lambda rngs: Net"):
            sweep(network, {"seed": [0, 1]})
    assert from_nnx.drawn_anew(Sized(6, nnx.Rngs(0))) is None
    found = sweep(from_nnx.as_model(lambda rngs: Sized(6, rngs)), {"seed": [0, 1]})
    assert (found.train_loss.isel(seed=0) != found.train_loss.isel(seed=1)).all()
    assert sweep(Sized(6, nnx.Rngs(0)), {"learning_rate": [0.1, 0.2]}).train_loss.shape == (2, 3)


def test_a_class_with_arguments_is_not_drawn_anew():
    """Its defaults need not be what the instance was made with, even where all shapes are equal."""

    class Net(eqx.Module):
        layer: eqx.nn.Linear
        index: jax.Array

        def __init__(self, key, std=1.0):
            self.layer, self.index = eqx.nn.Linear(64, 10, key=key), jnp.arange(64)[::-1]

        def __call__(self, x):
            return self.layer(x.ravel()[self.index])

    assert from_equinox.drawn_anew(Net(jax.random.key(0))) is None
    # Its integers are no parameters, and are kept.
    net = Net(jax.random.key(0))
    model = bnjax.as_model(net)
    params, stats = model.init(jax.random.key(0), IMAGE, 1.0)
    expected = jax.vmap(net)(images())
    np.testing.assert_allclose(model.apply(params, stats, images(), train=False)[0], expected, rtol=1e-6)
    assert [*leaves(params)] == ["layer/weight", "layer/bias"]


class Noisy(nn.Module):
    rate: float = 0.5
    always: bool = False

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(32)(x.reshape(len(x), -1)))
        return nn.Dense(10)(nn.Dropout(self.rate, deterministic=not (train or self.always))(x))


def test_dropout():
    """Another mask at each step and for each seed, none in evaluation; the key is part of the state."""
    model = bnjax.as_model(Noisy())
    apply = jax.jit(model.apply, static_argnames="train")
    (params, first), (_, other) = (drawn(model, key=seed) for seed in (0, 1))
    one, second = apply(params, first, images(), train=True)
    again, _ = apply(params, first, images(), train=True)
    np.testing.assert_array_equal(one, again)
    for state in (second, other):
        assert np.abs(np.asarray(apply(params, state, images(), train=True)[0]) - one).max() > 0.1
    outputs, same = apply(params, first, images(), train=False)
    jax.tree.map(np.testing.assert_array_equal, same, first)
    np.testing.assert_allclose(outputs, apply(params, other, images(), train=False)[0])
    # 10 outputs of 12 examples: the mean of 200 masks is within 6 standard errors of the outputs without
    masked = []
    for _ in range(200):
        outputs_now, first = apply(params, first, images(), train=True)
        masked.append(np.asarray(outputs_now))
    errors = np.std(masked, axis=0) / np.sqrt(len(masked))
    assert (np.abs(np.mean(masked, axis=0) - np.asarray(outputs)) < 6 * errors).all()
    with pytest.raises(ValueError, match="random numbers in evaluation, too"):
        bnjax.as_model(Noisy(always=True)).init(jax.random.key(0), IMAGE, 1.0)


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(20, 8)(tokens)
        return nn.Dense(10)(nn.relu(nn.Dense(8)(x.mean(1))))


def test_tokens():
    """Integer inputs; the embedding is neither scaled nor decayed, and named as not seen.

    (The readout is made first, and so is called Dense_0.)
    """
    rng = np.random.default_rng(0)
    x, y = rng.integers(20, size=(64, 5)), rng.integers(10, size=64)
    ds = bnjax.Dataset(x.astype(np.int32), y.astype(np.int32), x[:20].astype(np.int32), y[:20].astype(np.int32))
    found = sweep(Tokens(), {"init_scale": [1.0, 10.0]}, ds)
    assert np.isfinite(found.train_loss).all()
    assert found.attrs["kernels"][""] == {
        "scaled": ["Dense_1/kernel"],
        "decayed": ["Dense_0/kernel", "Dense_1/kernel"],
        "not_seen": {"Embed_0/embedding": "looked up, as an embedding"},
    }
    assert "not seen: Embed_0/embedding" in str(bnjax.describe(Tokens(), (5,)))


@pytest.mark.slow
def test_probes_take_networks():
    network = NETWORKS["plain JAX"].network
    model = bnjax.as_model(network)
    params, stats = drawn(model)
    found = probes.signals(network, params, stats, images())
    assert [*found] == NETWORKS["plain JAX"].parts.split()
    assert found["W1/activation"].saturated < 1  # tanh, after its norm
    assert np.isnan(found["W1/norm"].saturated)  # no elementwise function of the product
    flow, weights = probes.flow(network, IMAGE, batch_size=8), probes.weights(network, IMAGE)
    assert weights.layers == ("W1", "W2", "blocks/0/w")
    results = sweep(network, {"seed": [0]}, probe=flow)
    assert results.layer.values.tolist() == [*found]


@pytest.mark.slow
def test_what_does_not_depend_on_the_one_before_has_no_saturation():
    """The key projection of attention comes after the query's in the list, not in the network."""
    model = bnjax.as_model(own_networks.Transformer())
    found = jax.jit(partial(probes.signals, model))(*drawn(model), images())
    attention = "MultiHeadDotProductAttention_0"
    for name in ("key/kernel", "value/kernel"):
        assert np.isnan(found[f"{attention}/{name}"].saturated)
    assert 0 <= found["Dense_1/activation"].saturated < 0.2  # silu


# What is refused.


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x.reshape(len(x), -1))


class Flat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x)  # [N, 8, 8, 10]


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        return nn.Dense(10)(x), x


@pytest.mark.parametrize(
    ("network", "axes", "message"),
    [
        ("net", {}, r"a network must be a bnjax.Model, .*; got str 'net'"),
        (None, {}, "got NoneType None"),
        ((1, 2), {}, "got tuple"),
        (Linear(), {"init_scale": [0.1, 1.0]}, r"init_scale has nothing to multiply in the network:(?s:.)*readout"),
        (Flat(), {}, r"outputs must be one array \[N, K\] of floats; for N = 2 it gives .*2, 8, 8, 10"),
        (Two(), {}, r"outputs must be one array \[N, K\]"),
        ((lambda key, shape: jnp.ones((3, 3)), lambda params, x: x @ params), {}, r"examples of shape \(8, 8, 1\)"),
    ],
    ids=["text", "none", "pair", "scale", "flat", "two", "shapes"],
)
def test_refused(network, axes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep(network, axes or {"learning_rate": [0.1]}, path=tmp_path / "results")
    assert not any(tmp_path.iterdir())


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match=r"scaled and config are for networks that are no bnjax\.Model"):
        bnjax.as_model(bnjax.mlp(), scaled=["hidden_0"])
    with pytest.raises(ValueError, match="arguments are those of a Flax network"):
        bnjax.as_model(NETWORKS["plain JAX"].network, arguments=lambda train: {})
    with pytest.raises(ValueError, match=r"init_scale=2.0 has nothing to multiply: .*Dense_0/kernel \(readout\)"):
        bnjax.as_model(Linear()).init(jax.random.key(0), IMAGE, 2.0)
    with pytest.raises(ValueError, match="has nothing to multiply"):
        bnjax.as_model(Linear()).init(jax.random.key(0), IMAGE, jnp.float32(2))
    with pytest.raises(ValueError, match="scaled takes a list of names, got 'Dense_0'"):
        bnjax.as_model(Linear(), scaled="Dense_0").init(jax.random.key(0), IMAGE)
    linear = bnjax.as_model(Linear(), scaled=["Dense_0"])
    one, two = (linear.init(jax.random.key(0), IMAGE, scale)[0]["Dense_0"] for scale in (1.0, 2.0))
    np.testing.assert_array_equal(two["kernel"], 2 * one["kernel"])
    np.testing.assert_array_equal(two["bias"], one["bias"])
    model = bnjax.as_model(own_networks.CNN(), scaled=["Conv_0", "Conv_7"])
    with pytest.raises(ValueError, match=r"scaled has \['Conv_7'\].*Conv_0/kernel, Conv_1/kernel, Dense_0/kernel"):
        model.init(jax.random.key(0), IMAGE, 1.0)


def test_another_parameter_may_be_scaled_by_its_whole_path():
    model = bnjax.as_model(Tokens(), scaled=["Embed_0/embedding"])
    one, two = (model.init(jax.random.key(0), (5,), scale)[0] for scale in (1.0, 2.0))
    np.testing.assert_array_equal(two["Embed_0"]["embedding"], 2 * one["Embed_0"]["embedding"])
    np.testing.assert_array_equal(two["Dense_0"]["kernel"], one["Dense_0"]["kernel"])


def test_collections_and_arguments_of_linen_modules():
    class Cached(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            self.variable("cache", "x", jnp.zeros, ())
            return nn.Dense(2)(x)

    class Asking(nn.Module):
        @nn.compact
        def __call__(self, x, phase):
            if phase == "slip":
                raise TypeError("a slip within")
            return nn.Dense(2)(x)

    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"params and batch_stats, the module has \['cache'\] too"):
        bnjax.as_model(Cached()).init(key, (3,), 1.0)
    with pytest.raises(ValueError, match=r"Asking was called with x and nothing else: .*missing.*'phase'"):
        bnjax.as_model(Asking()).init(key, (4,), 1.0)
    model = bnjax.as_model(Asking(), arguments=lambda train: {"phase": "train" if train else "eval"})
    assert model.init(key, (4,), 1.0)[0]["Dense_0"]["kernel"].shape == (4, 2)
    with pytest.raises(ValueError, match="a slip within"):
        bnjax.as_model(Asking(), arguments=lambda train: {"phase": "slip"}).init(key, (4,), 1.0)
    for name, value in {"deterministic": False, "is_training": True, "use_running_average": False}.items():
        call = eval(f"lambda self, x, {name}: None")
        assert bnjax.interop.functions.arguments(call)(True) == {name: value}


def test_configs_tell_networks_apart_and_are_json():
    mask = np.ones(5000, np.float32)
    other = mask.copy()
    other[2500] = 0  # in the middle, which NumPy does not print

    class Masked(nn.Module):
        mask: np.ndarray | jax.Array

        def __call__(self, x, train):
            return x * self.mask

    networks = [
        *(Noisy(), Noisy(0.1), nn.Sequential([nn.Dense(3), nn.relu]), nn.Sequential([nn.Dense(3), nn.silu])),
        *(Masked(m) for m in (mask, other, mask.reshape(50, 100), mask.view(np.int32), jnp.asarray(other) / 2)),
        *(NETWORKS[name].network for name in ("plain JAX", "NNX CNN", "Equinox MLP")),
    ]
    texts = [json.dumps(bnjax.as_model(network).config) for network in networks]
    texts.append(json.dumps(bnjax.as_model(Noisy(), scaled=["Dense_0"]).config))
    assert len({*texts}) == len(texts)
    assert not any("0x" in text for text in texts)
    assert from_flax.as_model(Noisy(), config={"name": "mine"}).config == {"name": "mine"}
    assert from_flax.as_model(Masked(jnp.asarray(mask))).config == from_flax.as_model(Masked(mask)).config
