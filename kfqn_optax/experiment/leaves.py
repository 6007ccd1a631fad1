"""A training state as arrays with names, and back.

A name is the path to the array, as in ``params/params/Dense_0/kernel``. Random keys appear as the
numbers that they consist of. An array without elements has a description, but nothing to keep.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kfqn_optax.experiment.steps import TrainState


def describe(state: TrainState) -> dict[str, str]:
    """Returns dtype and shape of every array by name, such as ``float32[3, 4]``."""
    return {name: _description(leaf) for name, leaf in _named(state)}


def to_arrays(state: TrainState) -> dict[str, np.ndarray]:
    """Returns the arrays with elements by name, on the host."""
    return {name: np.asarray(_numbers(leaf)) for name, leaf in _named(state) if leaf.size}


def outlines(state: TrainState) -> dict[str, np.ndarray]:
    """Returns arrays like those of `to_arrays` that take no memory: one zero, many times."""
    return {
        name: np.broadcast_to(np.zeros((), numbers.dtype), numbers.shape)
        for name, leaf in _named(state)
        if leaf.size
        for numbers in [_numbers(leaf)]
    }


def from_arrays(template: TrainState, arrays: dict[str, np.ndarray]) -> TrainState:
    """Returns a state like the template with the numbers of `to_arrays`, on the default device."""
    leaves = [_like(leaf, arrays[name]) if leaf.size else leaf for name, leaf in _named(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _named(state: TrainState) -> list[tuple[str, jax.Array]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]
    assert len(dict(named)) == len(named), "two arrays have the same name"
    return named


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _numbers(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _like(leaf: jax.Array, numbers: np.ndarray) -> jax.Array:
    array = jnp.array(numbers)  # a copy, which a step may overwrite
    return (
        jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array
    )


def _description(leaf: jax.Array) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"
