"""The Optax contract: checks of what an optimizer does among other transformations of Optax.

A check takes any optimizer, not only ours, and compares it with the same optimizer alone. It
returns nothing if all is well, raises AssertionError if a result is wrong, and lets every other
error through: the optimizer, or Optax, refused. The table of ``docs/optax.md`` is made of them by
``benchmarks/optax_contract.py``; ``test_contract.py`` holds our methods to it.

The model is small: one dense layer, and before it a scale that is no layer. A batch has a weight,
so that a gradient can be zero or not finite.
"""

import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import os
import subprocess
import sys
import tempfile
import unittest
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import parameterized
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfqn_optax as kfqn

DEVICES = 8
MASK = {"params": {"Dense_0": True, "scale": False}}


# --- the optimizers -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Optimizer:
    """An optimizer, and what its update wants to be given.

    Attributes:
        name: in the table.
        factory: as ``optax.inject_hyperparams`` takes it; it has an argument ``learning_rate``.
        numbers: its arguments.
        extra: from the arguments of the gradient to the extra arguments of the update.
        static: arguments that are no hyperparameters.
    """

    name: str
    factory: Callable[..., optax.GradientTransformation]
    numbers: dict[str, Any]
    extra: Callable[..., dict[str, Any]] = lambda loss_fn, params, *batch: {}
    static: tuple[str, ...] = ()

    def make(self, **numbers: Any) -> Any:
        return self.factory(**self.numbers, **numbers)


def _curvature(loss_fn, params, *batch):
    return {"curvature_fn": kfqn.curvature_fn(loss_fn, params, *batch)}


def _value(loss_fn, params, *batch):
    value, grad = jax.value_and_grad(loss_fn)(params, *batch)
    return {"value": value, "grad": grad, "value_fn": lambda p: loss_fn(p, *batch)}


_NUMBERS = {"learning_rate": 0.1, "damping": 0.1}
OURS = {
    "kbfgs": Optimizer("kbfgs", kfqn.kbfgs, _NUMBERS, _curvature, ("max_factor_dim",)),
    "kbfgs_l": Optimizer(
        "kbfgs_l",
        kfqn.kbfgs_l,
        {**_NUMBERS, "memory_size": 3},
        _curvature,
        ("memory_size", "max_factor_dim"),
    ),
    "kfqn": Optimizer("kfqn", kfqn.kfqn, _NUMBERS, _curvature, ("max_factor_dim",)),
}
PEERS = {
    "adam": Optimizer("adam", optax.adam, {"learning_rate": 0.1}),
    "lbfgs": Optimizer(
        "lbfgs",
        optax.lbfgs,
        {"learning_rate": 1.0, "memory_size": 3},
        _value,
        ("memory_size", "scale_init_precond"),
    ),
    "muon": Optimizer(
        "muon", optax.contrib.muon, {"learning_rate": 0.01}, static=("ns_steps", "ns_coeffs")
    ),
    "sophia": Optimizer(
        "sophia",
        optax.contrib.sophia,
        {"learning_rate": 0.01, "weight_decay": 0.0},
        lambda loss_fn, params, *batch: {"obj_fn": lambda p: loss_fn(p, *batch)},
    ),
}


# --- the problem --------------------------------------------------------------------------------


class Model(nn.Module):
    """One layer, and one parameter that is none."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (1, 3), self.dtype)
        return jnp.tanh(nn.Dense(2, dtype=self.dtype, param_dtype=self.dtype)(x * scale))


def loss_fn(params, x, targets, weight):
    out = Model(x.dtype).apply(params, x)
    return weight * jnp.mean(jnp.sum((out - targets) ** 2, axis=-1))


def initial(dtype: Any = jnp.float64) -> Any:
    return Model(dtype).init(jax.random.key(0), jnp.ones((8, 3), dtype))


@functools.cache
def batch_of(seed: int, weight: float = 1.0, dtype: Any = jnp.float64) -> tuple[jax.Array, ...]:
    """Eight inputs and targets, and the weight."""
    rng = np.random.default_rng(seed)
    arrays = rng.normal(size=(8, 3)), rng.uniform(size=(8, 2)), weight
    return tuple(jnp.asarray(a, dtype) for a in arrays)


BATCHES = [batch_of(0), batch_of(1), batch_of(2)]


def step_of(optimizer: Optimizer, tx: Any, loss_fn: Callable = loss_fn, more: Any = None):
    """A train step: the gradient's mean over some batches, the extra arguments of the last."""

    def step(params, state, *batches):
        each = [jax.grad(loss_fn)(params, *batch) for batch in batches]
        grads = jax.tree.map(lambda *g: sum(g) / len(g), *each)
        extra = optimizer.extra(loss_fn, params, *batches[-1]) | (more or {})
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, updates

    return step


