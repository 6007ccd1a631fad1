"""K-BFGS, a Kronecker-factored quasi-Newton method, as Optax gradient transformations for Flax."""

from kfqn_optax.capture import curvature_fn, find_layers
from kfqn_optax.factors import LayerState
from kfqn_optax.layers import Layer
from kfqn_optax.statistics import LayerStatistics, Statistics
from kfqn_optax.summary import summary
from kfqn_optax.transform import ScaleByKBFGSState, kbfgs, scale_by_kbfgs
from kfqn_optax.warm_start import warm_start

__all__ = [
    "Layer",
    "LayerState",
    "LayerStatistics",
    "ScaleByKBFGSState",
    "Statistics",
    "curvature_fn",
    "find_layers",
    "kbfgs",
    "scale_by_kbfgs",
    "summary",
    "warm_start",
]
