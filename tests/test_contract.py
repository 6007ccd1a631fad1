"""The Optax contract (`contract`, ``docs/optax.md``), held against our methods and their kin."""

import importlib.util
from pathlib import Path

import contract
import jax
import jax.numpy as jnp
import optax
import pytest
from contract import KIN, OURS, Optimizer

ROOT = Path(__file__).parents[1]
REFUSED = {
    "multi_steps_in_chain": (TypeError, r"update\(\) is missing the keyword argument curvature_fn"),
    "flatten": (ValueError, "the parameters given to the update differ in structure"),
    "inside_sam": (TypeError, "unexpected keyword argument 'curvature_fn'"),
    "line_search": (TypeError, r"not consumed by `value_fn`: \['curvature_fn'\]"),
}
CHECKS = {check.__name__: check for check in contract.CHECKS.values()}
slow = pytest.mark.slow
SIX = OURS | KIN
MEASURED = [name for name in SIX if name != "mbf"]  # they want a curvature_fn
# The others are checked by `make test-slow`: they share the step with kbfgs, or most of it.
NAMES = ["kbfgs", *(pytest.param(name, marks=slow) for name in SIX if name != "kbfgs")]
HERE = [check for name, check in CHECKS.items() if name not in contract.ON_DEVICES]


# --- the rows of the table ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "check",
    [c for c in HERE if c.__name__ not in {"common_test", *REFUSED}],
    ids=lambda c: c.__name__,
)
def test_kept(check, name):
    check(SIX[name])


@pytest.mark.parametrize(
    "name", [*OURS, pytest.param("kfac", marks=slow), pytest.param("tkfac", marks=slow)]
)
@pytest.mark.parametrize(
    "check", [c for c in HERE if c.__name__ in REFUSED], ids=lambda c: c.__name__
)
def test_refused(check, name):
    error, message = REFUSED[check.__name__]
    with pytest.raises(error, match=message):
        check(SIX[name])


COMMON = [
    "test_gradient_accumulation",
    "test_optimizers",
    "test_optimizers_accept_extra_args",
    "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such",
    "test_optimizers_can_be_wrapped_in_inject_hyperparams",
    "test_preserve_dtype",
    "test_state_shape_dtype_shard_stability",
]


@pytest.mark.parametrize("test", COMMON)
@pytest.mark.parametrize("name", NAMES)
def test_what_optax_asks_of_contributed_optimizers(name, test):
    contract.one_common_test(SIX[name], test)


def test_optax_asks_nothing_else():
    _, tests = contract.common_tests()
    assert sorted(tests) == COMMON


@pytest.fixture(scope="module")
def devices():
    checks = [*contract.ON_DEVICES, "local_statistics", "checked_shard_map"]
    return contract.on_devices(MEASURED, checks)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_eight_devices(devices, name):
    for check in [*contract.ON_DEVICES, "local_statistics", "checked_shard_map"]:
        assert devices[check][name] == "ok", check


def test_the_table_on_the_page_has_every_check():
    """It is what the script printed; here only that the script's rows and columns are there."""
    spec = importlib.util.spec_from_file_location("script", ROOT / "benchmarks/optax_contract.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs/optax.md").read_text()
    table = page.split(script.BEGIN)[1].split(script.END)[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    titles = [row[0].removeprefix("| ") for row in rows[1:]]
    assert titles == list(contract.CHECKS)
    assert rows[0][1 : 1 + len(SIX)] == list(SIX)
    ours = {row[0].removeprefix("| "): dict(zip(SIX, row[1:], strict=False)) for row in rows[1:]}
    for title, check in contract.CHECKS.items():
        expected = "refused" if check.__name__ in REFUSED else "ok"
        assert all(ours[title][name].startswith(expected) for name in MEASURED), title
        assert ours[title]["mbf"].startswith("fails" if check.__name__ == "flatten" else "ok")


# --- a check can fail -----------------------------------------------------------------------------

PLAIN = optax.sgd(0.1, momentum=0.5)


def ignores_the_rate(learning_rate):
    return PLAIN


def forgets_extra_arguments(learning_rate):
    """It takes an extra argument, but does not say so to Optax."""

    def update(grads, state, params=None, value=1.0):
        return PLAIN.update(optax.tree.scale(value, grads), state)

    return optax.GradientTransformation(PLAIN.init, update)


def updates_by(change):
    def factory(learning_rate):
        def update(grads, state, params=None, **extra):
            updates, state = PLAIN.update(grads, state)
            return change(updates, params, extra), state

        return optax.GradientTransformationExtraArgs(PLAIN.init, update)

    return factory


def starts_with(change):
    def factory(learning_rate):
        def init(params):
            state = PLAIN.init(params)
            return (state[0]._replace(trace=jax.tree.map(change, params)), *state[1:])

        return optax.with_extra_args_support(optax.GradientTransformation(init, PLAIN.update))

    return factory


BROKEN = [
    ("chain", forgets_extra_arguments, "differ by"),
    ("masked", forgets_extra_arguments, "differ by"),
    ("partition", forgets_extra_arguments, "differ by"),
    ("multi_steps", forgets_extra_arguments, "differ by"),
    ("apply_if_finite", forgets_extra_arguments, "differ by"),
    ("inject_hyperparams", ignores_the_rate, "does not stop it"),
    ("map_params", starts_with(lambda p: jnp.zeros_like(p.T)), "a leaf of shape"),
    ("schedules", ignores_the_rate, "a learning rate of 0 moves"),
    ("donation", starts_with(lambda p: p), "Attempt to donate the same buffer twice"),
    ("one_program", starts_with(lambda p: 0.0), "2 programs"),
    ("cond", updates_by(lambda u, p, _: optax.tree.cast(u, jnp.float32)), "updates are not in"),
    ("shapes", starts_with(lambda p: jnp.asarray(p) * 0), "ShapeDtypeStruct"),
    ("unknown_arguments", updates_by(lambda u, p, e: optax.tree.scale(len(e), u)), "differ by"),
    ("zero_gradients", updates_by(lambda u, p, _: optax.tree.add(u, p)), "a zero gradient moves"),
]


@pytest.mark.parametrize(
    ("check", "factory", "message"), BROKEN, ids=lambda x: x if isinstance(x, str) else ""
)
def test_what_breaks_the_contract_is_noticed(check, factory, message):
    optimizer = Optimizer(
        "broken",
        factory,
        {"learning_rate": 0.1},
        lambda loss_fn, params, *batch: {"value": 2 + loss_fn(params, *batch)},
    )
    assert message in contract.outcome(CHECKS[check], optimizer)
