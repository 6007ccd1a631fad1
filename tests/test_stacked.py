"""Layers stacked by nn.scan and nn.vmap: each as if it were written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from models import loss_of, relative
from steps import layers_of, step_of

import kfqn_optax as kfqn
from kfqn_optax import pairs

D, LENGTH = 3, 4


class Block(nn.Module):
    """x -> relu(dense(x)); the carry form that nn.scan wants."""

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.tanh(nn.Dense(D, dtype=jnp.float64, param_dtype=jnp.float64, name="dense")(x))
        return x, None


class Scanned(nn.Module):
    """LENGTH blocks under nn.scan, or written out.

    Attributes:
        axis: of the stacked parameters; None to write the blocks out.
        remat: whether a block's activations are recomputed.
        length: number of blocks.
    """

    axis: int | None = 0
    remat: bool = False
    length: int = LENGTH

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        if self.axis is None:
            for i in range(self.length):
                x, _ = block(name=f"b{i}")(x, None)
            return x
        stack = nn.scan(
            block,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=self.length,
        )
        return stack(name="blocks")(x, None)[0]


def setup(axis, length=LENGTH, **options):
    """The scanned and the written-out model with the same weights, as losses and parameters."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(6, D)))
    targets = jnp.asarray(rng.normal(size=(6, D)))
    plain = Scanned(None, length=length)
    params = plain.init(jax.random.key(0), x)
    scanned = Scanned(axis, length=length, **options)
    layers = [params["params"][f"b{i}"] for i in range(length)]
    stacked = {"params": {"blocks": jax.tree.map(lambda *a: jnp.stack(a, axis), *layers)}}
    return (loss_of(plain), params), (loss_of(scanned), stacked), (x, targets)


PATH = "params/blocks/dense"


def measure(loss_fn, params, *batch):
    return jax.jit(lambda params: kfqn.curvature_fn(loss_fn, params, *batch)(params))(params)


@pytest.mark.parametrize(
    ("axis", "length", "remat"),
    [*((axis, length, False) for axis in (0, 1, -1) for length in (LENGTH, D)), (0, LENGTH, True)],
)
def test_statistics_of_a_scanned_stack(axis, length, remat):
    """Also where the stack is as long as the layers are wide, and shapes do not tell its axis."""
    (loss, params), (scanned, stacked), batch = setup(axis, length, remat=remat)
    expected = measure(loss, params, *batch)
    measured = measure(scanned, stacked, *batch)
    assert list(measured.layers) == [PATH]
    for i in range(length):
        one = jax.tree.map(lambda leaf: leaf[i], measured.layers[PATH])  # noqa: B023
        for ours, theirs in zip(
            jax.tree.leaves(one),
            jax.tree.leaves(expected.layers[f"params/b{i}/dense"]),
            strict=True,
        ):
            assert relative(ours, theirs) < 1e-10


@pytest.mark.parametrize(
    ("axis", "method"),
    [
        (0, kfqn.kbfgs),
        (1, kfqn.kbfgs_l),
        (-1, kfqn.kfqn),
        pytest.param(-1, kfqn.kbfgs, marks=pytest.mark.slow),
    ],
)
def test_training_a_scanned_stack(axis, method):
    (loss, params), (scanned, stacked), batch = setup(axis)
    plain_tx = method(0.1, 0.1)
    tx = method(0.1, 0.1, layers=kfqn.find_layers(scanned, stacked, *batch))
    plain_state, state = plain_tx.init(params), tx.init(stacked)
    plain_step, step = step_of(plain_tx, loss), step_of(tx, scanned)
    for _ in range(5):
        params, plain_state, _ = plain_step(params, plain_state, *batch)
        stacked, state, _ = step(stacked, state, *batch)
    for i in range(LENGTH):
        ours = jax.tree.map(lambda a: jnp.take(a, i, axis), stacked["params"]["blocks"])  # noqa: B023
        for a, b in zip(
            jax.tree.leaves(ours), jax.tree.leaves(params["params"][f"b{i}"]), strict=True
        ):
            assert relative(a, b) < 1e-9
    assert step._cache_size() == 1
    assert layers_of(state)[PATH].stage.shape == (LENGTH,)


