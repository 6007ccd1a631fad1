"""Loss, gradient and curvature at the parameters from one pass forward and backward.

Under ``jit``, XLA merges the user's gradient pass with ours over the same batch, as long as both
are plain sequences of operations. Two loops it does not merge, nor what ``jax.checkpoint`` fences
off: with layers under ``nn.scan`` or ``nn.remat``, and with microbatches, the same batch would go
through the network twice. Here the gradient is taken in the curvature's own pass, and the
transformation is handed what that pass has measured.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from kfqn_optax.layers import named_leaves
from kfqn_optax.statistics import CurvatureFn, Statistics


def value_and_grad(
    curvature_fn: Callable[..., Statistics], params: Any, /, **asked: Any
) -> tuple[jax.Array, Any, CurvatureFn]:
    """The loss, its gradient, and a curvature function that need not measure again at ``params``.

    In place of ``jax.value_and_grad`` of the loss. It saves a pass where XLA cannot merge two:
    layers under ``nn.scan`` or ``nn.remat``, and microbatches; elsewhere it costs the same. For the
    gradient of the batch that curvature is measured on; with fewer examples for curvature take the
    two apart, as usual.

    Args:
        curvature_fn: made by `curvature_fn`, `nnx_curvature_fn`, `over_axis` or
            `over_microbatches`, from all the examples of the batch.
        params: the parameters, all of them; what ``tx.update`` will be given.
        **asked: what else that pass is to measure, see `curvature_fn`: ``sketches=8`` for
            `block_kbfgs` with 8 pairs.

    Returns:
        The loss, a scalar; its gradient, like ``params``; and a function for
        ``tx.update(..., curvature_fn=...)``. That function gives back what was measured when it is
        asked for it at the very arrays in ``params``, and measures everything else anew: at other
        parameters, what was not measured, and across the boundary of an inner ``jit``.

    Raises:
        TypeError: if ``curvature_fn`` cannot give the gradient.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, kfqn_optax as kfqn, optax
        >>> model = nn.Dense(2)
        >>> x = jnp.ones((8, 3))
        >>> params = model.init(jax.random.key(0), x)
        >>> def loss_fn(params, x):
        ...     return jnp.mean(jnp.sum(model.apply(params, x) ** 2, axis=-1))
        >>> tx = kfqn.kbfgs(learning_rate=0.3, damping=0.3)
        >>> opt_state = tx.init(params)
        >>> @jax.jit
        ... def train_step(params, opt_state, x):
        ...     curvature_fn = kfqn.curvature_fn(loss_fn, params, x)
        ...     loss, grads, curvature_fn = kfqn.value_and_grad(curvature_fn, params)
        ...     updates, opt_state = tx.update(grads, opt_state, params, curvature_fn=curvature_fn)
        ...     return optax.apply_updates(params, updates), opt_state, loss
        >>> params, opt_state, loss = train_step(params, opt_state, x)
    """
    measured = curvature_fn(params, gradient=True, **asked)
    if measured.gradient is None:
        raise TypeError(
            "value_and_grad: this curvature_fn returns no gradient when it is asked for one "
            "(gradient=True). Make it with kfqn_optax.curvature_fn or nnx_curvature_fn."
        )
    return measured.loss, measured.gradient, _Measured(curvature_fn, params, measured, asked)


@dataclasses.dataclass(frozen=True, eq=False)
class _Measured:
    """A curvature function that remembers one point.

    Attributes:
        curvature_fn: for all other points.
        params: the point.
        measured: there.
        asked: with these arguments.
    """

    curvature_fn: Callable[..., Statistics]
    params: Any
    measured: Statistics
    asked: Mapping[str, Any]

    def __call__(
        self,
        params: Any,
        /,
        *,
        moments: Collection[str] | None = None,
        **asked: Any,
    ) -> Statistics:
        """See `CurvatureFn`."""
        known = self.asked.get("moments")
        has_moments = known is None or (moments is not None and set(moments) <= set(known))
        new = [
            name
            for name, value in asked.items()
            if value and name != "gradient" and (name == "vectors" or value != self.asked.get(name))
        ]
        if has_moments and not new and self._holds(params):
            return self.measured
        return self.curvature_fn(params, moments=moments, **asked)

    def _holds(self, params: Any) -> bool:
        """Whether these are the arrays of ``self.params``; some may be masked out."""
        mine, theirs = named_leaves(self.params), named_leaves(params)
        return bool(theirs) and all(mine.get(name) is leaf for name, leaf in theirs.items())


def anew(curvature_fn: Callable[..., Statistics]) -> Callable[..., Statistics]:
    """The function that measures at every point.

    For what is needed in some steps only: asked for inside a ``lax.cond``, it costs nothing in the
    others, but what has been measured outside costs its price in each.
    """
    return curvature_fn.curvature_fn if isinstance(curvature_fn, _Measured) else curvature_fn
