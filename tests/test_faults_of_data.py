"""Steps that go wrong as a whole: bad batches, rates, dampings, parameters; layers at the edge."""

import dataclasses

import faults
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import LAYERS, METHODS, T, X, fault, layers_of, program, trained, untroubled
from test_faults import AT_FIRST, goes_on, kept, methods, whens

import kfqn_optax as kfqn
from kfqn_optax import pairs
from kfqn_optax.layer_state import EMPTY, LayerState
from kfqn_optax.layers import dense
from kfqn_optax.statistics import LayerStatistics, Statistics

CURVATURE = ("input", "output", "input_moment", "s", "y", "stage")


# --- batches and parameters -----------------------------------------------------------------------


@methods
@whens
@pytest.mark.parametrize(
    ("which", "value"),
    [("x", np.nan), ("x", np.inf), ("x", 1e25), ("targets", np.nan), ("targets", -np.inf)],
)
def test_one_bad_number_in_a_batch(method, steps, which, value):
    """Nothing of the curvature changes but the input sides that the number does not reach."""
    x, targets = (X.at[0, 0].set(value), T) if which == "x" else (X, T.at[0, 0].set(value))
    params, before = trained(method, steps)
    lost, after, _ = program(method)(params, before, x=x, targets=targets)
    faults.assert_counted(before, after)
    assert not faults.is_finite(lost) or value == 1e25
    for path in LAYERS:
        layer, was = layers_of(after)[path], layers_of(before)[path]
        kept((was, layer), "output", "s", "y", "output_status")
        if which == "targets":
            faults.assert_same(layer, layers_of(untroubled(method, steps)[1])[path], "input")
    if which == "x":
        kept((layers_of(before)[LAYERS[0]], layers_of(after)[LAYERS[0]]), *CURVATURE)
        assert int(layers_of(after)[LAYERS[0]].input_status) == pairs.NOT_FINITE
    faults.assert_sound(after)


@methods
@whens
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parameters_that_are_lost(method, steps, layer, value):
    """The output sides stop; an input side goes on where the layers before it are sound."""
    params, before = trained(method, steps)
    params = jax.tree.map(lambda leaf: leaf, params)
    kernel = params["params"][layer.removeprefix("params/")]["kernel"]
    params["params"][layer.removeprefix("params/")]["kernel"] = kernel.at[0, 0].set(value)
    _, after, _ = program(method)(params, before)
    faults.assert_counted(before, after)
    for path in LAYERS:
        pair = layers_of(before)[path], layers_of(after)[path]
        kept(pair, "output", "s", "y")
        if path <= layer:
            plain = layers_of(untroubled(method, steps)[1])[path]
            faults.assert_same(pair[1], plain, "input", "input_moment", "input_status")
        elif np.isnan(value):
            kept(pair, "input", "input_moment", "stage", "input_status")
    faults.assert_sound(after)


# --- learning rate and damping --------------------------------------------------------------------


@methods
@whens
@pytest.mark.parametrize("rate", [np.nan, np.inf, 1e30])
def test_a_learning_rate_that_leads_nowhere(method, steps, rate):
    """The probe is lost, or its squares overflow; what is measured before it is learned."""
    params, before = trained(method, steps)
    _, after, _ = program(method)(params, before, fault("learning_rate", rate))
    for path in LAYERS:
        layer = layers_of(after)[path]
        kept((layers_of(before)[path], layer), "output", "s", "y", "output_status")
        plain = layers_of(untroubled(method, steps)[1])[path]
        faults.assert_same(layer, plain, "input", "input_moment", "input_status")
    faults.assert_sound(after)


@methods
def test_a_rate_that_warms_up_from_0(method):
    """Nothing moves and no output side learns; from the first step of some length on they do."""
    params, state = start = trained(method, AT_FIRST)
    for _ in range(3):
        params, state, _ = program(method)(params, state, fault("learning_rate", 0.0))
    assert faults.is_same(params, start[0])
    for path, layer in layers_of(state).items():
        faults.assert_same(layer, layers_of(start[1])[path], "output", "s")
        assert int(layer.output_status) == pairs.NOT_POSITIVE
        assert int(layer.input_status) == pairs.UPDATED
    for rate in [0.01, 0.05, 0.1]:
        params, state, _ = program(method)(params, state, fault("learning_rate", rate))
    goes_on(method, params, state)
    assert kfqn.health(state)[LAYERS[0]].output["s.y <= 0"] == 3


