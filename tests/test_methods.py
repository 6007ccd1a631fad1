"""K-BFGS(L) and KF-QN: whole trajectories against the NumPy reference, and what sets them apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Mlp, loss_of, problem, relative
from steps import CURVATURE, batches_for, close, layers_of, matrices, step_of

import kfqn_optax as kfqn
from kfqn_optax import inverse, layer_state

LR, DAMPING = 0.3, 0.2


SLOW = pytest.mark.slow
apply = jax.jit(inverse.apply)


def dense(factor):
    return apply(factor, np.eye(inverse.size(factor)))


def sequences(positions, steps=8, d_in=4, d_out=3, examples=5):
    rng = np.random.default_rng(3)
    for _ in range(steps):
        shape = (examples, positions) if positions else (examples,)
        yield rng.normal(size=(*shape, d_in)), rng.uniform(size=(*shape, d_out))


OPTIONS = [
    {},
    {"split": "sqrt"},
    {"output_memory": 3},
    {"input_memory": 3},
    {"input_memory": 2, "output_memory": 40},
]


@pytest.mark.parametrize(
    ("positions", "options"),
    [
        *((6, options) for options in OPTIONS),
        (None, {}),
        (None, OPTIONS[-1]),
        (1, {}),
        *(pytest.param(p, o, marks=SLOW) for p in (None, 1) for o in OPTIONS[1:-1]),
        pytest.param(1, OPTIONS[-1], marks=SLOW),
    ],
    ids=str,
)
def test_kfqn_against_the_reference(positions, options):
    model = Mlp([5, 3])
    loss_fn = loss_of(model, "bce")
    data = list(sequences(positions))
    params = model.init(jax.random.key(1), jnp.asarray(data[0][0]))
    tx = kfqn.kfqn(LR, DAMPING, weight_decay=1e-3, **options)
    state, step = tx.init(params), None
    step = step_of(tx, loss_fn)
    theirs = reference.Kfqn(
        matrices(params), ["relu", "linear"], "bce", LR, DAMPING, weight_decay=1e-3, **options
    )
    powell = set()
    for x, t in data:
        params, state, _ = step(params, state, jnp.asarray(x), jnp.asarray(t))
        records = theirs.step(x, t)
        for path, r, W in zip(sorted(layers_of(state)), records, matrices(params), strict=True):
            layer = layers_of(state)[path]
            assert layer.input_moment is None
            ours = {
                "W": W, "H_a": dense(layer.input), "H_g": dense(layer.output),
                "s": layer.s, "y": layer.y,
            }  # fmt: skip
            for name, value in ours.items():
                assert relative(value, r[name]) < 1e-9, (name, path)
            assert float(layer.positions) == (positions or 1)
            assert int(layer.output_status) == r["H_g_status"]
            powell.add(bool(layer.powell_damped))
            assert bool(layer.powell_damped) == r["powell"]
    assert positions != 6 or True in powell
    assert step._cache_size() == 1


@pytest.mark.parametrize("memory", [1, 3, 50])
def test_kbfgs_l_against_the_reference(memory):
    loss_fn, params, *_ = problem()
    tx = kfqn.kbfgs_l(LR, DAMPING, memory_size=memory)
    state, step = tx.init(params), step_of(tx, loss_fn)
    theirs = reference.Mlp(
        matrices(params), ["relu", "linear"], "half_mse", LR, DAMPING, weight_decay=0,
        output_memory=memory,
    )  # fmt: skip
    for x, t in batches_for(params, count=10):
        params, state, _ = step(params, state, x, t)
        records = theirs.step(np.asarray(x), np.asarray(t))
        for path, r, W in zip(sorted(layers_of(state)), records, matrices(params), strict=True):
            layer = layers_of(state)[path]
            assert relative(W, r["W"]) < 1e-9
            assert relative(dense(layer.output), r["H_g"]) < 1e-9
            assert relative(layer.input, r["H_a"]) < 1e-9
            assert int(layer.output_status) == r["H_g_status"]


@functools.cache
def step_with_damping(memory):
    """The step of kbfgs_l, or of kbfgs, with the damping as an argument."""
    loss_fn, *_ = problem()

    def step(damping, *args):
        whole = memory is None
        tx = kfqn.kbfgs(LR, damping) if whole else kfqn.kbfgs_l(LR, damping, memory_size=memory)
        return step_of(tx, loss_fn)(*args)

    return jax.jit(step)


@settings(deadline=None, max_examples=6)
@given(memory=st.sampled_from([2, 7]), seed=st.integers(0, 100), damping=st.floats(0.01, 0.9))
def test_kbfgs_l_is_kbfgs_until_the_memory_is_full(memory, seed, damping):
    _, params, *_ = problem(seed=seed)
    states = [kfqn.kbfgs(LR).init(params), kfqn.kbfgs_l(LR, memory_size=memory).init(params)]
    both = [params, params]
    for k, batch in enumerate(batches_for(params, count=memory + 3, seed=seed)):
        for i, size in enumerate((None, memory)):
            both[i], states[i], _ = step_with_damping(size)(damping, both[i], states[i], *batch)
        layers = [layers_of(state) for state in states]
        for path in layers[0]:
            ours, theirs = layers[1][path], layers[0][path]
            assert int(ours.output.count) <= min(k + 1, memory)
            if k < memory:
                assert relative(dense(ours.output), theirs.output) < 1e-9
                for name in set(CURVATURE) - {"output"}:
                    close(getattr(ours, name), getattr(theirs, name), rtol=1e-8)
    difference = [
        relative(dense(layers[1][path].output), layers[0][path].output) for path in layers[0]
    ]
    full = all(int(layers[1][path].output.count) == memory for path in layers[0])
    assert not full or max(difference) > 1e-12  # the memory was too small in the end


def test_state_sizes():
    """(d_in + 1)^2 for each of A and H_a, d_out^2, and O(d): KF-QN keeps no A, K-BFGS(L) pairs."""
    _, params, *_ = problem(widths=(400, 300), d_in=5)
    d_in, d_out, memory = [6, 401], [400, 300], 7
    squares, wide = sum(d * d for d in d_in), sum(d * d for d in d_out)
    kept = 2 * sum(d_out) + 2 * (6 + len(layer_state.COLUMNS))  # s, y; six scalars and the counts
    pairs = sum(2 * memory * d + memory + memory**2 + 1 for d in d_out)
    for name, tx, expected in (
        ("kbfgs", kfqn.kbfgs(LR), 2 * squares + wide),
        ("kbfgs_l", kfqn.kbfgs_l(LR, memory_size=memory), 2 * squares + pairs),
        ("kfqn", kfqn.kfqn(LR), squares + wide),
    ):
        size = sum(leaf.size for leaf in jax.tree.leaves(optax.tree.get(tx.init(params), "layers")))
        assert size == expected + kept, name
        momentum = sum(leaf.size for leaf in jax.tree.leaves(params))
        whole = sum(leaf.size for leaf in jax.tree.leaves(tx.init(params)))
        assert whole <= size + momentum + 8
        print(f"{name}: {size} numbers for layers {d_in} to {d_out}")


@pytest.mark.parametrize("method", [kfqn.scale_by_kbfgs, kfqn.scale_by_kbfgs_l, kfqn.scale_by_kfqn])
def test_a_side_above_max_factor_dim_keeps_pairs(method):
    """The other side stays as it is; the large side's second moment is never formed."""
    loss_fn, params, x, targets = problem(widths=(9, 3), d_in=20)
    tx = method(LR, max_factor_dim=10)
    state = tx.init(params)
    first, second = state.layers["params/Dense_0"], state.layers["params/Dense_1"]
    assert inverse.words(first.input) == "100 pairs of 21"
    assert first.input_moment is None
    assert inverse.words(second.input) == "10^2"
    moments = []

    def spy(params, *, moments, vectors=None, _fn=None):
        seen.append((sorted(moments), sorted(vectors or ())))
        return kfqn.curvature_fn(loss_fn, params, x, targets)(
            params, moments=moments, vectors=vectors
        )

    seen = moments
    grads = jax.grad(loss_fn)(params, x, targets)
    update = jax.jit(lambda *args: tx.update(*args, curvature_fn=spy))
    _, state = update(grads, state, params)
    assert all("params/Dense_0" not in asked for asked, _ in seen)
    assert any("params/Dense_0" in vectors for _, vectors in seen)
    assert int(state.layers["params/Dense_0"].input.count) == 1


