"""Faults for one training step: which number, where, times what. All of it is data of one program.

The network has a layer of width 1 in the middle. Nothing here needs more than float32, where the
squares of numbers above some 1e19 overflow.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from models import problem

import kfqn_optax as kfqn
from kfqn_optax import layer_state, lbfgs

METHODS = ("kbfgs", "kbfgs_l", "kfqn")
LAYERS = tuple(f"params/Dense_{i}" for i in range(3))
FIELDS = ("input_moment", "input_mean", "cotangent_mean", "input_product")
LOSS, PARAMS, X, T = problem((4, 1, 3), dtype=jnp.float32, seed=4)
RATE, DAMPING = 0.1, 0.1
HUGE = 1e30  # finite in float32, its square is not


def none():
    """No fault: every number is multiplied by 1."""
    fields = {path: dict.fromkeys(FIELDS, 1.0) for path in LAYERS}
    return {
        "gradient": dict.fromkeys(LAYERS, 1.0),
        "measured": fields,
        "probed": copy.deepcopy(fields),
        "loss": 1.0,
        "learning_rate": RATE,
        "damping": DAMPING,
    }


def fault(where, value, layer=None, field=None):
    """One fault: a number of `none` is another one."""
    faults = none()
    if layer is None:
        faults[where] = value
    elif field is None:
        faults[where][layer] = value
    else:
        faults[where][layer][field] = value
    return faults


def transformation(method, learning_rate, damping):
    name, _, wrapper = method.partition(" ")
    options = {"memory_size": 3} if name == "kbfgs_l" else {}
    if wrapper == "limited":
        options["norm_constraint"] = 3.0
    tx = getattr(kfqn, name)(learning_rate, damping, **options)
    return optax.apply_if_finite(tx, 1) if wrapper == "if finite" else tx


@functools.cache
def program(method):
    """The jitted step: params, state, x, targets, faults -> params, state, updates."""

    @jax.jit
    def step(params, state, x, targets, faults):
        tx = transformation(method, faults["learning_rate"], faults["damping"])
        measure, calls = kfqn.curvature_fn(LOSS, params, x, targets), []

        def curvature(point, *, moments=None, vectors=None):
            # The first call is at params, and so is one for second moments or products.
            at_params = not calls or vectors or moments
            calls.append(point)
            scale = faults["measured" if at_params else "probed"]
            found = measure(point, moments=moments, vectors=vectors)
            spoiled = {
                path: layer._replace(
                    **{
                        field: getattr(layer, field) * scale[path][field]
                        for field in FIELDS
                        if getattr(layer, field) is not None
                    }
                )
                for path, layer in found.layers.items()
            }
            return found._replace(loss=found.loss * faults["loss"], layers=spoiled)

        gradient = {
            "params": {
                name: jax.tree.map(lambda g, by=faults["gradient"][f"params/{name}"]: g * by, layer)
                for name, layer in jax.grad(LOSS)(params, x, targets)["params"].items()
            }
        }
        updates, state = tx.update(gradient, state, params, curvature_fn=curvature)
        return optax.apply_updates(params, updates), state, updates

    def run(params, state, faults=None, x=X, targets=T):
        return step(params, state, x, targets, jax.tree.map(np.float32, faults or none()))

    return run


@functools.cache
def trained(method, steps):
    """Parameters and state after some steps without faults."""
    if steps == 0:
        return PARAMS, transformation(method, RATE, DAMPING).init(PARAMS)
    return program(method)(*trained(method, steps - 1))[:2]


@functools.cache
def untroubled(method, steps):
    """What the step after these leads to without a fault."""
    return program(method)(*trained(method, steps))


def layers_of(state):
    return optax.tree.get(state, "layers")


def is_finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def is_same(a, b):
    """Bit for bit, but for the sign of a NaN."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)


def assert_same(a, b, *fields):
    for field in fields:
        assert is_same(getattr(a, field), getattr(b, field)), field


def assert_sound(state):
    """All that is kept of the curvature is finite, both factors positive definite."""
    for path, layer in layers_of(state).items():
        assert is_finite(layer), path
        for H in (layer.input, layer.output):
            matrix = np.asarray(H if isinstance(H, jax.Array) else dense(H))
            scale = np.abs(matrix).max()
            np.testing.assert_allclose(matrix, matrix.T, atol=1e-5 * scale)
            assert np.linalg.eigvalsh(np.float64(matrix)).min() > 1e-6 * scale, path


dense = jax.jit(lbfgs.dense)


def assert_counted(before, after):
    """The counts went up by what the statuses say."""
    for path, layer in layers_of(after).items():
        happened = [np.asarray(getattr(layer, name)) == v for name, v in layer_state.COLUMNS]
        grown = np.asarray(layer.counts) - np.asarray(layers_of(before)[path].counts)
        np.testing.assert_array_equal(grown, np.stack(happened, axis=-1), path)
