"""Kronecker-factored quasi-Newton methods as Optax gradient transformations for Flax."""

from kfqn_optax.block_rule import block_kbfgs, scale_by_block_kbfgs
from kfqn_optax.block_state import BlockState
from kfqn_optax.block_step import ScaleByBlockKBFGSState
from kfqn_optax.capture import curvature_fn, find_layers
from kfqn_optax.combine import microbatches, over_axis, over_microbatches
from kfqn_optax.health import Health, LayerHealth, health
from kfqn_optax.kfac_rule import kfac, scale_by_kfac
from kfqn_optax.layer_state import LayerState
from kfqn_optax.layers import Layer
from kfqn_optax.mbf_rule import ScaleByMBFState, mbf, scale_by_mbf
from kfqn_optax.methods import scale_by_kbfgs, scale_by_kbfgs_l, scale_by_kfqn
from kfqn_optax.mini_block import MiniBlockState
from kfqn_optax.moments import MomentState
from kfqn_optax.natural import ScaleByKFACState
from kfqn_optax.nnx import find_nnx_layers, nnx_curvature_fn
from kfqn_optax.one_pass import value_and_grad
from kfqn_optax.optimizer import kbfgs, kbfgs_l, kfqn
from kfqn_optax.sampling import sample_bernoulli, sample_categorical, sample_normal
from kfqn_optax.sharding import shard_state, sharded, whole_state
from kfqn_optax.statistics import JointMoments, LayerStatistics, Sketches, Statistics
from kfqn_optax.summary import summary
from kfqn_optax.tkfac_rule import ScaleByTKFACState, scale_by_tkfac, tkfac
from kfqn_optax.train_state import TrainState
from kfqn_optax.transform import ScaleByKBFGSState
from kfqn_optax.warm_start import warm_start

__all__ = [
    "BlockState",
    "Health",
    "JointMoments",
    "Layer",
    "LayerHealth",
    "LayerState",
    "LayerStatistics",
    "MiniBlockState",
    "MomentState",
    "ScaleByBlockKBFGSState",
    "ScaleByKBFGSState",
    "ScaleByKFACState",
    "ScaleByMBFState",
    "ScaleByTKFACState",
    "Sketches",
    "Statistics",
    "TrainState",
    "block_kbfgs",
    "curvature_fn",
    "find_layers",
    "find_nnx_layers",
    "health",
    "kbfgs",
    "kbfgs_l",
    "kfac",
    "kfqn",
    "mbf",
    "microbatches",
    "nnx_curvature_fn",
    "over_axis",
    "over_microbatches",
    "sample_bernoulli",
    "sample_categorical",
    "sample_normal",
    "scale_by_block_kbfgs",
    "scale_by_kbfgs",
    "scale_by_kbfgs_l",
    "scale_by_kfac",
    "scale_by_kfqn",
    "scale_by_mbf",
    "scale_by_tkfac",
    "shard_state",
    "sharded",
    "summary",
    "tkfac",
    "value_and_grad",
    "warm_start",
    "whole_state",
]