class Ensemble(nn.Module):
    """Two nets that share nothing, by nn.vmap; or one batch under nn.vmap with shared weights."""

    axis: int | None

    @nn.compact
    def __call__(self, x):
        many = nn.vmap(
            nn.Dense,
            in_axes=None if self.axis is not None else 0,
            variable_axes={"params": self.axis},
            split_rngs={"params": self.axis is not None},
            axis_size=2 if self.axis is not None else None,
        )
        return many(D, dtype=jnp.float64, param_dtype=jnp.float64, name="dense")(x)


@pytest.mark.parametrize("axis", [0, 1])
def test_ensemble(axis):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)))
    model = Ensemble(axis)
    params = model.init(jax.random.key(0), x)

    def loss_fn(params, x):
        return jnp.mean(jnp.sum(model.apply(params, x) ** 2, axis=(0, 2)))

    measured = kfqn.curvature_fn(loss_fn, params, x)(params).layers["params/dense"]
    assert measured.input_moment.shape == (2, 6, 6)
    assert measured.rows.tolist() == measured.examples.tolist() == [6, 6]
    kernel = jnp.moveaxis(params["params"]["dense"]["kernel"], axis, 0)
    for i in range(2):
        bias = jnp.moveaxis(params["params"]["dense"]["bias"], axis, 0)[i]
        h = x @ kernel[i] + bias[None]
        assert relative(measured.cotangent_mean[i], 2 * h.mean(axis=0)) < 1e-12
        assert relative(measured.input_moment[i][:-1, :-1], x.T @ x / 6) < 1e-12


def test_shared_weights_under_nn_vmap_count_examples():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)))
    model = Ensemble(None)
    params = model.init(jax.random.key(0), x)

    def loss_fn(params, x):
        return jnp.mean(jnp.sum(model.apply(params, x) ** 2, axis=-1))

    measured = kfqn.curvature_fn(loss_fn, params, x)(params).layers["params/dense"]
    assert float(measured.examples) == float(measured.rows) == 6
    assert relative(measured.input_moment[:-1, :-1], x.T @ x / 6) < 1e-12


def test_a_stack_can_go_elsewhere():
    """Left out of the layers, stacked parameters go to the fallback."""
    _, (scanned, stacked), batch = setup(0)
    tx = kfqn.kbfgs(0.1, layers=(), fallback=optax.sgd(0.1))
    state = tx.init(stacked)
    grads = jax.grad(scanned)(stacked, *batch)
    updates, _ = tx.update(grads, state, stacked)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.1 * g), updates, grads)


def test_a_ruined_block_is_reset_alone():
    _, (scanned, stacked), batch = setup(0)
    tx = kfqn.kbfgs(0.1, 0.1, layers=kfqn.find_layers(scanned, stacked, *batch))
    step = step_of(tx, scanned)
    stacked, state, _ = step(stacked, tx.init(stacked), *batch)
    ruin = {"output": lambda H: H.at[1].multiply(-1), "input": lambda H: H.at[2].multiply(-1)}
    ours = layers_of(state)[PATH]
    ruined = ours._replace(**{side: do(getattr(ours, side)) for side, do in ruin.items()})
    ruined = jax.tree.map(
        lambda node: ruined if node is ours else node, state, is_leaf=lambda node: node is ours
    )
    new = layers_of(step(stacked, ruined, *batch)[1])[PATH]
    for side, block in (("output", 1), ("input", 2)):
        status = np.asarray(getattr(new, side + "_status"))
        assert status[block] == pairs.RESET
        assert (np.delete(status, block) != pairs.RESET).all()
        for H in getattr(new, side):
            assert np.linalg.eigvalsh(H)[0] > 0