@methods
@whens
@pytest.mark.parametrize("damping", [np.nan, np.inf, -1.0, 0.0])
def test_a_schedule_of_damping_that_fails(method, steps, damping):
    """No pair of that step counts, and a layer that has not begun begins with the next step."""
    params, before = trained(method, steps)
    _, after, _ = program(method)(params, before, fault("damping", damping))
    faults.assert_counted(before, after)
    for path in LAYERS:
        pair = layers_of(before)[path], layers_of(after)[path]
        kept(pair, "input", "input_moment", "output", "stage", "input_status", "output_status")
    _, again, _ = program(method)(params, after)
    if steps == AT_FIRST:
        for path, plain in layers_of(untroubled(method, steps)[1]).items():
            faults.assert_same(layers_of(again)[path], plain, "input", "input_moment", "stage")
            assert int(layers_of(after)[path].stage) == EMPTY
    faults.assert_sound(again)


@methods
@pytest.mark.parametrize("damping", [1.0, 4.0, 100.0])
def test_damping_of_1_and_above(method, damping):
    params, state = start = trained(method, AT_FIRST)
    for _ in range(10):
        params, state, _ = program(method)(params, state, fault("damping", damping))
        faults.assert_sound(state)
    updated = [layer.output["updated"] for layer in kfqn.health(state).values()]
    assert updated == [10, 10, 10]
    assert loss(params) < loss(start[0])


@methods
def test_divergence_leaves_the_factors_sound(method):
    params, state = trained(method, AT_FIRST)
    for _ in range(12):
        params, state, _ = program(method)(params, state, fault("learning_rate", 1e6))
    assert not np.isfinite(loss(params))
    lost = state
    for _ in range(2):
        params, state, _ = program(method)(params, state)
    for path in LAYERS:
        kept((layers_of(lost)[path], layers_of(state)[path]), "output", "s", "y")
    assert faults.is_finite(layers_of(state))


def loss(params, x=X, targets=T):
    return float(faults.LOSS(params, x, targets))


# --- layers and batches at the edge ---------------------------------------------------------------

EDGES = {
    "dead units": (X, T),
    "constant inputs": (jnp.ones_like(X), T),
    "inputs of 0": (jnp.zeros_like(X), T),
    "one example eight times": (jnp.tile(X[:1], (8, 1)), jnp.tile(T[:1], (8, 1))),
    "large inputs": (100 * X, T),
    "small inputs": (1e-6 * X, T),
}


@methods
@pytest.mark.parametrize("edge", EDGES)
def test_edges(method, edge):
    """Ten steps: the loss goes down, the factors stay sound, what teaches nothing is counted."""
    x, targets = EDGES[edge]
    params, state = trained(method, AT_FIRST)
    if edge == "dead units":
        params = jax.tree.map(lambda leaf: leaf, params)
        params["params"]["Dense_0"]["bias"] = jnp.full(4, -100.0, jnp.float32)
    before, rate = loss(params, x, targets), 0.01 if edge == "large inputs" else faults.RATE
    for _ in range(10):
        params, state, _ = program(method)(
            params, state, fault("learning_rate", rate), x=x, targets=targets
        )
        faults.assert_sound(state)
    assert loss(params, x, targets) < before
    health = kfqn.health(state)
    assert health.totals()["not_finite"] == 0
    assert health[LAYERS[2]].output["updated"] == 10
    if edge == "dead units":
        first = layers_of(state)[LAYERS[0]]
        assert health[LAYERS[0]].output["s.y <= 0"] == 10
        faults.assert_same(first, layers_of(trained(method, AT_FIRST)[1])[LAYERS[0]], "output", "y")
    else:
        assert health[LAYERS[0]].input["updated"] == 10


@methods
def test_faults_in_every_other_step(method):
    """Training comes through, and every one of them is counted."""
    rng = np.random.default_rng(5)
    params, state = start = trained(method, AT_FIRST)
    reached = [("measured", "cotangent_mean"), ("measured", "input_mean"), ("probed", "input_mean")]
    for number in range(40):
        where, field = reached[rng.integers(3)]
        value = rng.choice([np.nan, np.inf, -np.inf, faults.HUGE])
        faulty = fault(where, value, LAYERS[rng.integers(3)], field) if number % 2 else None
        params, state, _ = program(method)(params, state, faulty)
        faults.assert_sound(state)
    assert loss(params) < 0.9 * loss(start[0])
    health = kfqn.health(state)
    assert 20 <= health.totals()["not_finite"] <= 40
    refused = sum(int(layer.output["not finite"]) for layer in health.values())
    assert refused == 20


