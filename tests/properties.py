"""Random cases for property tests, in arrays of one size, so that few programs are compiled.

A factor of any dimension d up to `SIZE` lives in the first d rows and columns of an identity of
that size: pairs are zero behind the d-th entry, and BFGS leaves the rest of the identity alone.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SIZE, STEPS = 64, 10
EPS = {jnp.float32: float(np.finfo(np.float32).eps), jnp.float64: float(np.finfo(np.float64).eps)}

seeds = st.integers(0, 2**32 - 1)
dims = st.integers(1, SIZE)
dtypes = st.sampled_from([jnp.float32, jnp.float64])
lambdas = st.floats(-12, 3).map(lambda exponent: 10.0**exponent)
decades = st.sampled_from([0, 3, 10, 20])  # vectors have sizes from 10^-decades to 10^decades


def profiles(check, examples: int, *strategies):
    """Two tests of a property: one of every run, and one of `make soak` with 20 times the cases."""
    quiet = dict(deadline=None, suppress_health_check=list(HealthCheck))
    usual = settings(max_examples=examples, **quiet)(given(*strategies)(check))
    long = settings(max_examples=20 * examples, **quiet)(given(*strategies)(check))
    return usual, pytest.mark.soak(long)


class Sequence(NamedTuple):
    """Changes of point and gradient, [STEPS, SIZE] each."""

    s: np.ndarray
    y: np.ndarray


def sequence(seed: int, d: int, spread: int) -> Sequence:
    """Noisy changes through one Hessian that also curves downwards, of wildly different sizes."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d))
    hessian = root @ root.T / d - 0.3 * np.eye(d)
    s = rng.normal(size=(STEPS, d))
    y = s @ hessian + 0.3 * rng.normal(size=(STEPS, d))
    sizes = 10.0 ** rng.uniform(-spread, spread, size=(2, STEPS, 1))
    return Sequence(*(np.pad(v, ((0, 0), (0, SIZE - d))) for v in (s * sizes[0], y * sizes[1])))


def moment(seed: int, d: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """A positive semidefinite A of eigenvalues over six decades, some 0; inputs [STEPS, size]."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    spectrum = np.where(rng.random(d) < 0.2, 0, 10.0 ** rng.uniform(-4, 2, size=d))
    a = (rotation * np.sqrt(spectrum)) @ rng.normal(size=(d, STEPS))
    pad = size - d
    A = np.pad((rotation * spectrum) @ rotation.T, (0, pad))
    return A, np.pad(a.T, ((0, 0), (0, pad)))


def norm(v: np.ndarray) -> float:
    """Length of a vector that may be too long, or too short, to be squared."""
    largest = np.max(np.abs(v))
    return float(largest * np.linalg.norm(v / largest)) if largest > 0 else 0.0
