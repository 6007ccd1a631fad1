"""NNX: the same numbers as linen for the same weights; the user's model is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import problem, relative

import kfqn_optax as kfqn
from kfqn_optax.layers import dense


class Mlp(nnx.Module):
    """The network of `models.Mlp([4, 3])` on 5 inputs, with a batch norm and dropout on demand."""

    def __init__(self, rngs, noisy=False):
        self.Dense_0 = nnx.Linear(5, 4, rngs=rngs, param_dtype=jnp.float64)
        self.Dense_1 = nnx.Linear(4, 3, rngs=rngs, param_dtype=jnp.float64)
        self.noisy = noisy
        if noisy:
            self.norm = nnx.BatchNorm(4, rngs=rngs, param_dtype=jnp.float64)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.Dense_0(x)
        x = self.dropout(self.norm(x)) if self.noisy else x
        return self.Dense_1(nnx.relu(x))


def loss_fn(model, x, targets):
    return jnp.mean(jnp.sum(0.5 * (model(x) - targets) ** 2, axis=-1))


@pytest.fixture
def pair():
    """The linen problem and an NNX model of the same weights."""
    linen_loss, params, x, targets = problem()
    model = Mlp(nnx.Rngs(0))
    for name, layer in params["params"].items():
        getattr(model, name).kernel[...] = layer["kernel"]
        getattr(model, name).bias[...] = layer["bias"]
    return linen_loss, params, model, x, targets


def test_statistics_are_those_of_linen(pair):
    linen_loss, params, model, x, targets = pair
    expected = jax.jit(kfqn.curvature_fn(linen_loss, params, x, targets))(params)
    for loss in [loss_fn, nnx.jit(loss_fn), nnx.remat(loss_fn), over_examples]:
        measure = kfqn.nnx_curvature_fn(loss, model, x, targets)
        measured = jax.jit(measure)(nnx.state(model, nnx.Param))
        assert relative(measured.loss, expected.loss) < 1e-12
        assert set(measured.layers) == {"Dense_0", "Dense_1"}
        for name, layer in measured.layers.items():
            linen = expected.layers[f"params/{name}"]
            assert jax.tree.structure(layer) == jax.tree.structure(linen)
            for ours, theirs in zip(jax.tree.leaves(layer), jax.tree.leaves(linen), strict=True):
                assert relative(ours, theirs) < 1e-12
    found = kfqn.find_nnx_layers(loss_fn, model, x, targets)
    assert found[0] == dense("Dense_0", (5, 4), True)
    assert len(found) == 2


def over_examples(model, x, targets):
    return jax.vmap(lambda x, t: loss_fn(model, x[None], t[None]))(x, targets).mean()


def test_training_is_that_of_linen(pair):
    linen_loss, params, model, x, targets = pair
    tx = kfqn.kbfgs(0.1, 0.1, weight_decay=1e-3)
    batches = [(x, targets), (2 * x, targets)]

    state = kfqn.warm_start(tx.init(params), linen_loss, params, batches)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.opt_state = nnx.data(kfqn.warm_start(optimizer.opt_state, loss_fn, model, batches))

    @jax.jit
    def linen_step(params, state):
        grads = jax.grad(linen_loss)(params, x, targets)
        fn = kfqn.curvature_fn(linen_loss, params, x, targets)
        updates, state = tx.update(grads, state, params, curvature_fn=fn)
        return optax.apply_updates(params, updates), state

    @nnx.jit
    def nnx_step(model, optimizer):
        fn = kfqn.nnx_curvature_fn(loss_fn, model, x, targets)
        grads = nnx.grad(loss_fn)(model, x, targets)
        optimizer.update(model, grads, curvature_fn=fn)

    for _ in range(5):
        params, state = linen_step(params, state)
        nnx_step(model, optimizer)
    for name, layer in params["params"].items():
        assert relative(getattr(model, name).kernel[...], layer["kernel"]) < 1e-12
        assert relative(getattr(model, name).bias[...], layer["bias"]) < 1e-12
    ours = optax.tree.get(state, "layers")["params/Dense_0"]
    theirs = optax.tree.get(optimizer.opt_state, "layers")["Dense_0"]
    assert relative(theirs.output[...], ours.output) < 1e-12
    assert "Dense_1/kernel" in kfqn.summary(optimizer.opt_state)


def test_the_users_model_is_left_alone():
    """Batch statistics, random counters and classes are as they were, and jit traces once."""
    model = Mlp(nnx.Rngs(0), noisy=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)))
    targets = x[:, :3]
    before = jax.tree.map(np.asarray, jax.tree.leaves(nnx.state(model, nnx.BatchStat)))
    count = int(model.dropout.rngs.count[...])
    measure = kfqn.nnx_curvature_fn(loss_fn, model, x, targets)
    measure = jax.jit(measure)
    first, again = (measure(nnx.state(model, nnx.Param)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)  # the same dropout mask
    assert type(model.Dense_0) is nnx.Linear
    assert int(model.dropout.rngs.count[...]) == count
    after = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, before, [np.asarray(leaf) for leaf in after])
    assert not [name for name in vars(model.Dense_0) if name.startswith("kfqn")]


def test_objects_among_the_arguments_are_copied():
    """Random counters and batch statistics that the loss changes on the way stay as they are."""
    model, critic, rngs = Mlp(nnx.Rngs(0)), Mlp(nnx.Rngs(1), noisy=True), nnx.Rngs(2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)))

    def judged(model, critic, x, rngs):
        noise = jax.random.normal(rngs(), x.shape)
        return loss_fn(critic, x, jnp.tile(model(x + noise), (1, 1)))

    optimizer = nnx.Optimizer(model, kfqn.kbfgs(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, critic, optimizer, x, rngs):
        fn = kfqn.nnx_curvature_fn(judged, model, critic, x, rngs)
        first, again = (fn(nnx.state(model, nnx.Param)) for _ in range(2))
        optimizer.update(model, nnx.grad(judged)(model, critic, x, rngs), curvature_fn=fn)
        return first.loss, again.loss

    for number in range(2):
        first, again = step(model, critic, optimizer, x, rngs)
        assert float(first) == float(again)
        assert int(rngs.default.count[...]) == number + 1


def test_layers_with_a_parameter_in_common_are_left_out():
    class Net(nnx.Module):
        def __init__(self):
            self.a, self.b, self.c = (nnx.Linear(5, 5, rngs=nnx.Rngs(i)) for i in range(3))
            self.b.kernel = self.a.kernel

        def __call__(self, x):
            return self.c(self.b(nnx.relu(self.a(x))))

    model, x = Net(), jnp.ones((4, 5))
    layers = kfqn.find_nnx_layers(loss_fn, model, x, x)
    assert [layer.path for layer in layers] == ["c"]
    optimizer = nnx.Optimizer(model, kfqn.kbfgs(0.1, layers=layers), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        fn = kfqn.nnx_curvature_fn(loss_fn, model, x, x)
        optimizer.update(model, nnx.grad(loss_fn)(model, x, x), curvature_fn=fn)

    step(model, optimizer)


def test_shapes_are_enough_to_find_layers():
    abstract = nnx.eval_shape(lambda: Mlp(nnx.Rngs(0)))
    x, targets = (jax.ShapeDtypeStruct((6, d), jnp.float64) for d in (5, 3))
    layers = kfqn.find_nnx_layers(loss_fn, abstract, x, targets)
    assert [layer.path for layer in layers] == ["Dense_0", "Dense_1"]


def test_a_subclass_with_its_own_call_is_refused_by_name():
    class Doubled(nnx.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    class Net(nnx.Module):
        def __init__(self):
            self.odd = Doubled(5, 3, rngs=nnx.Rngs(0), param_dtype=jnp.float64)

        def __call__(self, x):
            return self.odd(x)

    model, x = Net(), jnp.ones((4, 5))
    optimizer = nnx.Optimizer(model, kfqn.kbfgs(0.1), wrt=nnx.Param)
    grads = nnx.grad(loss_fn)(model, x, x[:, :3])
    fn = kfqn.nnx_curvature_fn(loss_fn, model, x, x[:, :3])
    with pytest.raises(ValueError, match="measured no layer 'odd'"):
        optimizer.update(model, grads, curvature_fn=fn)


def test_a_linen_tree_is_refused():
    linen_loss, params, x, targets = problem()
    with pytest.raises(TypeError, match="needs an NNX module, got dict; for a linen model"):
        kfqn.nnx_curvature_fn(linen_loss, params, x, targets)
