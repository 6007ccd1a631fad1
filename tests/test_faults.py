"""One number that is no number, anywhere in a step: what is kept, what goes on, what is counted."""

import faults
import jax
import numpy as np
import optax
import pytest
from faults import HUGE, LAYERS, METHODS, fault, layers_of, program, trained, untroubled

import kfqn_optax as kfqn
from kfqn_optax import pairs
from kfqn_optax.layer_state import EMPTY, RUNNING

INPUT, OUTPUT = ("input", "input_moment", "input_status"), ("output", "s", "y", "output_status")
AT_FIRST, LATER = 0, 4
methods = pytest.mark.parametrize("method", METHODS)
layers = pytest.mark.parametrize("layer", LAYERS)
whens = pytest.mark.parametrize("steps", [AT_FIRST, LATER], ids=["first", "later"])


def run(method, steps, faulty):
    """States before the step, after it, after the same step without the fault; and the rest."""
    params, before = trained(method, steps)
    params, after, updates = program(method)(params, before, faulty)
    faults.assert_counted(before, after)
    return layers_of(before), layers_of(after), layers_of(untroubled(method, steps)[1]), (
        params, after, updates,
    )  # fmt: skip


def goes_on(method, params, state):
    """The next step, without a fault, teaches both sides of every layer."""
    params, state, _ = program(method)(params, state)
    assert faults.is_finite(params)
    faults.assert_sound(state)
    for path, layer in layers_of(state).items():
        assert int(layer.input_status) == int(layer.output_status) == pairs.UPDATED, path
        assert int(layer.stage) == RUNNING


def kept(layer, *fields):
    """What was there before is there, and the side says why."""
    before, after = layer
    faults.assert_same(before, after, *(field for field in fields if "status" not in field))
    for field in fields:
        if "status" in field:
            assert int(getattr(after, field)) == pairs.NOT_FINITE


# --- statistics -----------------------------------------------------------------------------------


@methods
@layers
@whens
@pytest.mark.parametrize(
    ("where", "field", "value"),
    [
        ("measured", "cotangent_mean", np.nan),
        ("measured", "cotangent_mean", -np.inf),
        ("measured", "cotangent_mean", HUGE),
        ("probed", "cotangent_mean", np.inf),
        ("probed", "cotangent_mean", HUGE),
        ("probed", "input_mean", np.nan),
        ("probed", "input_mean", HUGE),
    ],
)
def test_output_side(method, layer, steps, where, field, value):
    """Output factor, s and y of the layer are kept; its input side and all others go on."""
    faulty = fault(where, value, layer, field)
    before, after, plain, (params, state, updates) = run(method, steps, faulty)
    assert faults.is_same(updates, untroubled(method, steps)[2])
    kept((before[layer], after[layer]), *OUTPUT)
    faults.assert_same(after[layer], plain[layer], *INPUT, "stage", "positions")
    assert not bool(after[layer].powell_damped) | bool(after[layer].second_damped)
    for path in set(LAYERS) - {layer}:
        assert faults.is_same(after[path], plain[path])
    goes_on(method, params, state)


@methods
@layers
@whens
@pytest.mark.parametrize("value", [np.nan, np.inf, HUGE])
def test_mean_input(method, layer, steps, value):
    """Both factors, s and y are kept; A, which is fine, goes on, and at the start makes H_a."""
    before, after, plain, (params, state, updates) = run(
        method, steps, fault("measured", value, layer, "input_mean")
    )
    kept((before[layer], after[layer]), *OUTPUT, "input_status")
    waits = method == "kfqn" and steps == AT_FIRST  # no A: the mean stands for it
    if steps == LATER or waits:
        kept((before[layer], after[layer]), "input")
    else:
        np.testing.assert_allclose(after[layer].input, first_inverse(layer), rtol=1e-3, atol=1e-5)
    assert int(after[layer].stage) == (EMPTY if waits else RUNNING)
    if method != "kfqn":
        faults.assert_same(after[layer], plain[layer], "input_moment")
    others(method, layer, after, plain, same_direction=not waits)
    assert faults.is_finite(updates)
    goes_on(method, params, state)