def run(tx: Any, step: Callable, feed: list, params: Any, jitted_init: bool = False) -> list:
    """Parameters, state and updates after each step."""
    results = [(params, (jax.jit(tx.init) if jitted_init else tx.init)(params), None)]
    for batches in feed:
        results.append(step(*results[-1][:2], *batches))
    return results[1:]


@functools.cache
def alone(optimizer: Optimizer) -> tuple[list, int]:
    """What the optimizer does by itself on `BATCHES`, and the number of programs compiled."""
    tx = optimizer.make()
    step = jax.jit(step_of(optimizer, tx))
    results = run(tx, step, [(batch,) for batch in BATCHES], initial())
    return results, step._cache_size()


def close(actual: Any, expected: Any, what: str, rtol: float = 1e-9) -> None:
    """AssertionError, in a few words, unless two trees are the same up to rounding."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected), f"{what}: other structure"
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        largest = np.max(np.abs(e), initial=0.0, where=np.isfinite(e))
        same = np.allclose(a, e, rtol=rtol, atol=rtol * largest, equal_nan=True)
        assert same, f"{what} differ by {np.abs(a - e).max() / (largest or 1):.0e} of their size"


def zero(tree: Any) -> bool:
    return not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(tree))


def finite(tree: Any) -> bool:
    return all(np.all(np.isfinite(np.asarray(leaf))) for leaf in jax.tree.leaves(tree))


def types(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


# --- checks: other transformations around it ----------------------------------------------------


def chain(optimizer: Optimizer) -> None:
    """Among transformations that change nothing in total, two steps are those of it alone."""
    tx = optax.chain(optax.scale(2.0), optax.scale(0.5), optimizer.make(), optax.identity())
    step = jax.jit(step_of(optimizer, tx))
    results = run(tx, step, [(batch,) for batch in BATCHES[:2]], initial())
    for actual, expected in zip(results, alone(optimizer)[0], strict=False):
        close(actual[2], expected[2], "updates")


@functools.cache
def _frozen(optimizer: Optimizer) -> list:
    """The layer's updates when the scale is no parameter at all."""
    full, tx = initial(), optimizer.make()

    def loss_of_layer(params, *batch):
        return loss_fn({"params": {**full["params"], **params["params"]}}, *batch)

    step = jax.jit(step_of(optimizer, tx, loss_of_layer))
    layer = {"params": {"Dense_0": full["params"]["Dense_0"]}}
    results = run(tx, step, [(batch,) for batch in BATCHES[:2]], layer)
    return [updates["params"]["Dense_0"] for *_, updates in results]


def _is_frozen(optimizer: Optimizer, tx: Any) -> None:
    step = jax.jit(step_of(optimizer, tx))
    results = run(tx, step, [(batch,) for batch in BATCHES[:2]], initial())
    for (*_, updates), expected in zip(results, _frozen(optimizer), strict=True):
        close(updates["params"]["Dense_0"], expected, "updates")
        assert zero(updates["params"]["scale"]), "a frozen parameter moved"


def masked(optimizer: Optimizer) -> None:
    """With one parameter masked out and frozen, as if that parameter were a constant."""
    others = jax.tree.map(lambda mine: not mine, MASK)
    inner = optax.masked(optimizer.make(), MASK)
    _is_frozen(optimizer, optax.chain(inner, optax.masked(optax.set_to_zero(), others)))


def partition(optimizer: Optimizer) -> None:
    """The same by ``optax.partition``."""
    labels = jax.tree.map(lambda mine: "mine" if mine else "other", MASK)
    transforms = {"mine": optimizer.make(), "other": optax.set_to_zero()}
    _is_frozen(optimizer, optax.partition(transforms, labels))


@functools.cache
def _large_steps(optimizer: Optimizer) -> list:
    """Two steps on the mean gradient of two batches, with the extra arguments of the second."""
    tx = optimizer.make()
    step = jax.jit(step_of(optimizer, tx))
    return run(tx, step, [BATCHES[:2], (BATCHES[2], BATCHES[0])], initial())


