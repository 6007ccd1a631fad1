"""The counts by layer: found in any state, as numbers and as a table."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import problem
from steps import D0, D1, batches_for, layers_of

import kfqn_optax as kfqn
from kfqn_optax import layer_state, pairs
from kfqn_optax.layers import dense

COLUMNS = len(layer_state.COLUMNS)


def counted(state):
    """The state with the numbers 0, 1, 2, ... in the columns of each layer."""
    count = iter(range(0, 1000, 100))

    def numbers(path, leaf):
        if path[-1] != jax.tree_util.GetAttrKey("counts"):
            return leaf
        return jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape) + next(count)

    return jax.tree_util.tree_map_with_path(numbers, state)


WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "partition": lambda tx: optax.partition({"a": tx}, {"params": "a"}),
    "masked": lambda tx: optax.masked(tx, True),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    "method", [kfqn.kbfgs, kfqn.kbfgs_l, kfqn.kfqn, kfqn.scale_by_kbfgs, kfqn.block_kbfgs]
)
def test_found_in_any_state(wrapper, method):
    _, params, *_ = problem()
    health = kfqn.health(counted(WRAPPERS[wrapper](method(0.1)).init(params)))
    assert list(health) == [D0, D1]
    statuses = len(pairs.STATUS_WORDS)
    for layer, first in zip(health.values(), (0, 100), strict=True):
        assert [int(n) for n in layer.input.values()] == list(range(first, first + statuses))
        assert [int(n) for n in layer.output.values()] == [
            first + statuses + i for i in range(statuses)
        ]
        assert int(layer.powell_damped) == first + 2 * statuses
        assert int(layer.second_damped) == first + 2 * statuses + 1


def test_every_status_has_a_column():
    """One that is added to `pairs` is counted without more ado."""
    for field in ("input_status", "output_status"):
        counted = [value for name, value in layer_state.COLUMNS if name == field]
        assert sorted(counted) == sorted(pairs.STATUS_WORDS)
    health = kfqn.health(kfqn.kbfgs(0.1).init(problem()[1]))
    assert len(health[D0].input) == len(health[D0].output) == len(pairs.STATUS_WORDS)


@pytest.mark.parametrize("blocks", [(), (3,)])
def test_every_column_counts_its_own(blocks):
    """All pairs of statuses, and each damping by itself."""
    statuses = list(pairs.STATUS_WORDS)
    for number, status in enumerate(statuses):
        for powell, second in [(True, False), (False, True)]:
            other = statuses[number - 1]
            happened = {
                ("input_status", status), ("output_status", other), ("powell_damped", powell),
                ("second_damped", second),
            }  # fmt: skip
            values = [jnp.full(blocks, value) for value in (status, other, powell, second)]
            counts = layer_state.count(jnp.full((*blocks, COLUMNS), 7, jnp.int32), *values)
            expected = [7 + (column in happened) for column in layer_state.COLUMNS]
            np.testing.assert_array_equal(counts, np.broadcast_to(expected, counts.shape))
            assert counts.dtype == jnp.int32


def test_steps_that_learn_are_counted_and_those_without_curvature_are_not(trained):
    tx, _, params, state = trained  # four steps
    health = kfqn.health(state)
    for layer in health.values():
        assert layer.input["updated"] == layer.output["updated"] == 4
        assert sum(layer.input.values()) == sum(layer.output.values()) == 4
    assert health.totals()["updated"] == 16
    assert health.totals()["skipped"] == health.totals()["not_finite"] == 0
    damped = sum(int(layer.powell_damped + layer.second_damped) for layer in health.values())
    assert damped > 0
    _, after = jax.jit(lambda s: tx.update(params, s, params, curvature_fn=None))(state)
    assert str(kfqn.health(after)) == str(health)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_counts_are_an_int32_vector_whatever_the_parameters(dtype):
    _, params, *_ = problem()
    state = kfqn.kbfgs(0.1).init(jax.tree.map(lambda p: p.astype(dtype), params))
    for layer in layers_of(state).values():
        assert (layer.counts.dtype, layer.counts.shape) == (jnp.int32, (COLUMNS,))


def test_the_table():
    state = counted(kfqn.kbfgs(0.1).init(problem()[1]))
    header, rule, *lines = str(kfqn.health(state)).splitlines()
    titles = re.split(r"\s{2,}", header)
    assert titles[:3] == ["layer", "side", "updated"]
    assert titles[-2:] == ["Powell", "second"]
    assert set(rule) == {"-"}
    cells = [re.split(r"\s{2,}", line) for line in lines]
    assert [row[:3] for row in cells] == [
        [D0, "input", "0"],
        [D0, "output", str(len(pairs.STATUS_WORDS))],
        [D1, "input", "100"],
        [D1, "output", str(100 + len(pairs.STATUS_WORDS))],
    ]
    assert cells[1][-2:] == [str(COLUMNS - 2), str(COLUMNS - 1)]
    assert len(cells[0]) == len(titles) - 2  # the dampings are of the output side


def test_blocks_have_lines_of_their_own():
    layer = dense("d", (3, 2), bias=False)
    layer = dataclasses.replace(layer, kernel=layer.kernel.stacked((0,), (2,)))
    state = kfqn.kbfgs(0.1, layers=[layer]).init({"d": {"kernel": jnp.ones((2, 3, 2))}})
    health = kfqn.health(counted(state))
    assert health["d"].input["updated"].tolist() == [0, COLUMNS]
    names = [line.split()[:2] for line in str(health).splitlines()[2:]]
    assert names == [["d[0]", "input"], ["d[0]", "output"], ["d[1]", "input"], ["d[1]", "output"]]
    assert health.totals()["updated"] == 2 * COLUMNS + 2 * len(pairs.STATUS_WORDS)


def test_totals():
    _, params, *_ = problem()
    state = kfqn.kbfgs(0.1).init(params)
    values = {
        ("input_status", pairs.UPDATED): 5,
        ("output_status", pairs.NOT_POSITIVE): 7,
        ("output_status", pairs.NOT_FINITE): 11,
        ("input_status", pairs.ROUNDING): 13,
        ("input_status", pairs.NOT_MEASURED): 17,
        ("powell_damped", True): 19,
        ("second_damped", True): 23,
    }
    counts = jnp.array([values.get(column, 0) for column in layer_state.COLUMNS], jnp.int32)
    layers = layers_of(state)
    state = optax.tree.set(state, layers=layers | {D0: layers[D0]._replace(counts=counts)})
    assert kfqn.health(state).totals() == {
        "updated": 5, "skipped": 31, "not_finite": 11, "reset": 0, "powell_damped": 19,
        "second_damped": 23,
    }  # fmt: skip


@pytest.mark.parametrize("method", [kfqn.kbfgs, kfqn.block_kbfgs])
def test_an_nnx_optimizer(method):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, method(0.1), wrt=nnx.Param)
    health = kfqn.health(optimizer.opt_state)
    (layer,) = health.values()
    assert layer.output["updated"] == health.measured_steps == health.rejected_steps == 0


def test_steps_that_were_not_taken():
    """Those of all states of `block_kbfgs` together; a line of their own, if there are any."""
    params = problem()[1]
    state = kfqn.block_kbfgs().init(params)
    assert "steps" not in str(kfqn.health(state))
    trust = optax.tree.get(state, "trust")._replace(steps=jnp.int32(5), rejected=jnp.int32(2))
    state = optax.tree.set(state, trust=trust)
    health = kfqn.health((state, state, kfqn.kbfgs(0.1).init(params)))
    assert (health.measured_steps, health.rejected_steps) == (10, 4)
    assert str(health).splitlines()[-1] == "steps: 10 measured, 4 of them not taken"


@pytest.mark.parametrize("inside", [jax.jit, jax.eval_shape], ids=["jit", "shapes"])
def test_a_state_without_numbers(inside):
    _, params, *_ = problem()
    tx = kfqn.kbfgs(0.1)
    message = rf"the counts of layer '{D0}' are not numbers but .*: pass health\(\) a state with"
    if inside is jax.jit:
        call = jax.jit(lambda: str(kfqn.health(tx.init(params))))
    else:
        shapes = jax.eval_shape(tx.init, params)
        call = functools.partial(kfqn.health, shapes)
    with pytest.raises(ValueError, match=message):
        call()


def test_a_state_that_is_not_ours():
    params = {"kernel": jnp.ones((2, 2))}
    for tx in (optax.adam(0.1), kfqn.kfac(0.1)):
        message = "opt_state holds no state of block_kbfgs, kbfgs, kbfgs_l or kfqn: pass what"
        with pytest.raises(ValueError, match=message):
            kfqn.health(tx.init(params))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e200])
def test_a_warm_start_of_bad_inputs_is_refused(value):
    loss_fn, params, *_ = problem()
    x, targets = next(batches_for(params))
    batches = [(x, targets), (x.at[0, 0].set(value), targets)]
    message = rf"second moment of the inputs of layer '{D0}'.* is not finite or too large"
    with pytest.raises(ValueError, match=message):
        kfqn.warm_start(kfqn.kbfgs(0.1).init(params), loss_fn, params, batches)