@pytest.mark.parametrize("method", [kfqn.kbfgs, kfqn.kbfgs_l, kfqn.kfqn])
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.float64, marks=SLOW)])
def test_all_methods_train_and_keep_their_dtypes(method, dtype):
    loss_fn, params, x, targets = problem(dtype=dtype)
    tx = method(0.1)
    state = tx.init(params)
    step = step_of(tx, loss_fn)
    before, kinds = loss_fn(params, x, targets), jax.tree.map(lambda v: v.dtype, state)
    for _ in range(30):
        params, state, _ = step(params, state, x, targets)
    assert jax.tree.map(lambda v: v.dtype, state) == kinds
    assert float(loss_fn(params, x, targets)) < 0.5 * float(before)
    assert step._cache_size() == 1


@pytest.mark.parametrize("method", [kfqn.kbfgs, kfqn.kbfgs_l, kfqn.kfqn])
def test_warm_start_then_a_step_without_curvature(method):
    """The input factor is made from the warm start's A even where nothing is measured."""
    loss_fn, params, x, targets = problem()
    tx = method(LR, DAMPING)
    state = kfqn.warm_start(tx.init(params), loss_fn, params, [(x, targets)])
    grads = jax.grad(loss_fn)(params, x, targets)
    A = kfqn.curvature_fn(loss_fn, params, x, targets)(params).layers["params/Dense_0"].input_moment
    expected = np.linalg.inv(A + np.sqrt(DAMPING) * np.eye(6))
    update = jax.jit(functools.partial(tx.update, curvature_fn=None))
    _, state = update(grads, state, params)
    assert relative(layers_of(state)["params/Dense_0"].input, expected) < 1e-10
    _, again = update(grads, state, params)
    assert relative(layers_of(again)["params/Dense_0"].input, expected) < 1e-10


