"""What the checks ask of trees of arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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