@pytest.mark.parametrize("method", [*METHODS, "block_kbfgs", "kfac", "tkfac", "mbf"])
@pytest.mark.parametrize("tree", [{}, {"params": {}}, (), None], ids=str)
def test_trees_without_parameters(method, tree):
    tx = getattr(kfqn, method)(0.1, 0.1)
    state = tx.init(tree)
    for extra in ({}, {"curvature_fn": None}):
        updates, after = tx.update(tree, state, tree, **extra)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        assert jax.tree.structure(after) == jax.tree.structure(state)
    if method in (*METHODS, "block_kbfgs"):
        assert kfqn.health(state) == {}
        assert kfqn.health(state).totals()["updated"] == 0


# --- blocks ---------------------------------------------------------------------------------------


STACKED = dense("d", (3, 2), bias=True)
STACKED = dataclasses.replace(
    STACKED, kernel=STACKED.kernel.stacked((0,), (2,)), bias=STACKED.bias.stacked((0,), (2,))
)


@pytest.fixture(scope="module")
def stack():
    """A step of one layer with two blocks: state and, by field, factors of the statistics."""
    rng = np.random.default_rng(0)
    rows, targets = rng.normal(size=(2, 6, 3)), jnp.asarray(rng.normal(size=(2, 6, 2)))
    rows = jnp.asarray(np.concatenate([rows, np.ones((2, 6, 1))], axis=-1))
    params = {"d": {"kernel": jnp.asarray(rng.normal(size=(2, 3, 2))), "bias": jnp.zeros((2, 2))}}
    tx = kfqn.scale_by_kbfgs(0.1, 0.1, layers=[STACKED])

    def statistics(params, scales):
        weights = jnp.concatenate([params["d"]["kernel"], params["d"]["bias"][:, None]], axis=1)
        cotangents = rows @ weights - targets
        layer = LayerStatistics(
            input_moment=rows.mT @ rows / 6 * scales["input_moment"][:, None, None],
            input_product=None,
            input_mean=rows.mean(axis=1) * scales["input_mean"][:, None],
            cotangent_mean=cotangents.mean(axis=1) * scales["cotangent_mean"][:, None],
            cotangent_noise=jnp.zeros(2),
            rows=jnp.full(2, 6.0),
            examples=jnp.full(2, 6.0),
        )
        return Statistics(jnp.zeros(()), {"d": layer}), rows.mT @ cotangents / 6

    @jax.jit
    def step(state, scales):
        _, gradient = statistics(params, jax.tree.map(jnp.ones_like, scales))
        gradient = {"d": {"kernel": gradient[:, :-1], "bias": gradient[:, -1]}}
        return tx.update(gradient, state, params, curvature_fn=lambda p: statistics(p, scales)[0])[
            1
        ]

    ones = {name: jnp.ones(2) for name in ("input_moment", "input_mean", "cotangent_mean")}
    return step, ones, step(step(tx.init(params), ones), ones)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("field", ["input_moment", "input_mean", "cotangent_mean"])
def test_a_block_is_kept_and_counted_by_itself(stack, block, field):
    step, ones, before = stack
    after = step(before, ones | {field: ones[field].at[block].set(np.nan)})
    faults.assert_counted(before, after)
    old, new, plain = (state.layers["d"] for state in (before, after, step(before, ones)))
    of_block, of_other = (
        [jax.tree.map(lambda leaf, i=i: leaf[i], layer) for layer in (old, new, plain)]
        for i in (block, 1 - block)
    )
    faults.assert_same(of_other[1], of_other[2], *LayerState._fields)
    sides = {"input_moment": "i", "input_mean": "io", "cotangent_mean": "o"}[field]
    for side, fields in {"i": ("input", "input_status"), "o": ("output", "s", "y")}.items():
        if side in sides:
            kept((of_block[0], of_block[1]), *fields)
        else:
            faults.assert_same(of_block[1], of_block[2], *fields)
    counted = kfqn.health(after)["d"]
    for side in ("input", "output"):
        expected = [int(i == block and side[0] in sides) for i in (0, 1)]
        assert getattr(counted, side)["not finite"].tolist() == expected
