"""Kronecker-factored quasi-Newton methods as Optax gradient transformations for Flax."""

from kfqn_optax.capture import curvature_fn, find_layers
from kfqn_optax.combine import microbatches, over_axis, over_microbatches
from kfqn_optax.health import Health, LayerHealth, health
from kfqn_optax.layer_state import LayerState
from kfqn_optax.layers import Layer
from kfqn_optax.methods import scale_by_kbfgs, scale_by_kbfgs_l, scale_by_kfqn
from kfqn_optax.nnx import find_nnx_layers, nnx_curvature_fn
from kfqn_optax.optimizer import kbfgs, kbfgs_l, kfqn
from kfqn_optax.sharding import shard_state, sharded, whole_state
from kfqn_optax.statistics import LayerStatistics, Statistics
from kfqn_optax.summary import summary
from kfqn_optax.train_state import TrainState
from kfqn_optax.transform import ScaleByKBFGSState
from kfqn_optax.warm_start import warm_start

__all__ = [
    "Health",
    "Layer",
    "LayerHealth",
    "LayerState",
    "LayerStatistics",
    "ScaleByKBFGSState",
    "Statistics",
    "TrainState",
    "curvature_fn",
    "find_layers",
    "find_nnx_layers",
    "health",
    "kbfgs",
    "kbfgs_l",
    "kfqn",
    "microbatches",
    "nnx_curvature_fn",
    "over_axis",
    "over_microbatches",
    "scale_by_kbfgs",
    "scale_by_kbfgs_l",
    "scale_by_kfqn",
    "shard_state",
    "sharded",
    "summary",
    "warm_start",
    "whole_state",
]
