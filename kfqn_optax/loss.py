"""The user's loss: how it is called with traced arrays, and what can be wrong with it."""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LossFn = Callable[..., Any]


def split_arrays(loss_fn: LossFn, args: tuple, kwargs: dict) -> tuple[Callable, list, Any]:
    """Splits the loss's arguments into arrays, which can be traced, and the rest, which cannot.

    Returns:
        ``call(params, arrays)``, the arrays, and a key that is equal for arguments which differ in
        arrays only. Flags, strings and the like stay what they are.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs))
    kinds = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    is_array = [isinstance(leaf, kinds) for leaf in leaves]

    @functools.wraps(loss_fn, updated=())
    def call(params: Any, arrays: list) -> Any:
        rest = iter(arrays)
        merged = [next(rest) if a else leaf for a, leaf in zip(is_array, leaves, strict=True)]
        args, kwargs = jax.tree.unflatten(treedef, merged)
        return loss_fn(params, *args, **kwargs)

    static = tuple(None if a else leaf for a, leaf in zip(is_array, leaves, strict=True))
    return call, [x for a, x in zip(is_array, leaves, strict=True) if a], (treedef, static)


class _NotScalar(TypeError):
    """The loss did not return a scalar."""


def scalar(loss_fn: LossFn, result: Any) -> jax.Array:
    """The loss in what ``loss_fn`` returned: a scalar, or the first of a pair."""
    loss: Any = result[0] if isinstance(result, tuple) and len(result) == 2 else result
    if jax.tree.structure(loss) != jax.tree.structure(0) or jnp.shape(loss) != ():
        shapes = jax.tree.map(jnp.shape, loss)
        raise _NotScalar(
            f"{_name(loss_fn)} must return the mean loss of the batch, a scalar (or a pair of a "
            f"scalar and auxiliary output); it returned shape {shapes}. Take the mean over the "
            "examples."
        )
    return loss


def explain(
    run: Callable[[], Any], loss_fn: LossFn, plain: Callable[[], Any] | None = None, needs: str = ""
) -> Any:
    """Runs, and turns what can go wrong through our own doing into a sentence.

    Args:
        run: a pass with our additions to the parameters.
        loss_fn: for its name.
        plain: the same pass without them, to see whether they are to blame.
        needs: what the additions are.
    """
    try:
        return run()
    except _NotScalar:
        raise
    except Exception as error:
        message = str(error)
        if "custom_lin" in message or "forward-mode" in message:
            raise ValueError(
                f"{_name(loss_fn)} takes a forward-mode derivative (jax.jvp, jax.jacfwd, "
                "jax.linearize or jax.hessian) through a layer. The layers' cotangents cannot be "
                "collected through that: give curvature_fn a loss without that term."
            ) from error
        if "Linearization failed" in message:
            raise ValueError(
                f"{_name(loss_fn)} takes a derivative (jax.grad or jax.vjp) through a layer. The "
                "layers' cotangents cannot be collected through that: compute it before the loss "
                "and pass it as an argument, or give curvature_fn a loss without that term."
            ) from error
        if "manual axis types" in message:
            raise ValueError(
                f"{_name(loss_fn)} is given a batch that differs from device to device of a mesh "
                "inside jax.shard_map. Let curvature_fn take the mean over them: "
                "kfqn_optax.over_axis(kfqn_optax.curvature_fn(loss_fn, params, *args), axis_name) "
                f"with the name of that axis. ({message[:300]})"
            ) from error
        if plain is None:
            raise
        plain()  # raises the user's own error, where that is what it is
        raise ValueError(
            f"{_name(loss_fn)} runs on the parameters but not with {needs}, which curvature_fn "
            f"needs: {type(error).__name__}: {message[:300]} Does it compare or combine the whole "
            "tree of parameters with another tree? Give curvature_fn the loss without that term "
            "(a penalty on the weights is not wanted there)."
        ) from error


def check_local(loss_fn: LossFn, expected: Collection[str], found: Collection[str]) -> None:
    """Raises if a loss is the same along axes of a mesh where each device is to have its own."""
    averaged = sorted(set(expected) - set(found))
    if averaged:
        raise ValueError(
            f"{_name(loss_fn)} returns a loss that is the same on all devices of axis "
            f"{averaged[0]!r}: it takes a mean or a sum over them itself. Give curvature_fn the "
            "mean loss of the local part of the batch; over_axis takes the mean over the devices."
        )


def _name(fn: Callable) -> str:
    return getattr(fn, "__name__", None) or repr(fn)
