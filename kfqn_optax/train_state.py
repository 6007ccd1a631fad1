"""A Flax `TrainState` that hands extra arguments on to the optimizer."""

import dataclasses
import functools
from typing import Any

import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
    """``flax.training.train_state.TrainState`` for optimizers with extra arguments.

    Flax's own takes every further keyword of ``apply_gradients`` for a field to replace. Here a
    keyword that is no field goes to ``tx.update``; in all else the two are the same, subclasses
    with more fields included.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, kfqn_optax as kfqn
        >>> model = nn.Dense(1)
        >>> x = jnp.ones((4, 2))
        >>> def loss_fn(params, x):
        ...     return jnp.mean(model.apply(params, x) ** 2)
        >>> state = kfqn.TrainState.create(
        ...     apply_fn=model.apply, params=model.init(jax.random.key(0), x), tx=kfqn.kbfgs(0.1))
        >>> grads = jax.grad(loss_fn)(state.params, x)
        >>> state = state.apply_gradients(
        ...     grads=grads, curvature_fn=kfqn.curvature_fn(loss_fn, state.params, x))
        >>> int(state.step)
        1
    """

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """One step.

        Args:
            grads: like ``params``.
            **kwargs: new values of fields by name; anything else is an extra argument of
                ``tx.update``, such as ``curvature_fn``.

        Returns:
            The next state.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        extra = {name: value for name, value in kwargs.items() if name not in fields}
        replaced = {name: value for name, value in kwargs.items() if name in fields}
        tx = optax.with_extra_args_support(self.tx)
        bound = optax.GradientTransformation(tx.init, functools.partial(tx.update, **extra))
        stepped = super(TrainState, self.replace(tx=bound)).apply_gradients(grads=grads)
        return stepped.replace(**{"tx": self.tx, **replaced})
