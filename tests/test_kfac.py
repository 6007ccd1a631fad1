"""K-FAC and TKFAC against the authors' recordings and against explicit matrices."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import Mlp, loss_of, problem, relative
from nets import NET, batch_of, embedding_layer, net_loss, rows_of
from steps import close, equal, matrices, random_like, types

import kfqn_optax as kfqn
from kfqn_optax.layers import named_leaves, to_matrix
from kfqn_optax.moments import MomentState

# --- the authors' own run -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replayed(golden):
    """The recording, and our free run beside it: state before and after, updates and params."""
    z = golden("kfac_mse")
    meta = json.loads(str(z["meta"]))
    model = Mlp(meta["sizes"][1:], meta["activations"])
    loss_fn = loss_of(model, meta["loss"])
    params = {
        "params": {
            f"Dense_{i}": {
                "kernel": jnp.asarray(z[f"init/layer{i}/W"].T),
                "bias": jnp.asarray(z[f"init/layer{i}/b"]),
            }
            for i in range(len(meta["sizes"]) - 1)
        }
    }
    tx = kfqn.kfac(
        meta["lr"],
        meta["damping_lambda"],
        momentum=meta["momentum"],
        weight_decay=meta["weight_decay"],
        factor_decay=meta["factor_decay"],
        inverse_every=meta["inverse_every"],
    )
    state = tx.init(params)
    batches = [
        (jnp.asarray(x), jnp.asarray(t))
        for x, t in zip(z["train/X"], z["train/T_sampled"], strict=True)
    ]
    start = state = kfqn.warm_start(state, loss_fn, params, batches)

    @jax.jit
    def step(params, state, x, t, drawn):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, t)
        updates, state = tx.update(
            grads, state, params, curvature_fn=kfqn.curvature_fn(loss_fn, params, x, drawn)
        )
        return optax.apply_updates(params, updates), state, updates, loss

    run = []
    for k in range(meta["steps"]):
        batch = [jnp.asarray(z[f"step{k:03d}/{name}"]) for name in ("X", "T", "T_sampled")]
        params, state, updates, loss = step(params, state, *batch)
        run.append((state, updates, params, loss))
    assert step._cache_size() == 1
    return z, meta, start, run


def test_every_recorded_array_in_float64(replayed):
    z, meta, start, run = replayed
    for i, layer in enumerate(optax.tree.get(start, "layers").values()):
        assert relative(layer.input_moment, z[f"init/layer{i}/A"]) < 1e-9
        assert relative(layer.output_moment, z[f"init/layer{i}/G"]) < 1e-9
    for k, (state, updates, params, loss) in enumerate(run):
        assert relative(loss, z[f"step{k:03d}/loss"]) < 1e-9
        momentum = matrices(optax.tree.get(state, "momentum"))
        for i, layer in enumerate(optax.tree.get(state, "layers").values()):
            prefix = f"step{k:03d}/layer{i}/"

            def both(name, prefix=prefix):
                weight, bias = z[prefix + name.format("W")], z[prefix + name.format("b")]
                return np.hstack([weight, bias[:, None]])

            pairs = {
                "A": (layer.input_moment, z[prefix + "A"]),
                "G": (layer.output_moment, z[prefix + "G"]),
                "A_inv": (layer.input, z[prefix + "A_inv"]),
                "G_inv": (layer.output, z[prefix + "G_inv"]),
                "momentum": (momentum[i], both("momentum_{}")),
                "direction": (matrices(updates)[i] / meta["lr"], both("direction_{}")),
                "weights": (matrices(params)[i], both("{}_after")),
            }
            for name, (ours, theirs) in pairs.items():
                assert relative(ours, theirs) < 1e-9, (prefix, name)


# --- explicit matrices ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def net():
    params = NET.init(jax.random.key(0), batch_of(0)[0])
    return params, kfqn.find_layers(net_loss, params, *batch_of(0))


def kfac_moments(a, g):
    """A, a mean over examples of a sum over positions, and G, a mean over both."""
    examples, positions, _ = a.shape
    return (
        np.einsum("nti,ntj->ij", a, a) / examples,
        np.einsum("nti,ntj->ij", g, g) / (examples * positions),
    )


def tkfac_moments(a, g):
    """The numerators delta Phi and delta Psi, row by row."""
    Phi, Psi = np.zeros((a.shape[-1],) * 2), np.zeros((g.shape[-1],) * 2)
    for of_a, of_g in zip(a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1]), strict=True):
        Phi += (of_g @ of_g) * np.outer(of_a, of_a) / len(a)
        Psi += (of_a @ of_a) * np.outer(of_g, of_g) / len(a)
    return Phi, Psi


def damped_inverses(method, first, second, damping):
    """The two matrices that M is multiplied with, and the factor in front."""
    eye = lambda matrix: np.eye(len(matrix))  # noqa: E731
    if method == "tkfac":
        delta = np.trace(first)
        e = np.sqrt(damping / delta)
        first, second = first / delta + e * eye(first), second / delta + e * eye(second)
        return np.linalg.inv(first), np.linalg.inv(second), 1 / delta
    pi = 1
    if method == "kfac by trace":
        pi = np.sqrt(np.trace(first) / len(first) / (np.trace(second) / len(second)))
    root = np.sqrt(damping)
    first, second = first + pi * root * eye(first), second + root / pi * eye(second)
    return np.linalg.inv(first), np.linalg.inv(second), 1


METHODS = {
    "kfac": (kfqn.scale_by_kfac, {}, kfac_moments),
    "kfac by trace": (kfqn.scale_by_kfac, {"split": "trace"}, kfac_moments),
    "tkfac": (kfqn.scale_by_tkfac, {}, tkfac_moments),
}
EVERY, STEPS = 2, 6


@pytest.fixture(scope="module", params=METHODS)
def walk(request, net):
    """Six steps at fixed parameters, on other batches: the states, the updates, the rows."""
    params, layers = net
    make, options, moments = METHODS[request.param]
    tx = make(0.1, 0.2, factor_decay=0.7, inverse_every=EVERY, layers=layers, **options)

    @jax.jit
    def step(state, gradient, x, targets):
        return tx.update(
            gradient, state, params, curvature_fn=kfqn.curvature_fn(net_loss, params, x, targets)
        )

    gradient = random_like(params, seed=5)
    state, run = tx.init(params), []
    for k in range(STEPS):
        before = types(state)
        updates, state = step(state, gradient, *batch_of(k))
        assert types(state) == before
        run.append((state, updates))
    assert step._cache_size() == 1
    return request.param, moments, layers, gradient, run, params


def blocks(array):
    """The matrices of an array with or without an axis of blocks."""
    array = np.asarray(array)
    return array if array.ndim == 3 else array[None]


def test_against_explicit_matrices(walk):
    """Running averages, inverses in steps 0, 1, 2, 4, ..., and the direction."""
    method, moments, layers, gradient, run, params = walk
    held, inverses = {}, {}
    for k, (state, updates) in enumerate(run):
        rows = rows_of(params, *batch_of(k))
        for layer in layers:
            path = layer.path
            ours = state.layers[path]
            M = blocks(to_matrix(layer, named_leaves(gradient)))
            P = blocks(to_matrix(layer, named_leaves(updates)))
            for b, (a, g) in enumerate(rows[path]):
                new = moments(a, g)
                old = held.get((path, b), new)
                held[path, b] = [0.7 * o + 0.3 * n for o, n in zip(old, new, strict=True)]
                if k <= EVERY or k % EVERY == 0:
                    inverses[path, b] = damped_inverses(method, *held[path, b], 0.2)
                first, second, front = inverses[path, b]
                assert relative(blocks(ours.input_moment)[b], held[path, b][0]) < 1e-12
                assert relative(blocks(ours.output_moment)[b], held[path, b][1]) < 1e-12
                assert relative(P[b], front * first @ M[b] @ second) < 1e-11, (path, k)
            if method == "tkfac":
                np.testing.assert_allclose(
                    np.trace(blocks(ours.input_moment), axis1=1, axis2=2),
                    np.trace(blocks(ours.output_moment), axis1=1, axis2=2),
                )


def test_kfac_inverts_the_counts_of_an_embedding():
    loss_fn, params, tokens, layers = embedding_layer()
    tx = kfqn.scale_by_kfac(0.1, 0.04, layers=layers)
    gradient = random_like(params)

    @jax.jit
    def update(state):
        fn = kfqn.curvature_fn(loss_fn, params, tokens)
        return tx.update(gradient, state, params, curvature_fn=fn)

    updates, _ = update(tx.init(params))
    table = np.asarray(params["params"]["embedding"])
    g = 2 * table[np.asarray(tokens).ravel()]
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=6) / 3
    G = g.T @ g / 6
    M = np.asarray(gradient["params"]["embedding"])
    expected = M / (counts + 0.2)[:, None] @ np.linalg.inv(G + 0.2 * np.eye(3))
    assert relative(updates["params"]["embedding"], expected) < 1e-12


def test_an_embedding_is_refused_by_name():
    _, params, _, layers = embedding_layer()
    for make in (kfqn.scale_by_tkfac, kfqn.scale_by_mbf, kfqn.scale_by_block_kbfgs):
        with pytest.raises(ValueError, match="layer 'params' is an embedding.*layers="):
            make(0.1, layers=layers).init(params)


def test_long_sides_are_refused_by_name(small):
    params = small[1]
    for tx in (
        kfqn.scale_by_kfac(0.1, max_factor_dim=5),
        kfqn.scale_by_tkfac(0.1, max_factor_dim=5),
        kfqn.scale_by_mbf(0.1, max_factor_dim=3),
    ):
        with pytest.raises(
            ValueError, match="'params/Dense_0' has a.* side of length [46].*is [35]"
        ):
            tx.init(params)


def test_arguments_and_a_curvature_fn_that_measures_too_little(small):
    with pytest.raises(ValueError, match="split must be one of sqrt, trace, got 'half'"):
        kfqn.kfac(0.1, split="half")
    with pytest.raises(ValueError, match="inverse_every must be a whole number"):
        kfqn.tkfac(0.1, inverse_every=0)
    with pytest.raises(ValueError, match="damping must be above 0"):
        kfqn.mbf(0.1, damping=0)
    update_of, params, batch, gradient = small
    tx = kfqn.scale_by_kfac(0.1)
    with pytest.raises(TypeError, match="curvature_fn, which K-FAC needs for 'params/Dense_0'"):
        tx.update(gradient, tx.init(params), params)
    measured = jax.eval_shape(lambda: kfqn.curvature_fn(problem()[0], params, *batch)(params))
    with pytest.raises(ValueError, match="did not measure .* layer 'params/Dense_0' that K-FAC"):
        tx.update(gradient, tx.init(params), params, curvature_fn=lambda p, **_: measured)
    mbf = kfqn.scale_by_mbf(0.1)
    other = {"params": {"Dense_0": params["params"]["Dense_0"]}}
    with pytest.raises(ValueError, match="state of MBF was made for other parameters"):
        mbf.update(gradient, mbf.init(other))


# --- around a step --------------------------------------------------------------------------------


def test_warm_start_of_tkfac(net):
    params, layers = net
    tx = kfqn.tkfac(0.1, 0.2, factor_decay=0.7, layers=layers)
    batches = [batch_of(0, examples=2), batch_of(1, examples=2)]
    state = kfqn.warm_start(tx.init(params), net_loss, params, batches)
    total = [np.concatenate(both) for both in zip(*batches, strict=True)]
    warm = {path: [tkfac_moments(a, g) for a, g in of_layer] for path, of_layer in
            rows_of(params, *map(jnp.asarray, total)).items()}  # fmt: skip
    layers_of = optax.tree.get(state, "layers")
    for path, expected in warm.items():
        for b, (Phi, Psi) in enumerate(expected):
            assert relative(blocks(layers_of[path].input_moment)[b], Phi) < 1e-12
            assert relative(blocks(layers_of[path].output_moment)[b], Psi) < 1e-12
    # The inverses are made of it at once, also in a step without a batch.
    _, after = jax.jit(functools.partial(tx.update, curvature_fn=None))(params, state, params)
    first, second, front = damped_inverses("tkfac", *warm["params/out"][0], 0.2)
    of_out = optax.tree.get(after, "layers")["params/out"]
    product = np.kron(of_out.input, of_out.output)
    assert relative(product, front * np.kron(first, second)) < 1e-11


@pytest.fixture(scope="module")
def small():
    """A function from a transformation to its jitted update, and parameters, batch, gradient."""
    loss_fn, params, *batch = problem()

    def update_of(tx):
        return jax.jit(
            lambda gradient, state, *batch: tx.update(
                gradient,
                state,
                params,
                curvature_fn=kfqn.curvature_fn(loss_fn, params, *batch) if batch else None,
            )
        )

    return update_of, params, batch, random_like(params)


def test_when_the_moments_stay_as_they_are(small):
    """Without a batch, and with one that is not finite or too large; the identity stays too."""
    update_of, params, (x, targets), gradient = small
    tx = kfqn.scale_by_kfac(0.1, 0.2)
    update, start = update_of(tx), tx.init(params)
    updates, idle = update(gradient, start)
    equal(updates, gradient)
    equal(idle.layers, start.layers)
    _, seen = update(gradient, idle, x, targets)
    _, idle = update(gradient, seen)
    equal(idle.layers, seen.layers)
    for value in (jnp.inf, 1e80):  # the moment is 1e160, its square is not finite
        _, after = update(gradient, seen, x.at[0, 0].set(value), targets)
        equal(after.layers["params/Dense_0"], seen.layers["params/Dense_0"])
    _, after = update(gradient, seen, x, targets.at[0, 0].set(1e80))
    equal(after.layers["params/Dense_1"], seen.layers["params/Dense_1"])


@pytest.mark.parametrize("method", ["kfac", "mbf"])
def test_a_schedule_of_damping_that_fails(small, method):
    """What is known of a layer stays as it is; what has not started starts in the next step."""
    update_of, params, batch, gradient = small
    bad = [jnp.nan, jnp.inf, -1.0, 0.0, jnp.nan]
    values = jnp.asarray([*bad, 0.2, *bad, 0.3, 0.4])
    make = {"kfac": lambda *a, **k: kfqn.scale_by_kfac(0.1, *a, **k), "mbf": kfqn.scale_by_mbf}
    tx = make[method](lambda count: values[count], inverse_every=2)
    update, state = update_of(tx), tx.init(params)
    fields = MomentState._fields if method == "kfac" else ("inverse", "moment")

    def known(state):
        return {path: [getattr(x, name) for name in fields] for path, x in state.layers.items()}

    for step, damping in enumerate(values):
        before = state
        G = jax.tree.map(lambda leaf, times=step + 1: times * leaf, gradient)
        updates, state = update(G, before, *batch)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))
        if not 0 < damping < 1:
            equal(known(state), known(before))
            continue
        both = zip(*(jax.tree.leaves(known(s)) for s in (before, state)), strict=True)
        assert any(np.any(old != new) for old, new in both)
        if step == len(bad):  # the same as without the steps before it
            fresh = tx.init(params)._replace(count=before.count)
            equal(known(state), known(update(G, fresh, *batch)[1]))
    if method == "kfac":
        warm = kfqn.warm_start(tx.init(params), problem()[0], params, [tuple(batch)])
        for given in (batch, ()):
            equal(update(gradient, warm, *given)[1].layers, warm.layers)


def test_norm_constraint_and_schedules(small):
    """P is scaled down until alpha^2 <P, H^-1 P> is the limit; numbers may be schedules."""
    update_of, params, batch, gradient = small
    tx = kfqn.scale_by_kfac(0.5, 0.2)
    free, _ = update_of(tx)(gradient, tx.init(params), *batch)
    tx = kfqn.scale_by_kfac(lambda count: 0.5, lambda count: 0.2, norm_constraint=1e-3)
    limited, _ = update_of(tx)(gradient, tx.init(params), *batch)
    squared = 0.25 * optax.tree.vdot(gradient, free)
    assert squared > 1e-3
    close(limited, jax.tree.map(lambda p: np.sqrt(1e-3 / squared) * p, free), rtol=1e-9)


def test_the_summary_names_the_method_and_its_blocks(net):
    params, layers = net
    for tx, name, factors in (
        (kfqn.kfac(0.1, layers=layers), "K-FAC", "13^2 and 4^2"),
        (kfqn.tkfac(0.1, layers=layers), "TKFAC", "13^2 and 4^2"),
        (kfqn.mbf(0.1, 0.1, layers=layers), "MBF", "8 of 6^2"),
    ):
        lines = kfqn.summary(tx.init(params), params).splitlines()
        (line,) = (line for line in lines if line.startswith("params/conv/kernel"))
        assert f"{name} " in line
        assert f" {factors} " in line
        (bias,) = (line for line in lines if line.startswith("params/conv/bias"))
        assert ("fallback" in bias) == (name == "MBF")