@pytest.mark.parametrize(
    ("make", "static"),
    [
        pytest.param(kfqn.kbfgs, (), marks=SLOW),  # in test_transform too
        (kfqn.kbfgs_l, "memory_size"),
        pytest.param(kfqn.kfqn, (), marks=SLOW),
    ],
)
def test_inject_hyperparams(make, static):
    loss_fn, params, x, targets = problem()
    plain, injected = make(LR), optax.inject_hyperparams(make, static)(learning_rate=LR)
    states = [jax.jit(tx.init)(params) for tx in (plain, injected)]
    updates = []
    for tx, state in zip((plain, injected), states, strict=True):
        _, _, made = step_of(tx, loss_fn)(params, state, x, targets)
        updates.append(made)
    close(*updates, rtol=1e-10)


@pytest.mark.parametrize(
    "name", ["kbfgs", "kbfgs_l", "kfqn", "block_kbfgs", "kfac", "tkfac", "mbf"]
)
def test_no_two_arrays_of_a_new_state_are_one(name):
    """XLA refuses to take the same buffer twice from a caller who gives the state away."""
    leaves = jax.tree.leaves(getattr(kfqn, name)(0.1, 0.1).init(problem()[1]))
    addresses = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(addresses)) == len(addresses)


def test_a_traced_memory_size_is_refused_in_words():
    _, params, *_ = problem()

    @jax.jit
    def init(memory_size):
        return kfqn.kbfgs_l(LR, memory_size=memory_size).init(params)

    with pytest.raises(TypeError, match="memory_size decides the shapes.*static_args"):
        init(5)


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_sizes_out_of_range(size):
    with pytest.raises(ValueError, match="memory_size must be a whole number of at least 1"):
        kfqn.kbfgs_l(LR, memory_size=size)
    with pytest.raises(ValueError, match="max_factor_dim must be a whole number of at least 1"):
        kfqn.kbfgs(LR, max_factor_dim=size)
    with pytest.raises(ValueError, match="input_memory must be a whole number of at least 1"):
        kfqn.kfqn(LR, input_memory=size)


def test_an_unknown_split():
    with pytest.raises(ValueError, match="split must be one of sqrt, sqrt_t, got 'half'"):
        kfqn.kfqn(LR, split="half")
