"""From a config to the Optax transformation that it names.

K-BFGS and its kin take one extra argument in `update`, the curvature function, and so do K-FAC and
TKFAC, with targets drawn from the model; the others take none. Weight decay is part of the gradient
for all of them, so all minimise the same function.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

import kfqn_optax as kfqn

# A checked ml_collections.ConfigDict. The types of its values are known to `config.check`, not to
# type checkers.
Config = Any


class Optimizer(NamedTuple):
    """A transformation and what its `update` needs.

    Attributes:
        transformation: the whole optimizer, learning rate included.
        takes_curvature: whether `update` wants the extra argument `curvature_fn`.
        warm_starts: whether `kfqn.warm_start` applies to the state.
        draws_targets: whether the curvature is that of a loss with targets drawn from the model.
        learns_pairs: whether the state has counts for `kfqn.health`: K-BFGS and its kin.
    """

    transformation: optax.GradientTransformation
    takes_curvature: bool = False
    warm_starts: bool = False
    draws_targets: bool = False
    learns_pairs: bool = False


Layers = tuple[kfqn.Layer, ...] | None
KINDS = ("attend", "conv", "dense", "dense general", "einsum", "embed")


def kinds_left(names: str) -> tuple[str, ...]:
    """The kinds of layers that ``config.fallback_kinds`` names, with commas between them."""
    return tuple(name.strip() for name in names.split(",") if name.strip())


def _kbfgs(config: Config, layers: Layers) -> Optimizer:
    shared = _shared(config, layers)
    transformation = kfqn.kbfgs(**shared, factor_decay=config.factor_decay)
    return Optimizer(transformation, takes_curvature=True, warm_starts=True, learns_pairs=True)


def _kbfgs_l(config: Config, layers: Layers) -> Optimizer:
    transformation = kfqn.kbfgs_l(
        **_shared(config, layers),
        factor_decay=config.factor_decay,
        memory_size=config.memory_size,
    )
    return Optimizer(transformation, takes_curvature=True, warm_starts=True, learns_pairs=True)


def _kfqn(config: Config, layers: Layers) -> Optimizer:
    """KF-QN, which keeps no second moments: they have no decay and no warm start."""
    transformation = kfqn.kfqn(**_shared(config, layers), split=config.split)
    return Optimizer(transformation, takes_curvature=True, learns_pairs=True)


def _block_kbfgs(config: Config, layers: Layers) -> Optimizer:
    """Block K-BFGS, whose steps need no limit."""
    transformation = kfqn.block_kbfgs(
        **_common(config, layers), factor_decay=config.factor_decay, powell=config.powell
    )
    return Optimizer(transformation, takes_curvature=True, learns_pairs=True)


def _kfac(config: Config, layers: Layers) -> Optimizer:
    return _natural(kfqn.kfac, config, layers)


def _tkfac(config: Config, layers: Layers) -> Optimizer:
    return _natural(kfqn.tkfac, config, layers)


def _mbf(config: Config, layers: Layers) -> Optimizer:
    """The mini-block Fisher method, which measures nothing and knows no limit of the step."""
    transformation = kfqn.mbf(
        **_common(config, layers),
        factor_decay=config.factor_decay,
        inverse_every=config.inverse_every,
    )
    return Optimizer(transformation)


def _natural(make: Callable, config: Config, layers: Layers) -> Optimizer:
    transformation = make(
        **_common(config, layers),
        norm_constraint=config.norm_constraint or None,
        factor_decay=config.factor_decay,
        inverse_every=config.inverse_every,
    )
    return Optimizer(transformation, takes_curvature=True, warm_starts=True, draws_targets=True)


def _shared(config: Config, layers: Layers) -> dict[str, Any]:
    """The arguments that K-BFGS, K-BFGS(L) and KF-QN have in common."""
    return {
        **_common(config, layers),
        "norm_constraint": config.norm_constraint or None,
        "pair_decay": config.pair_decay,
        "powell": config.powell,
    }


def _common(config: Config, layers: Layers) -> dict[str, Any]:
    """The arguments of every method with layers."""
    return {
        "learning_rate": config.learning_rate,
        "damping": config.damping,
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
        "layers": layers,
        "fallback": _decayed(config, optax.adam(config.fallback_learning_rate)),
    }


def _decayed(config: Config, rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """A rule that is given the weight decay with the gradient."""
    return optax.chain(optax.add_decayed_weights(config.weight_decay), rule)


def _adam(config: Config) -> optax.GradientTransformation:
    return optax.adam(config.learning_rate, eps=config.epsilon)


def _sgdm(config: Config) -> optax.GradientTransformation:
    return optax.sgd(config.learning_rate, momentum=config.momentum)


def _rmsprop(config: Config) -> optax.GradientTransformation:
    return optax.rmsprop(config.learning_rate, eps=config.epsilon, eps_in_sqrt=False)


def _muon(config: Config) -> optax.GradientTransformation:
    return muon(
        config.learning_rate,
        adam_learning_rate=config.fallback_learning_rate,
        muon_weight_dimension_numbers=kernels_as_matrices,
    )


def kernels_as_matrices(params: Any) -> Any:
    """Which axes of a parameter Muon takes as a matrix's rows and columns.

    Left to itself, Muon takes every array of two axes, embeddings too, and no other. Here it takes
    the kernels: of dense layers; of convolutions, patch by channels; of an attention, whose heads
    are part of the output in the projections and of the input in ``out``. Everything else goes to
    Adam: biases, scales, and embeddings, of which a step sees a few rows.

    Args:
        params: a tree of parameters of linen or NNX.

    Returns:
        The same tree with a ``MuonDimensionNumbers`` for each kernel and None for the others.
    """

    def numbers(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        names = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        *_, module, name = ["", *names.split("/")]
        if name != "kernel" or leaf.ndim < 2:
            return None
        projection = leaf.ndim == 3 and module != "out"
        rows = 1 if projection else leaf.ndim - 1
        return MuonDimensionNumbers(tuple(range(rows)), tuple(range(rows, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(numbers, params)


_WITH_LAYERS: dict[str, Callable[[Config, Layers], Optimizer]] = {
    "kbfgs": _kbfgs,
    "kbfgs_l": _kbfgs_l,
    "kfqn": _kfqn,
    "block_kbfgs": _block_kbfgs,
    "kfac": _kfac,
    "tkfac": _tkfac,
    "mbf": _mbf,
}
_BASELINES: dict[str, Callable[[Config], optax.GradientTransformation]] = {
    "adam": _adam,
    "sgdm": _sgdm,
    "rmsprop": _rmsprop,
    "muon": _muon,
}
OPTIMIZERS = (*_WITH_LAYERS, *_BASELINES)


def make_optimizer(config: Config, find_layers: Callable[[], Layers] = lambda: None) -> Optimizer:
    """Returns the optimizer that a checked config names.

    Args:
        config: the config.
        find_layers: gives the layers of the problem; called if the optimizer wants to know. None,
            what it gives if left out, means those that the parameters' names show, all of them.
    """
    if config.optimizer in _BASELINES:
        return Optimizer(_decayed(config, _BASELINES[config.optimizer](config)))
    left, layers = kinds_left(config.fallback_kinds), find_layers()
    if left and layers is not None:
        layers = tuple(layer for layer in layers if layer.kind not in left)
    return _WITH_LAYERS[config.optimizer](config, layers)
