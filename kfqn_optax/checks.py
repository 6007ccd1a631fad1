"""What can be wrong with the input of an update, each in a sentence that says what to do."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from kfqn_optax import inverse
from kfqn_optax import layers as layers_lib
from kfqn_optax.layers import Layer
from kfqn_optax.options import Number, longest_side
from kfqn_optax.statistics import Statistics

MISSING: Any = object()  # stands for an argument that was left out


def check_real(leaves: Mapping[str, Any]) -> None:
    """Refuses parameters that cannot be trained."""
    for name, leaf in leaves.items():
        if jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype == bool:
            raise TypeError(
                f"parameter {name!r} has dtype {leaf.dtype}, which has no gradient. Leave it out "
                "with optax.masked or optax.partition, or keep it outside the parameters."
            )


def check_sides(
    present: tuple[Layer, ...],
    method: str,
    max_factor_dim: Number | None,
    lookups: bool = False,
    sides: Callable[[Layer], list[int]] | None = None,
) -> None:
    """Refuses layers whose factors cannot be kept as matrices.

    Args:
        present: the layers.
        method: its name.
        max_factor_dim: the longest side; None for the default.
        lookups: whether the method knows the lookups of embeddings, for which it keeps no matrix.
        sides: the lengths for which a layer needs matrices; d_in and d_out by default.
    """
    longest = longest_side(max_factor_dim)
    advice = "Leave it out with layers=, and it goes to the fallback."
    for layer in present:
        if layer.lookup and not lookups:
            raise ValueError(
                f"layer {layer.path!r} is an embedding; {method} does not know its lookups. "
                f"{advice}"
            )
        own = sides(layer) if sides else [layer.d_out] + [layer.d_in] * (not layer.lookup)
        if max(own, default=0) > longest:
            raise ValueError(
                f"layer {layer.path!r} has a side of length {max(own)}, for which {method} would "
                f"keep two matrices of that size; max_factor_dim is {longest}. {advice}"
            )


def check_arguments(
    params: Any, curvature_fn: Any, present: tuple[Layer, ...], method: str = "K-BFGS"
) -> None:
    """Refuses an update of layers without parameters or without a usable ``curvature_fn``."""
    names = layers_lib.some(layer.path for layer in present)
    if params is None:
        raise ValueError(
            f"{method} needs the parameters to precondition {names}: call "
            "tx.update(grads, state, params, curvature_fn=...)."
        )
    if curvature_fn is MISSING:
        raise TypeError(
            f"update() is missing the keyword argument curvature_fn, which {method} needs for "
            f"{names}: pass curvature_fn=kfqn_optax.curvature_fn(loss_fn, params, *args) with the "
            "arguments of the gradient, or curvature_fn=None to keep the factors in this step."
        )
    if curvature_fn is not None and not callable(curvature_fn):
        raise TypeError(
            "curvature_fn must be a function from parameters to statistics, as "
            f"kfqn_optax.curvature_fn(loss_fn, params, *args) makes it, got {curvature_fn!r}."
        )


def check_state(
    present: tuple[Layer, ...], held: Mapping[str, Any], gradients: dict[str, Any]
) -> None:
    """Refuses gradients whose layers are not those that the state has factors for."""
    layers_lib.check_layers(present, gradients)
    expected = {layer.path: (layer.d_in, layer.d_out, layer.blocks or 1) for layer in present}
    found = {
        path: (inverse.size(s.input), inverse.size(s.output), s.stage.size)
        for path, s in held.items()
    }
    wrong = sorted(path for path in expected | found if expected.get(path) != found.get(path))
    if wrong:
        path = wrong[0]
        raise ValueError(
            "the state of K-BFGS was made for other parameters: layer "
            f"{path!r} has (d_in, d_out, blocks) = {expected.get(path, 'no parameters')} in the "
            f"gradients and {found.get(path, 'no factors')} in the state (differing: "
            f"{layers_lib.some(wrong)}). Call tx.init(params) on the parameters that are trained."
        )


def check_statistics(
    present: tuple[Layer, ...],
    measured: Statistics,
    all_layers: bool,
    weights: dict[str, Any],
    held: Mapping[str, Any],
) -> None:
    """Refuses statistics that lack a layer, have one too many, or have other sizes.

    Args:
        present: the layers of the update.
        measured: what ``curvature_fn`` returned.
        all_layers: whether the layers are all that the parameters show, not a choice of the user.
        weights: parameters by path.
        held: the state's layers.
    """
    lacking = [layer.path for layer in present if layer.path not in measured.layers]
    if lacking:
        raise ValueError(
            f"curvature_fn measured no layer {layers_lib.some(lacking)}, which the optimizer "
            f"preconditions; it measured {layers_lib.some(measured.layers)}. Either the loss does "
            "not call these as layers of a known kind (pass layers=kfqn_optax.find_layers(loss_fn, "
            "params, *args), and they go to the fallback), or curvature_fn was given another "
            "model's loss or parameters of another nesting."
        )
    surplus = [
        path
        for path in measured.layers
        if all_layers
        and path not in held
        and any(layers_lib.join(path, name) in weights for name in ("kernel", "bias"))
    ]
    if surplus:
        raise ValueError(
            f"curvature_fn measured {layers_lib.some(surplus)}, for which the state has no "
            "factors. Call tx.init(params) on the parameters that are trained."
        )
    for layer in present:
        shape = measured.layers[layer.path].input_mean.shape[-1:]
        shape += measured.layers[layer.path].cotangent_mean.shape[-1:]
        if shape != (layer.d_in, layer.d_out):
            raise ValueError(
                f"curvature_fn measured layer {layer.path!r} with (d_in, d_out) = {shape}, the "
                f"optimizer has {(layer.d_in, layer.d_out)} (d_in counts the bias). Kernel and "
                "bias must go to the same optimizer: change the mask, or give curvature_fn the "
                "same model."
            )