@methods
@layers
@whens
@pytest.mark.parametrize("value", [np.nan, np.inf, HUGE])
def test_second_moment(method, layer, steps, value):
    """The input side is kept, and a first step waits; the output side and all others go on."""
    before, after, plain, (params, state, updates) = run(
        method, steps, fault("measured", value, layer, "input_moment")
    )
    if method == "kfqn" and steps == LATER:  # A is asked for at the start only
        assert faults.is_same(after, plain)
        return
    kept((before[layer], after[layer]), *INPUT)
    faults.assert_same(after[layer], before[layer], "stage")
    if steps == LATER:
        faults.assert_same(after[layer], plain[layer], *OUTPUT)
    assert int(after[layer].output_status) == pairs.UPDATED
    others(method, layer, after, plain, same_direction=steps == LATER)
    assert faults.is_finite(updates)
    goes_on(method, params, state)


@layers
@whens
@pytest.mark.parametrize("value", [np.nan, HUGE])
def test_product_with_the_second_moment(layer, steps, value):
    """KFQN's A u: the input factor is kept, as it was before or as it started."""
    before, after, plain, (params, state, updates) = run(
        "kfqn", steps, fault("measured", value, layer, "input_product")
    )
    assert faults.is_same(updates, untroubled("kfqn", steps)[2])
    assert int(after[layer].input_status) == pairs.NOT_FINITE
    if steps == LATER:
        kept((before[layer], after[layer]), "input")
    else:
        np.testing.assert_allclose(after[layer].input, first_inverse(layer), rtol=1e-3, atol=1e-5)
    faults.assert_same(after[layer], plain[layer], *OUTPUT)
    others("kfqn", layer, after, plain, same_direction=True)
    goes_on("kfqn", params, state)


def first_inverse(layer):
    """(A + sqrt(lambda) I)^-1 of the first batch."""
    measured = kfqn.curvature_fn(faults.LOSS, faults.PARAMS, faults.X, faults.T)(faults.PARAMS)
    A = np.asarray(measured.layers[layer].input_moment, np.float64)
    return np.linalg.inv(A + np.sqrt(faults.DAMPING) * np.eye(len(A)))


def others(method, layer, after, plain, same_direction):
    """The other layers are as without the fault; their output sides, if the probe is the same."""
    for path in set(LAYERS) - {layer}:
        fields = after[path]._fields if same_direction else (*INPUT, "stage", "positions")
        faults.assert_same(after[path], plain[path], *fields)


@methods
@whens
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_loss_of_the_curvature_function_alone(method, steps, value):
    """No number depends on it."""
    params, state = trained(method, steps)
    assert faults.is_same(
        program(method)(params, state, fault("loss", value)), untroubled(method, steps)
    )


# --- gradients ------------------------------------------------------------------------------------


@methods
@layers
@whens
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gradient(method, layer, steps, value):
    """It passes on, as in any optimizer; nothing of what the factors know is lost, then or after.

    The probe is not a number, so no output side learns; the input sides, measured before, do.
    """
    before, after, plain, (params, state, updates) = run(
        method, steps, fault("gradient", value, layer)
    )
    names = {path.removeprefix("params/"): path for path in LAYERS}
    for name, path in names.items():
        assert faults.is_finite(updates["params"][name]) == (path != layer)
        if path != layer:
            expected = untroubled(method, steps)[2]["params"][name]
            assert faults.is_same(updates["params"][name], expected)
        kept((before[path], after[path]), *OUTPUT)
        faults.assert_same(after[path], plain[path], *INPUT, "stage")
    faults.assert_sound(state)
    # The parameters of the layer are lost, and everything measured from there on.
    _, later, _ = program(method)(params, state)
    for path in LAYERS:
        kept((after[path], layers_of(later)[path]), *OUTPUT)
    faults.assert_sound(later)
    # The factors are as good as before: with sound parameters and momentum, training goes on.
    good = trained(method, LATER)
    goes_on(method, good[0], with_layers(good[1], state))


