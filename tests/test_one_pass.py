"""Loss, gradient and curvature from one pass: the same step, and nothing measured twice."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from models import problem, relative
from steps import batches_for, close, equal, step_of
from test_stacked import setup

import kfqn_optax as kfqn
from kfqn_optax.one_pass import anew


class Counted:
    """A curvature function that counts how often it is asked, and for what."""

    def __init__(self, curvature_fn):
        self.curvature_fn, self.asked = curvature_fn, []

    def __call__(self, params, **asked):
        self.asked.append(asked)
        return self.curvature_fn(params, **asked)


def one_pass(tx, loss_fn, calls=None, **asked):
    """As `step_of`, in one pass at the parameters; ``calls`` takes what was asked."""

    def step(params, state, *batch):
        counted = Counted(kfqn.curvature_fn(loss_fn, params, *batch))
        _, grads, fn = kfqn.value_and_grad(counted, params, **asked)
        updates, state = tx.update(grads, state, params, curvature_fn=fn)
        if calls is not None:
            calls.append(counted.asked)
        return optax.apply_updates(params, updates), state, updates

    return jax.jit(step)


@pytest.mark.parametrize(
    ("method", "calls"),
    [
        # at the parameters and at the probe; KFQN also for A in a first step, and for A s
        (functools.partial(kfqn.kbfgs, 0.1, 0.05), 2),
        (functools.partial(kfqn.kbfgs_l, 0.1, 0.05, memory_size=3), 2),
        (functools.partial(kfqn.kfqn, 0.1, 0.05), 4),
        (functools.partial(kfqn.kbfgs, 0.1, 0.05, update_every=2), 2),
    ],
    ids=["kbfgs", "kbfgs_l", "kfqn", "every 2nd step"],
)
def test_steps_are_the_same(method, calls):
    loss_fn, params, *_ = problem()
    tx, seen = method(), []
    one, two = one_pass(tx, loss_fn, seen), step_of(tx, loss_fn)
    at_one = at_two = (params, tx.init(params))
    for batch in batches_for(params, count=3):
        at_one, at_two = one(*at_one, *batch)[:2], two(*at_two, *batch)[:2]
    jax.tree.map(lambda a, b: None if a.dtype == bool else _close(a, b), at_one, at_two)
    assert len(seen) == 1  # compiled once
    at_the_point = [asked for asked in seen[0] if "gradient" in asked]
    assert len(at_the_point) == 1
    assert len(seen[0]) == calls


def _close(a, b):
    assert relative(a, b) < 1e-12


@pytest.mark.parametrize("remat", [False, True])
def test_layers_that_xla_would_run_twice(remat):
    _, (loss_fn, params), batch = setup(0, remat=remat)
    tx = kfqn.kbfgs(0.1, 0.05, layers=kfqn.find_layers(loss_fn, params, *batch))

    def loops(step):
        text = step.lower(params, tx.init(params), *batch).compile().as_text()
        return text.count(" while(")

    one, two = one_pass(tx, loss_fn), step_of(tx, loss_fn)
    assert loops(one) < loops(two)
    new, old = one(params, tx.init(params), *batch), two(params, tx.init(params), *batch)
    jax.tree.map(lambda a, b: None if a.dtype == bool else _close(a, b), new, old)


def test_parameters_that_are_masked_out():
    loss_fn, params, x, targets = problem()
    layers = kfqn.find_layers(loss_fn, params, x, targets)[:1]
    tx, calls = kfqn.kbfgs(0.1, 0.05, layers=layers, fallback=optax.sgd(0.1)), []
    one, two = one_pass(tx, loss_fn, calls), step_of(tx, loss_fn)
    new, old = (step(params, tx.init(params), x, targets)[0] for step in (one, two))
    jax.tree.map(_close, new, old)
    assert len(calls[0]) == 2


def test_sketches_of_block_k_bfgs():
    loss_fn, params, x, targets = problem()
    tx, calls = kfqn.block_kbfgs(pairs=3), []
    one, two = one_pass(tx, loss_fn, calls, sketches=3), step_of(tx, loss_fn)
    new, old = (step(params, tx.init(params), x, targets)[0] for step in (one, two))
    jax.tree.map(_close, new, old)
    with_sketches = [asked for asked in calls[0] if asked.get("sketches")]
    separate = []
    one_pass(tx, loss_fn, separate)(params, tx.init(params), x, targets)
    assert with_sketches
    assert len(calls[0]) == len(separate[0]) - 1


def test_microbatches():
    loss_fn, params, x, targets = problem()
    parts = kfqn.microbatches((x, targets), 4)
    counted = Counted(
        kfqn.over_microbatches(lambda x, t: kfqn.curvature_fn(loss_fn, params, x, t), parts)
    )
    loss, grads, fn = kfqn.value_and_grad(counted, params)
    expected = jax.value_and_grad(loss_fn)(params, x, targets)
    jax.tree.map(_close, (loss, grads), expected)
    fn(params)
    assert len(counted.asked) == 1


def test_nnx():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 2, rngs=rngs))
    x = jax.random.normal(jax.random.key(0), (8, 3), jnp.float32)

    def loss_fn(model, x):
        return jnp.mean(jnp.sum(model(x) ** 2, axis=-1))

    optimizer = nnx.Optimizer(model, kfqn.kbfgs(0.1, 0.05), wrt=nnx.Param)
    counted = Counted(kfqn.nnx_curvature_fn(loss_fn, model, x))
    loss, grads, fn = kfqn.value_and_grad(counted, nnx.state(model, nnx.Param))
    expected, expected_grads = nnx.value_and_grad(loss_fn)(model, x)
    assert relative(loss, expected) < 1e-6
    close(grads, expected_grads, rtol=1e-5)
    optimizer.update(model, grads, curvature_fn=fn)
    assert len(counted.asked) == 2  # and at the probe
    assert float(loss_fn(model, x)) < float(loss)


def test_other_arrays_are_measured_anew():
    loss_fn, params, x, targets = problem()
    counted = Counted(kfqn.curvature_fn(loss_fn, params, x, targets))
    _, _, fn = kfqn.value_and_grad(counted, params, moments=["params/Dense_0"])
    first = fn(params, moments=[])
    assert len(counted.asked) == 1
    elsewhere = jax.tree.map(lambda p: 2 * p, params)
    equal(fn(elsewhere), counted.curvature_fn(elsewhere))
    assert len(counted.asked) == 2
    # what was not measured
    assert fn(params).layers["params/Dense_1"].input_moment is not None
    assert fn(params, moments=[], sketches=2).layers["params/Dense_0"].sketches is not None
    vectors = {"params/Dense_0": first.layers["params/Dense_0"].input_mean}
    assert fn(params, vectors=vectors).layers["params/Dense_0"].input_product is not None
    assert len(counted.asked) == 5
    assert anew(fn) is counted
    assert anew(counted) is counted


def test_a_function_without_gradient():
    loss_fn, params, x, targets = problem()
    measured = kfqn.curvature_fn(loss_fn, params, x, targets)
    with pytest.raises(TypeError, match="returns no gradient when it is asked for one"):
        kfqn.value_and_grad(lambda params, **asked: measured(params), params)