def _accumulates(optimizer: Optimizer, tx: Any, get_state: Callable) -> None:
    step = jax.jit(step_of(optimizer, tx))
    feed = [(batch,) for batch in (*BATCHES, BATCHES[0])]
    results = run(tx, step, feed, initial())
    start = optimizer.make().init(initial())
    expected = _large_steps(optimizer)
    for k, (_, state, updates) in enumerate(results):
        steps = (k + 1) // 2
        close(get_state(state), expected[steps - 1][1] if steps else start, "states")
        if k % 2:
            close(updates, expected[steps - 1][2], "updates")
        else:
            assert zero(updates), "a step between moved"


def multi_steps(optimizer: Optimizer) -> None:
    """Every second step is that on the mean gradient, with the second's extra arguments."""
    tx = optax.MultiSteps(optimizer.make(), 2, accumulator_dtype=jnp.float64)
    _accumulates(optimizer, tx, lambda state: state.inner_opt_state)


def multi_steps_in_chain(optimizer: Optimizer) -> None:
    """The same with ``MultiSteps`` as one link of a chain."""
    tx = optax.MultiSteps(optimizer.make(), 2, accumulator_dtype=jnp.float64)
    tx = optax.chain(optax.identity(), tx)
    _accumulates(optimizer, tx, lambda state: state[1].inner_opt_state)


def apply_if_finite(optimizer: Optimizer) -> None:
    """A batch that makes everything NaN moves nothing, and the next step is as without it."""
    tx = optax.apply_if_finite(optimizer.make(), 2)
    step = jax.jit(step_of(optimizer, tx))
    feed = [(BATCHES[0],), (batch_of(1, jnp.nan),), (BATCHES[1],)]
    first, bad, second = run(tx, step, feed, initial())
    expected = alone(optimizer)[0]
    assert zero(bad[2]), "a step that is not finite moved"
    close(bad[1].inner_state, expected[0][1], "states after a NaN")
    close(first[2], expected[0][2], "updates")
    close(second[2], expected[1][2], "updates after a NaN")


def inject_hyperparams(optimizer: Optimizer) -> None:
    """The same steps, ``init`` under jit; and a learning rate of 0, set later, stops it."""
    injected = optax.inject_hyperparams(optimizer.factory, static_args=optimizer.static)
    tx = injected(**optimizer.numbers)
    step = jax.jit(step_of(optimizer, tx))
    feed = [(batch,) for batch in BATCHES[:2]]
    results = run(tx, step, feed, initial(), jitted_init=True)
    for actual, expected in zip(results, alone(optimizer)[0], strict=False):
        close(actual[2], expected[2], "updates", rtol=1e-5)
    params, state, _ = results[-1]
    rate = state.hyperparams["learning_rate"]
    state.hyperparams["learning_rate"] = jnp.zeros_like(rate)
    assert zero(step(params, state, BATCHES[2])[2]), "a learning rate set to 0 does not stop it"
    assert step._cache_size() == 1, "another hyperparameter compiles again"


def map_params(optimizer: Optimizer) -> None:
    """``optax.tree.map_params`` finds the parameters' shapes in the state, and only those."""
    tx, params = optimizer.make(), initial()
    state = tx.init(params)
    close(optax.tree.map_params(tx, lambda leaf: leaf, state), state, "states")

    def pair(leaf, p):
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        assert leaf.shape == p.shape, f"a leaf of shape {leaf.shape} for a parameter's {p.shape}"
        return "parameter"

    marked = optax.tree.map_params(
        tx,
        pair,
        state,
        params,
        transform_non_params=lambda rest: jax.tree.map(lambda _: "other", rest),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    assert set(jax.tree.leaves(marked)) <= {"parameter", "other"}, "a leaf was left out"
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
    for path, mark in zip(paths, jax.tree.leaves(marked), strict=True):
        factor = "layers" in path
        assert mark == "other" or not factor, f"{path} is no parameter"


def schedules(optimizer: Optimizer) -> None:
    """A learning rate that falls to 0 after two steps: the first two as without it, then none."""
    rate = optimizer.numbers["learning_rate"]
    numbers = {"learning_rate": lambda count: jnp.where(count < 2, rate, 0.0)}
    tx = dataclasses.replace(optimizer, numbers={**optimizer.numbers, **numbers}).make()
    step = jax.jit(step_of(optimizer, tx))
    results = run(tx, step, [(batch,) for batch in BATCHES], initial())
    for actual, expected in zip(results[:2], alone(optimizer)[0], strict=False):
        close(actual[2], expected[2], "updates")
    assert zero(results[2][2]), "a learning rate of 0 moves"


# --- checks: transformations of JAX around it ---------------------------------------------------


def scan(optimizer: Optimizer) -> None:
    """All steps in one ``lax.scan`` are the steps one by one."""
    tx, params = optimizer.make(), initial()
    step = step_of(optimizer, tx)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *BATCHES)
    body = lambda carry, batch: (step(*carry, batch)[:2], None)  # noqa: E731
    carry, _ = jax.jit(lambda carry: jax.lax.scan(body, carry, stacked))((params, tx.init(params)))
    close(carry, alone(optimizer)[0][-1][:2], "results")