def with_layers(state, source):
    """A state with the layers of another one."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(state)
    found = jax.tree.leaves(source)
    leaves = [
        other if ".layers" in jax.tree_util.keystr(path) else leaf
        for (path, leaf), other in zip(paths, found, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)


@methods
@layers
@whens
def test_huge_gradient(method, layer, steps):
    """Finite, its square is not: what the probe shows of the layer is refused."""
    before, after, plain, (_, state, updates) = run(method, steps, fault("gradient", HUGE, layer))
    assert faults.is_finite(updates)
    kept((before[layer], after[layer]), *OUTPUT)
    faults.assert_same(after[layer], plain[layer], *INPUT)
    faults.assert_sound(state)


@layers
@whens
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gradient_under_apply_if_finite(layer, steps, value):
    """The whole step is as if it had not been; a second one in a row is let through."""
    method = "kbfgs if finite"
    params, before = trained(method, steps)
    faulty = fault("gradient", value, layer)
    same, after, updates = program(method)(params, before, faulty)
    assert faults.is_same(same, params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert faults.is_same(after.inner_state, before.inner_state)
    assert int(after.total_notfinite) == 1
    following, state, _ = program(method)(params, after)
    expected = untroubled(method, steps)
    assert faults.is_same((following, state.inner_state), (expected[0], expected[1].inner_state))

    _, through, _ = program(method)(params, after, faulty)
    assert not faults.is_finite(optax.tree.get(through, "momentum"))
    for path in LAYERS:
        kept((layers_of(before)[path], layers_of(through)[path]), *OUTPUT)
    faults.assert_sound(through)


@layers
@pytest.mark.parametrize(
    ("where", "field"),
    [("measured", "input_moment"), ("measured", "input_mean"), ("probed", "cotangent_mean")],
)
def test_statistics_under_apply_if_finite(layer, where, field):
    """It looks at gradients alone: the step is taken, and is that of the optimizer by itself."""
    faulty = fault(where, np.nan, layer, field)
    wrapped = program("kbfgs if finite")(*trained("kbfgs if finite", LATER), faulty)
    alone = program("kbfgs")(*trained("kbfgs", LATER), faulty)
    for path, state in layers_of(wrapped[1]).items():
        for ours, theirs in zip(
            jax.tree.leaves(state), jax.tree.leaves(layers_of(alone[1])[path]), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert int(wrapped[1].total_notfinite) == 0


@layers
@whens
@pytest.mark.parametrize("value", [np.nan, np.inf, HUGE])
def test_gradient_under_a_limit_on_the_step(layer, steps, value):
    """A length that is not finite is above any limit: no layer moves, but for what is NaN."""
    method = "kbfgs_l limited"
    before, after, plain, (params, state, updates) = run(
        method, steps, fault("gradient", value, layer)
    )
    for path in LAYERS:
        of_layer = updates["params"][path.removeprefix("params/")]
        if path == layer and value != HUGE:
            assert not faults.is_finite(of_layer)
        else:
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_layer))
        faults.assert_same(after[path], plain[path], *INPUT)
        if value != HUGE:
            kept((before[path], after[path]), *OUTPUT)
    faults.assert_sound(state)
    if value == HUGE:
        assert faults.is_same(params, trained(method, steps)[0])


def test_memory_that_stands_on_other_gradients_is_emptied():
    """A gradient of 1e17 under a limit on the step, and what 25 steps then make of the momentum.

    Pairs are damped on the memory as it is; without the oldest of them the others are far from
    damped, and the factor's smallest eigenvalue is below -1e5.
    """
    method, layer = "kbfgs_l limited", LAYERS[1]
    params, state = trained(method, AT_FIRST)
    resets = 0
    for step in range(25):
        faulty = fault("gradient", 1e17, layer) if step == 0 else None
        params, state, _ = program(method)(params, state, faulty)
        for path, of_layer in layers_of(state).items():
            matrix = np.float64(faults.dense(of_layer.output))
            assert np.linalg.eigvalsh(matrix).min() > -0.1, (path, step)
            if int(of_layer.output_status) == pairs.RESET:
                resets += 1
                np.testing.assert_array_equal(matrix, np.eye(len(matrix)))
    assert resets == kfqn.health(state).totals()["reset"] > 0
