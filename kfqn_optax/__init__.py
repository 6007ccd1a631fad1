"""K-BFGS, a Kronecker-factored quasi-Newton method, as Optax gradient transformations for Flax."""

from kfqn_optax.capture import curvature_fn, find_layers
from kfqn_optax.factors import LayerState
from kfqn_optax.layers import Layer
from kfqn_optax.nnx import find_nnx_layers, nnx_curvature_fn
from kfqn_optax.optimizer import kbfgs
from kfqn_optax.statistics import LayerStatistics, Statistics
from kfqn_optax.summary import summary
from kfqn_optax.transform import ScaleByKBFGSState, scale_by_kbfgs
from kfqn_optax.warm_start import warm_start

__all__ = [
    "Layer",
    "LayerState",
    "LayerStatistics",
    "ScaleByKBFGSState",
    "Statistics",
    "curvature_fn",
    "find_layers",
    "find_nnx_layers",
    "kbfgs",
    "nnx_curvature_fn",
    "scale_by_kbfgs",
    "summary",
    "warm_start",
]
