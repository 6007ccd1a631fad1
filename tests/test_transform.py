"""`kbfgs` and `scale_by_kbfgs` as a whole: the paper's step, and good manners towards Optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import linen as nn
from models import Mlp, loss_of, problem, relative

import kfqn_optax as kfqn
from kfqn_optax import pairs
from kfqn_optax.layers import named_leaves

D0, D1 = "params/Dense_0", "params/Dense_1"
CURVATURE = ("input", "output", "input_moment", "s", "y")


def step_of(tx, loss_fn, **jit_options):
    """A jitted train step: params, state, updates."""

    def step(params, state, *batch):
        grads = jax.grad(loss_fn)(params, *batch)
        fn = kfqn.curvature_fn(loss_fn, params, *batch)
        updates, state = tx.update(grads, state, params, curvature_fn=fn)
        return optax.apply_updates(params, updates), state, updates

    return jax.jit(step, **jit_options)


def batches_for(params, batch=8, count=6, seed=1):
    """Batches of inputs and targets in [0, 1] for an `Mlp` of `problem`."""
    leaves = list(named_leaves(params).values())
    d_in, d_out, dtype = leaves[1].shape[0], leaves[-1].shape[-1], leaves[1].dtype
    rng = np.random.default_rng(seed)
    for _ in range(count):
        x, t = rng.normal(size=(batch, d_in)), rng.uniform(size=(batch, d_out))
        yield jnp.asarray(x, dtype), jnp.asarray(t, dtype)


def layers_of(state):
    return optax.tree.get(state, "layers")


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, rtol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * 1e-3), a, b)


def types(tree):
    return jax.tree.map(lambda v: (v.shape, v.dtype), tree)


# --- the paper's step -----------------------------------------------------------------------------


def matrices(tree):
    """Each layer as the paper has it: [d_out, d_in + 1]."""
    layers = tree["params"]
    return [
        np.hstack([np.asarray(layers[n]["kernel"]).T, np.asarray(layers[n]["bias"])[:, None]])
        for n in sorted(layers)
    ]


@pytest.mark.parametrize(
    ("damping", "batch", "rate", "branches"),  # which of the two dampings act, together
    [
        (0.01, 8, 1.8, {(False, False), (True, False), (False, True), (True, True)}),
        (4.0, 8, 0.6, {(False, True), (True, True)}),
        (1.0, 1, 0.6, {(False, True)}),
    ],
)
def test_the_whole_optimizer_is_the_reference(damping, batch, rate, branches):
    """Without a warm start, with weight decay, another momentum, and a learning rate that moves."""
    _, params, *_ = problem([6, 4, 3])
    loss_fn, rates = loss_of(Mlp([6, 4, 3]), "bce"), np.linspace(rate, rate / 12, 18)
    tx = kfqn.kbfgs(lambda count: jnp.asarray(rates)[count], optax.constant_schedule(damping),
                    momentum=0.8, weight_decay=0.03)  # fmt: skip
    state, step = tx.init(params), step_of(tx, loss_fn)
    activations = ["relu", "relu", "linear"]
    expected = reference.Mlp(matrices(params), activations, "bce", 0, damping, 0.03, 0.8)
    seen = set()
    for k, (x, t) in enumerate(batches_for(params, batch, 18)):
        expected.lr = rates[k]
        records = expected.step(np.array(x), np.array(t))
        params, state, updates = step(params, state, x, t)
        for i, (W, P, record) in enumerate(
            zip(matrices(params), matrices(updates), records, strict=True)
        ):
            layer = layers_of(state)[f"params/Dense_{i}"]
            ours = {
                "W": W, "H_a": layer.input, "H_g": layer.output, "A": layer.input_moment,
                "s": layer.s, "y": layer.y, "direction": P / expected.lr,
            }  # fmt: skip
            for name, value in ours.items():
                assert relative(value, record[name]) < 1e-9, (k, i, name)
            assert int(layer.input_status) == record["H_a_status"]
            assert int(layer.output_status) == record["H_g_status"]
            assert bool(layer.powell_damped) == record["powell"]
            assert bool(layer.second_damped) == record["second"]
            seen |= {(record["powell"], record["second"])}
    assert seen >= branches
    assert step._cache_size() == 1


def test_one_step_of_a_layer_without_bias_by_hand():
    loss_fn, params, x, targets = problem([3], bias=False)
    tx = kfqn.kbfgs(0.5, 0.09, momentum=0.6)
    _, state, updates = step_of(tx, loss_fn)(params, tx.init(params), x, targets)
    K, a, mu = params["params"]["Dense_0"]["kernel"], x.mean(axis=0), 0.3
    A = x.T @ x / 8
    H = np.linalg.inv(A + mu * np.eye(5))
    step = -0.5 * H @ (0.4 * x.T @ (x @ K - targets) / 8)
    assert relative(updates["params"]["Dense_0"]["kernel"], step) < 1e-12
    layer, s = layers_of(state)[D0], 0.1 * step.T @ a  # the loss is quadratic: y = s
    assert relative(layer.s, s) < 1e-12
    assert relative(layer.y, s) < 1e-12
    output, _ = reference.bfgs(np.eye(3), s, s, (x @ K - targets).mean(axis=0))
    input_, _ = reference.bfgs(H, H @ a, (A + mu * np.eye(5)) @ H @ a, a)
    assert relative(layer.output, output) < 1e-12
    assert relative(layer.input, input_) < 1e-12


# --- types and compilations -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_types_stay_and_one_program_serves_all_steps(dtype):
    loss_fn, params, *_ = problem(dtype=dtype)
    tx = kfqn.kbfgs(0.1, weight_decay=0.01)
    first, step, batches = tx.init(params), step_of(tx, loss_fn), list(batches_for(params))
    kept = jnp.float64 if dtype == jnp.float64 else jnp.float32
    for layer in layers_of(first).values():
        assert {getattr(layer, name).dtype for name in CURVATURE} == {jnp.dtype(kept)}
    after, state = params, first
    for batch in batches:
        after, state, updates = step(after, state, *batch)
        assert types(state) == types(first)
        assert types(updates) == types(params)
    assert step._cache_size() == 1

    def body(carry, batch):
        (params, state), (x, t, measure) = carry, batch
        fn, grads = kfqn.curvature_fn(loss_fn, params, x, t), jax.grad(loss_fn)(params, x, t)
        updates, state = jax.lax.cond(
            measure,
            lambda: tx.update(grads, state, params, curvature_fn=fn),
            lambda: tx.update(grads, state, params, curvature_fn=None),
        )
        return (optax.apply_updates(params, updates), state), None

    xs = (*map(jnp.stack, zip(*batches, strict=True)), jnp.ones(len(batches), bool))
    scan = jax.jit(lambda *carry: jax.lax.scan(body, carry, xs)[0])
    assert types(jax.eval_shape(scan, params, first)) == types((params, first))
    if dtype == jnp.float64:
        close(scan(params, first), (after, state), rtol=1e-9)


@pytest.mark.parametrize(
    "numbers",
    [
        {"learning_rate": 0.2, "damping": 0.1},
        {
            "learning_rate": optax.linear_schedule(0.3, 0.1, 5),
            "damping": optax.linear_schedule(0.1, 0.5, 5),
        },
    ],
    ids=["floats", "schedules"],
)
def test_inject_hyperparams_is_the_plain_optimizer(numbers):
    loss_fn, params, *_ = problem()
    plain, injected = kfqn.kbfgs(**numbers), optax.inject_hyperparams(kfqn.kbfgs)(**numbers)
    results = []
    for tx in (plain, injected):
        after, state, step = params, tx.init(params), step_of(tx, loss_fn)
        for batch in batches_for(params):
            after, state, _ = step(after, state, *batch)
        assert step._cache_size() == 1
        results.append((after, layers_of(state)))
    close(*results, rtol=1e-5)
    expected = numbers["learning_rate"]
    expected = expected(5) if callable(expected) else expected
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(float(expected), rel=1e-6)


def test_the_state_may_be_donated():
    loss_fn, params, *_ = problem()
    tx = kfqn.kbfgs(0.1)
    batches = list(batches_for(params))
    plain, donating = step_of(tx, loss_fn), step_of(tx, loss_fn, donate_argnums=(0, 1))
    for start in (tx.init(params), kfqn.warm_start(tx.init(params), loss_fn, params, batches)):
        kept = jax.tree.map(jnp.copy, (params, start))
        given = (jax.tree.map(jnp.copy, params), start)
        for batch in batches[:3]:
            pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(given)]
            assert len(set(pointers)) == len(pointers)
            kept, given = plain(*kept, *batch)[:2], donating(*given, *batch)[:2]
        equal(kept, given)
        assert jax.tree.leaves(start)[0].is_deleted()


def test_curvature_fn_may_be_an_argument_of_a_jitted_function():
    loss_fn, params, *_ = problem([3])
    tx = kfqn.kbfgs(0.1)
    state, moments = tx.init(params), []

    @jax.jit
    def update(grads, state, params, fn):
        return tx.update(grads, state, params, curvature_fn=fn)

    for batch in batches_for(params, count=2):
        fn = kfqn.curvature_fn(loss_fn, params, *batch)
        _, state = update(jax.grad(loss_fn)(params, *batch), state, params, fn)
        moments.append(fn(params).layers[D0].input_moment)
    close(layers_of(state)[D0].input_moment, 0.9 * moments[0] + 0.1 * moments[1], rtol=1e-12)
    assert update._cache_size() == 1


# --- who updates what -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """A transformation, its loss, and where four steps lead."""
    loss_fn, params, *_ = problem()
    tx = kfqn.kbfgs(0.1, 0.05)
    state, step = tx.init(params), step_of(tx, loss_fn)
    for batch in batches_for(params, count=4):
        params, state, _ = step(params, state, *batch)
    return tx, loss_fn, params, state


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), tree)


def test_without_curvature_the_factors_stay_and_precondition(trained):
    """And extra arguments that mean nothing to us are ignored."""
    tx, _, params, state = trained
    grads, old = random_like(params), optax.tree.get(state, "momentum")
    extra = {"curvature_fn": None, "value": 1.0, "anything": "else"}
    updates, after = jax.jit(lambda g, s: tx.update(g, s, params, **extra))(grads, state)
    equal(layers_of(after), layers_of(state))
    momentum = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, old, grads)
    for i, (M, P) in enumerate(zip(matrices(momentum), matrices(updates), strict=True)):
        layer = layers_of(state)[f"params/Dense_{i}"]
        assert relative(P, -0.1 * layer.output @ M @ layer.input) < 1e-12


@pytest.mark.parametrize("lr", [0.1, optax.linear_schedule(0.1, 0.01, 3)], ids=["float", "sched"])
@pytest.mark.parametrize(
    "params", [jnp.ones((2, 3)), {"norm": {"scale": jnp.ones(3)}, "w": [jnp.ones((2, 2))]}]
)
def test_a_tree_without_layers_is_adams(params, lr):
    tx, adam = kfqn.kbfgs(lr, momentum=0.5, weight_decay=0.3), optax.adam(lr)
    state, adams = tx.init(params), adam.init(params)
    for k in range(3):
        grads = random_like(params, k)
        updates, state = tx.update(grads, state, params)
        expected, adams = adam.update(grads, adams, params)
        equal(updates, expected)


class ConvNet(nn.Module):
    """A convolution, a normalization, a dense layer."""

    @nn.compact
    def __call__(self, x):  # [batch, 6, 2]
        kinds = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        x = nn.relu(nn.Conv(3, (2,), **kinds)(x))
        return nn.Dense(2, **kinds)(nn.LayerNorm(**kinds)(x).mean(axis=1))


@pytest.mark.parametrize("fallback", [None, optax.sgd(0.5, momentum=0.8)], ids=["adam", "sgd"])
def test_what_is_no_layer_goes_to_the_fallback(fallback):
    """With a state of its own, and untouched by weight decay and momentum."""
    rng = np.random.default_rng(0)
    x, t = jnp.asarray(rng.normal(size=(8, 6, 2))), jnp.asarray(rng.normal(size=(8, 2)))
    params, loss_fn = ConvNet().init(jax.random.key(0), x), loss_of(ConvNet())
    layers = kfqn.find_layers(loss_fn, params, x, t)
    assert [layer.path for layer in layers] == [D0]
    tx = kfqn.kbfgs(0.1, momentum=0.7, weight_decay=0.3, layers=layers, fallback=fallback)
    other = optax.adam(0.1) if fallback is None else fallback
    state, others, step = tx.init(params), other.init(params), step_of(tx, loss_fn)
    named = {k: set(named_leaves(s)) for k, s in state.inner_states.items()}
    assert not any("Dense" in name for name in named["fallback"])
    assert not any("Conv" in name or "Norm" in name for name in named["kbfgs"])
    gradient = jax.jit(jax.grad(loss_fn))
    for _ in range(3):
        grads = gradient(params, x, t)
        expected, others = other.update(grads, others, params)
        params, state, updates = step(params, state, x, t)
        for name in ["Conv_0", "LayerNorm_0"]:
            close(updates["params"][name], expected["params"][name], rtol=1e-9)
        ratio = updates["params"]["Dense_0"]["kernel"] / expected["params"]["Dense_0"]["kernel"]
        assert np.ptp(ratio) > 1e-3  # the dense layer is not the fallback's


# --- among other transformations ------------------------------------------------------------------


def test_behind_a_clipped_gradient():
    """The chain hands the extra argument on; the probe follows the clipped step."""
    loss_fn, params, *_ = problem([3])
    batch = next(batches_for(params))
    tx, clip = kfqn.kbfgs(0.1), optax.clip_by_global_norm(0.05)
    chained = optax.chain(clip, tx)
    grads = jax.grad(loss_fn)(params, *batch)
    clipped, _ = clip.update(grads, clip.init(params))
    assert relative(*map(matrices, (clipped, grads))) > 0.1
    fn = kfqn.curvature_fn(loss_fn, params, *batch)
    update = jax.jit(lambda g, s: tx.update(g, s, params, curvature_fn=fn))
    expected, state = update(clipped, tx.init(params))
    _, chain_state, updates = step_of(chained, loss_fn)(params, chained.init(params), *batch)
    close((updates, layers_of(chain_state)), (expected, layers_of(state)), rtol=1e-9)


def test_holes_of_masked_and_partition_are_filled():
    """Our layer sees what it sees when the rest of the model is frozen."""
    loss_fn, full, *_ = problem()
    batches, mine = list(batches_for(full, count=3)), kfqn.kbfgs(0.1, weight_decay=0.1)

    def select(ours, other):
        choice = {"Dense_0": other, "Dense_1": ours}
        return {"params": {name: {"kernel": c, "bias": c} for name, c in choice.items()}}

    def run(tx, loss_fn, params):
        state, step = tx.init(params), step_of(tx, loss_fn)
        for batch in batches:
            after, state, updates = step(params, state, *batch)
            params = {"params": params["params"] | {"Dense_1": after["params"]["Dense_1"]}}
        return updates["params"]["Dense_1"], layers_of(state)

    def of_one_layer(params, *batch):
        return loss_fn({"params": full["params"] | params["params"]}, *batch)

    expected = run(mine, of_one_layer, {"params": {"Dense_1": full["params"]["Dense_1"]}})
    assert set(expected[1]) == {D1}
    partition = optax.partition({"a": mine, "b": optax.set_to_zero()}, select("a", "b"))
    for tx in (partition, optax.masked(mine, select(True, False))):
        close(run(tx, loss_fn, full), expected, rtol=1e-9)


def test_apply_if_finite_skips_a_bad_step_whole(trained):
    tx, loss_fn, params, inner = trained
    batch = next(batches_for(params))
    fn = kfqn.curvature_fn(loss_fn, params, *batch)
    safe = optax.apply_if_finite(tx, 2)
    state = safe.init(params)._replace(inner_state=inner)
    update = jax.jit(lambda g, s: safe.update(g, s, params, curvature_fn=fn))
    grads = jax.grad(loss_fn)(params, *batch)
    updates, after = update(jax.tree.map(lambda g: g * jnp.nan, grads), state)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    equal(after.inner_state, inner)
    updates, after = update(grads, after)
    assert all(np.any(u) for u in jax.tree.leaves(updates))
    assert int(optax.tree.get(after, "layers")[D1].output_status) == pairs.UPDATED


# --- the limit on the step ------------------------------------------------------------------------


def test_norm_constraint(trained):
    """The step's squared length in the metric of the factors is limited.

    It is lr^2 <H_a^-1 P H_g^-1, P>, without a limit lr^2 <M, P>. One factor shortens all layers;
    other leaves pass.
    """
    _, _, params, state = trained
    params = {**params, "scale": jnp.ones(2)}
    (held,) = [s for s in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(s)]
    M, lr = random_like(params), lambda count: 0.7 / (1 + count)

    def precondition(limit):
        tx = kfqn.scale_by_kbfgs(lr, norm_constraint=limit)
        return jax.jit(lambda M: tx.update(M, held, params, curvature_fn=None)[0])(M)

    def squared(P):
        lengths = [
            np.vdot(P, np.linalg.solve(held.layers[path].output, P) @ np.linalg.inv(
                held.layers[path].input))
            for path, P in zip((D0, D1), matrices(P), strict=True)
        ]  # fmt: skip
        return (0.7 / 5) ** 2 * sum(lengths)

    free = precondition(None)
    inner = sum(np.vdot(m, p) for m, p in zip(matrices(M), matrices(free), strict=True))
    assert squared(free) == pytest.approx((0.7 / 5) ** 2 * inner, rel=1e-9)
    for share in [1e-6, 0.3, 0.999]:
        P = precondition(share * squared(free))
        assert squared(P) == pytest.approx(share * squared(free), rel=1e-9)
        equal(P["scale"], M["scale"])
        for p, q in zip(matrices(P), matrices(free), strict=True):
            assert relative(p, q * share**0.5) < 1e-9
    for share in [1.001, 1e6]:
        equal(precondition(share * squared(free)), free)


def is_ours(node):
    return isinstance(node, kfqn.ScaleByKBFGSState)


def test_the_probe_follows_the_shortened_step():
    loss_fn, params, x, targets = problem([3])
    step_by = {}
    for limit in [None, 1e-4]:
        tx = kfqn.kbfgs(0.5, norm_constraint=limit)
        _, state, updates = step_of(tx, loss_fn)(params, tx.init(params), x, targets)
        a = np.append(x.mean(axis=0), 1)
        assert relative(layers_of(state)[D0].s, 0.1 * matrices(updates)[0] @ a) < 1e-12
        step_by[limit] = matrices(updates)[0]
    assert np.linalg.norm(step_by[1e-4]) < 0.5 * np.linalg.norm(step_by[None])


# --- guards ---------------------------------------------------------------------------------------


def test_nan_in_one_layer_stays_there(trained):
    """NaN statistics at one call, or NaN gradients: what is known is kept bit for bit."""
    tx, loss_fn, params, good = trained
    (batch,) = batches_for(params, count=1, seed=9)

    @jax.jit
    def step(state, poison, grads_poison):
        fn, calls = kfqn.curvature_fn(loss_fn, params, *batch), iter(range(2))

        def curvature(p):
            statistics, bad = fn(p), poison[next(calls)]
            layer = statistics.layers[D0]
            spoiled = layer._replace(**{n: getattr(layer, n) * bad for n in layer._fields[:3]})
            return statistics._replace(layers=statistics.layers | {D0: spoiled})

        grads = jax.tree.map(lambda g: g * grads_poison, jax.grad(loss_fn)(params, *batch))
        return layers_of(tx.update(grads, state, params, curvature_fn=curvature)[1])

    def same(a, b, *fields):
        for name in fields:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)

    before, nan = layers_of(good), jnp.nan
    plain = step(good, jnp.ones(2), 1.0)
    assert all(int(s.output_status) == pairs.UPDATED for s in plain.values())
    for poison in [[nan, 1], [nan, nan]]:
        after = step(good, jnp.array(poison), 1.0)
        same(after[D0], before[D0], *CURVATURE)
        assert int(after[D0].input_status) == int(after[D0].output_status) == pairs.NOT_FINITE
        equal(after[D1], plain[D1])
    after = step(good, jnp.array([1, nan]), 1.0)
    same(after[D0], before[D0], "output", "s", "y")
    same(after[D0], plain[D0], "input", "input_moment", "input_status")
    assert int(after[D0].output_status) == pairs.NOT_FINITE
    equal(after[D1], plain[D1])
    for path, layer in step(good, jnp.ones(2), nan).items():
        same(layer, before[path], "output", "s", "y")
        same(layer, plain[path], "input", "input_moment", "input_status")
        assert int(layer.output_status) == pairs.NOT_FINITE
    first = step(tx.init(params), jnp.array([nan, 1]), 1.0)[D0]
    same(first, layers_of(tx.init(params))[D0], *CURVATURE, "stage")


@pytest.mark.parametrize("batch", [8, 1])
def test_corners_keep_the_factors_positive_definite(batch):
    loss_fn, fresh, *_ = problem()
    dead = jax.tree.map(jnp.copy, fresh)
    dead["params"]["Dense_0"]["bias"] -= 100

    @jax.jit
    def step(params, state, x, t, lr, damping):
        return step_of(kfqn.kbfgs(lr, damping), loss_fn)(params, state, x, t)

    cases = {
        "plain": (fresh, 0.1, 0.1), "no step": (fresh, 0.0, 0.1), "dead": (dead, 0.1, 0.1),
        "lambda 1": (fresh, 0.1, 1.0), "lambda 4": (fresh, 0.1, 4.0),
    }  # fmt: skip
    for case, (params, lr, damping) in cases.items():
        state = kfqn.kbfgs(0.1).init(params)
        xt = next(batches_for(params, batch))
        start, statuses = float(loss_fn(params, *xt)), set()
        for _ in range(20):
            params, state, _ = step(params, state, *xt, lr, damping)
            statuses.add(int(layers_of(state)[D1].output_status))
        for layer in layers_of(state).values():
            for H in (layer.input, layer.output):
                assert relative(H, H.T) < 1e-12, case
                assert np.linalg.eigvalsh(H).min() > 1e-4, case
        if case == "no step":
            assert statuses == {pairs.NOT_POSITIVE}
            np.testing.assert_array_equal(layers_of(state)[D1].output, np.eye(3))
            assert float(loss_fn(params, *xt)) == start
        else:
            assert pairs.UPDATED in statuses
            assert float(loss_fn(params, *xt)) < 0.9 * start, case
        if case == "dead":
            np.testing.assert_array_equal(layers_of(state)[D0].output, np.eye(4))
            assert int(layers_of(state)[D0].output_status) == pairs.NOT_POSITIVE


# --- training -------------------------------------------------------------------------------------


def test_training_goes_where_gradient_descent_does_not():
    """A regression on inputs of very different sizes."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(64, 6)) * 10.0 ** np.linspace(0.5, -2, 6)
    t = np.tanh(x / x.std(axis=0)) @ rng.normal(size=(6, 2))
    x, t = jnp.asarray(x), jnp.asarray(t)
    model = Mlp([16, 2])
    loss_fn, start = loss_of(model), model.init(jax.random.key(0), x)
    losses = {}
    for name, tx in {"kbfgs": kfqn.kbfgs(0.1, 0.001), "sgd": optax.sgd(0.1)}.items():
        params, state = start, tx.init(start)
        tx = optax.with_extra_args_support(tx)
        step = step_of(tx, loss_fn)
        for _ in range(150):
            params, state, _ = step(params, state, x, t)
        losses[name] = float(loss_fn(params, x, t))
    assert losses["kbfgs"] < 0.4
    assert losses["sgd"] > 0.8