def donation(optimizer: Optimizer) -> None:
    """Parameters and state may be donated: every array is used, and nothing changes."""
    tx, params = optimizer.make(), jax.tree.map(jnp.copy, initial())
    state = tx.init(params)
    step = jax.jit(step_of(optimizer, tx), donate_argnums=(0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a donated buffer that is of no use is a warning
        result = step(params, state, BATCHES[0])
    kept = [leaf for leaf in jax.tree.leaves((params, state)) if not leaf.is_deleted()]
    assert not any(leaf.ndim for leaf in kept), "an array was not donated"
    close(result, alone(optimizer)[0][0], "results")


def one_program(optimizer: Optimizer) -> None:
    """The first step and all later ones, and a run started anew, are one program."""
    results, programs = alone(optimizer)
    assert programs == 1, f"{programs} programs for {len(results)} steps"
    start = optimizer.make().init(initial())
    assert types(start) == types(results[-1][1]), "the state changes its types"


def cond(optimizer: Optimizer) -> None:
    """In ``lax.cond``, a step or none: types stay, in four precisions, whatever the loss is in."""
    tx = optimizer.make()
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        params, batch = initial(dtype), batch_of(0, dtype=dtype)
        state = tx.init(params)
        other = jnp.bfloat16 if dtype == jnp.float16 else jnp.float16

        def in_other(params, *batch, other=other):
            return loss_fn(params, *batch).astype(other)

        step = step_of(optimizer, tx, in_other)

        def maybe(params, state, step=step, batch=batch):
            taken = lambda: step(params, state, batch)[:2]  # noqa: E731
            return jax.lax.cond(jnp.sum(batch[0]) > 0, taken, lambda: (params, state))

        after = jax.eval_shape(maybe, params, state)
        assert types(after) == types((params, state)), f"types change in {jnp.dtype(dtype)}"
        updates = jax.eval_shape(step, params, state, batch)[2]
        assert types(updates) == types(params), f"updates are not in {jnp.dtype(dtype)}"


def shapes(optimizer: Optimizer) -> None:
    """``init`` needs shapes and dtypes only."""
    tx, params = optimizer.make(), initial()
    structs = jax.eval_shape(lambda: params)
    expected = tx.init(params)
    assert types(jax.eval_shape(tx.init, params)) == types(expected), "abstract init differs"
    close(tx.init(structs), expected, "states")


def unknown_arguments(optimizer: Optimizer) -> None:
    """Extra arguments that mean nothing to it change nothing."""
    tx, params = optimizer.make(), initial()
    more = {"unexpected_by_everybody": 1, "another": jnp.ones(3)}
    step = jax.jit(step_of(optimizer, tx, more=more))
    close(step(params, tx.init(params), BATCHES[0]), alone(optimizer)[0][0], "results")


def zero_gradients(optimizer: Optimizer) -> None:
    """Fifty steps of zero gradient move nothing; real steps after them are finite and move."""
    tx, params = optimizer.make(), initial()
    step = jax.jit(step_of(optimizer, tx))
    state = tx.init(params)
    for seed in range(50):
        after, state, updates = step(params, state, batch_of(seed % 4, 0.0))
        assert zero(updates), "a zero gradient moves"
    close(after, params, "parameters", rtol=0)
    after = params
    for _ in range(4):
        after, state, updates = step(after, state, BATCHES[0])
        assert finite((state, updates)), "not finite afterwards"
    assert not zero(optax.tree.sub(after, params)), "stuck afterwards"


# --- checks: several devices, in a process of their own -----------------------------------------


def _sharded(optimizer: Optimizer, kind: AxisType) -> None:
    """The batch sharded over eight devices, parameters on all: as on one, in one program."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))
    tx, params = optimizer.make(), initial()

    def put(tree, *axes):
        def one(leaf):
            # JAX writes the axes that are not sharded in Explicit mode only, and compares that.
            more = leaf.ndim - len(axes) if kind == AxisType.Explicit else 0
            spec = PartitionSpec(*axes, *[None] * more)
            return jax.device_put(leaf, NamedSharding(mesh, spec))

        return jax.tree.map(one, tree)

    step = jax.jit(step_of(optimizer, tx))
    params, state = put(params), put(tx.init(params))
    for (x, targets, weight), expected in zip(BATCHES, alone(optimizer)[0], strict=True):
        batch = (*put((x, targets), "data"), put(weight))
        params, state, updates = step(params, state, batch)
        close(jax.device_get(updates), expected[2], "updates", rtol=1e-6)
    close(jax.device_get(state), alone(optimizer)[0][-1][1], "states", rtol=1e-6)
    assert step._cache_size() == 1, f"{step._cache_size()} programs"


def local_statistics(optimizer: Optimizer, check_vma: bool = False) -> None:
    """In ``jax.shard_map``: mean gradient and mean statistics of all devices, as on one device."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    tx, params = optimizer.make(), initial()

    def step(params, state, *batch):
        fn = kfqn.curvature_fn(loss_fn, params, *batch)
        of_all = lambda p, **asked: jax.lax.pmean(fn(p, **asked), "data")  # noqa: E731
        grads = jax.lax.pmean(jax.grad(loss_fn)(params, *batch), "data")
        updates, state = tx.update(grads, state, params, curvature_fn=of_all)
        return optax.apply_updates(params, updates), state

    data, everywhere = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(everywhere, everywhere, data, data, everywhere),
        out_specs=(everywhere, everywhere),
        check_vma=check_vma,
    )
    state, step = tx.init(params), jax.jit(sharded)
    for batch, expected in zip(BATCHES, alone(optimizer)[0], strict=True):
        params, state = step(params, state, *batch)
        close((params, state), expected[:2], "results", rtol=1e-6)


def checked_shard_map(optimizer: Optimizer) -> None:
    """The same with ``check_vma=True``, the default of ``jax.shard_map``."""
    local_statistics(optimizer, check_vma=True)


def auto_mode(optimizer: Optimizer) -> None:
    _sharded(optimizer, AxisType.Auto)


def explicit_mode(optimizer: Optimizer) -> None:
    _sharded(optimizer, AxisType.Explicit)


def on_devices(names: list[str], checks: list[str]) -> dict[str, dict[str, str]]:
    """Outcomes by check and name of the optimizer, from a process with eight devices."""
    root = Path(__file__).parents[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    more = {"XLA_FLAGS": flags, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "outcomes.json"
        command = [sys.executable, __file__, str(output), ",".join(checks), *names]
        subprocess.run(command, env=os.environ | more, check=True)
        return json.loads(output.read_text())


# --- checks: what Optax asks of contributed optimizers ------------------------------------------


@functools.cache
def _common_tests() -> tuple[Any, dict[str, Callable]]:
    """Optax's own tests, as functions with the optimizer as an argument."""
    name = "optax.contrib._common_test"
    with mock.patch.object(parameterized, "product", return_value=lambda test: test):
        module = importlib.import_module(name)
        sys.modules.pop(name)
    case = module.ContribTest
    return module, {n: getattr(case, n) for n in dir(case) if n.startswith("test_")}


TARGETS = ("parabola", "rosenbrock", "matrix_parabola", "mixed_tensor_target")
DTYPES = {
    "test_optimizers": ["float32"],
    "test_state_shape_dtype_shard_stability": ["float16", "bfloat16", "float32", "float64"],
}  # of the others: bfloat16 and float32


def common_test(optimizer: Optimizer) -> None:
    """The tests of ``optax/contrib/_common_test.py``, as they are.

    Their parameters are bare arrays, no layers: our methods act as their fallback.
    """
    module, tests = _common_tests()
    for name in tests:
        one_common_test(optimizer, name)


def one_common_test(optimizer: Optimizer, name: str) -> None:
    """One of them, with everything it is to be tried with."""
    module, tests = _common_tests()
    wanted = inspect.signature(tests[name]).parameters
    given = {
        "opt_name": optimizer.name,
        "opt_kwargs": optimizer.numbers,
        "wrapper_name": None,
        "wrapper_kwargs": None,
    }
    options = {
        "target": [getattr(module, f"_setup_{target}") for target in TARGETS],
        "dtype": [getattr(jnp, dtype) for dtype in DTYPES.get(name, ["bfloat16", "float32"])],
        "wrap": [False],
    }
    names = [key for key in options if key in wanted]
    choices = [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*(options[key] for key in names))
    ]
    factory = optimizer.factory
    if name.startswith("test_optimizers_accept_learning_rate_schedule"):

        def factory(learning_rate: optax.ScalarOrSchedule, **numbers):
            return optimizer.factory(learning_rate, **numbers)

    x64 = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", False)
    try:
        with mock.patch.object(module, "_get_opt_factory", return_value=factory):
            for choice in choices:
                arguments = {k: v for k, v in (given | choice).items() if k in wanted}
                getattr(module.ContribTest(name), name)(**arguments)
    except unittest.SkipTest as skip:
        raise AssertionError(f"skipped: {skip}") from skip
    finally:
        jax.config.update("jax_enable_x64", x64)


# --- checks: wrappers that change what a step is ------------------------------------------------


def flatten(optimizer: Optimizer) -> None:
    """All parameters as one vector."""
    tx, params = optax.flatten(optimizer.make()), initial()
    step = jax.jit(step_of(optimizer, tx))
    close(step(params, tx.init(params), BATCHES[0])[2], alone(optimizer)[0][0][2], "updates")


def inside_sam(optimizer: Optimizer) -> None:
    """As the outer optimizer of ``optax.contrib.sam``: the call alone."""
    tx, params = optax.contrib.sam(optimizer.make(), optax.sgd(0.05)), initial()
    jax.eval_shape(step_of(optimizer, tx), params, tx.init(params), BATCHES[0])


def line_search(optimizer: Optimizer) -> None:
    """Before a line search whose ``value_fn`` is a function of the parameters: the call alone."""
    search = optax.scale_by_backtracking_linesearch(3)
    tx, params = optax.chain(optimizer.make(), search), initial()
    more = _value(loss_fn, params, *BATCHES[0])
    step = step_of(optimizer, tx, more=more)
    jax.eval_shape(step, params, tx.init(params), BATCHES[0])


# --- the table ----------------------------------------------------------------------------------

CHECKS = {
    "`chain`": chain,
    "`masked`": masked,
    "`partition`": partition,
    "`MultiSteps`": multi_steps,
    "`apply_if_finite`": apply_if_finite,
    "`inject_hyperparams`": inject_hyperparams,
    "`tree.map_params`": map_params,
    "schedules": schedules,
    "`lax.scan` over steps": scan,
    "`jit` with donation": donation,
    "no second compilation": one_program,
    "`lax.cond` in f16, bf16, f32, f64": cond,
    "`init` on `ShapeDtypeStruct`": shapes,
    "unknown extra arguments": unknown_arguments,
    "zero gradients": zero_gradients,
    "8 devices, `Auto` mesh": auto_mode,
    "8 devices, `Explicit` mesh": explicit_mode,
    "Optax's tests for `optax.contrib`": common_test,
    "`MultiSteps` inside `chain`": multi_steps_in_chain,
    "`flatten`": flatten,
    "inside `contrib.sam`": inside_sam,
    "before a line search": line_search,
}
ON_DEVICES = ["auto_mode", "explicit_mode"]


def outcome(check: Callable[[Optimizer], None], optimizer: Optimizer) -> str:
    """``ok``, ``fails: ...`` if a result is wrong, ``refused: ...`` if there is an error."""
    try:
        check(optimizer)
    except AssertionError as error:
        return f"fails: {_first(error)}"
    except Exception as error:
        return f"refused: {type(error).__name__}: {_first(error)}"
    return "ok"


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _main(output: str, checks: str, *names: str) -> None:
    everybody = OURS | PEERS
    outcomes = {
        check: {name: outcome(globals()[check], everybody[name]) for name in names}
        for check in checks.split(",")
    }
    Path(output).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    _main(*sys.argv[1:])
