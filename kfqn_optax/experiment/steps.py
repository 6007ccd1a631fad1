"""What runs on the device: the training step, the warm start, the evaluation; and the data order.

The images lie on the device as one array throughout; a step gets the whole array and the indices of
its batch.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfqn_optax as kfqn
from kfqn_optax.experiment.optimizers import Config, Optimizer
from kfqn_optax.experiment.problems import Params, Problem, squared_norm


class TrainState(NamedTuple):
    """What a step changes; its buffers are donated to the next step."""

    params: Params
    opt_state: Any


def make_step(
    problem: Problem, optimizer: Optimizer, curvature_examples: int
) -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, jax.Array]]:
    """Returns the training step, not yet jitted.

    Args:
        problem: gives the loss.
        optimizer: from `make_optimizer`.
        curvature_examples: how many of the batch's first examples curvature is measured on; 0: all.

    Returns:
        A function of the state, all images and the indices of the batch, which returns the next
        state and the loss of the batch before the step.
    """
    transformation = optimizer.transformation

    def step(state, images, indices):
        params, opt_state = state
        batch = images[indices]
        loss, grads = jax.value_and_grad(problem.loss)(params, batch)
        extra = {}
        if optimizer.takes_curvature:
            measured = batch[: curvature_examples or None]
            extra["curvature_fn"] = kfqn.curvature_fn(problem.loss, params, measured)
        updates, opt_state = transformation.update(grads, opt_state, params, **extra)
        return TrainState(optax.apply_updates(params, updates), opt_state), loss

    return step


def compile_step(
    problem: Problem,
    optimizer: Optimizer,
    config: Config,
    state: TrainState,
    images: jax.Array,
) -> Callable[[TrainState, jax.Array, np.ndarray], tuple[TrainState, jax.Array]]:
    """Returns `make_step`'s function, compiled; the state that it is called with is donated."""
    step = make_step(problem, optimizer, config.curvature_examples)
    indices = jax.ShapeDtypeStruct((config.batch_size,), np.int32)
    return jax.jit(step, donate_argnums=0).lower(state, images, indices).compile()


def make_evaluate(
    problem: Problem,
    train_images: jax.Array,
    test_images: jax.Array,
    *,
    weight_decay: float,
    batch_size: int,
) -> Callable[[Params], dict[str, float]]:
    """Returns a function from parameters to the four measures of the metrics.

    A loss is the mean over a set plus weight_decay/2 |w|^2; a mean squared error is over the set's
    images and their pixels. The sets are passed through in batches of `batch_size`; the last one is
    filled up with images that do not count, so that one program serves all.
    """

    @jax.jit
    def sums(params, images, start):
        rows = start + jnp.arange(min(batch_size, len(images)), dtype=jnp.int32)
        counts = rows < len(images)
        losses, squares = problem.errors(params, images[jnp.minimum(rows, len(images) - 1)])
        return jnp.where(counts, losses, 0.0).sum(), jnp.where(counts, squares, 0.0).sum()

    def means(params, images):
        starts = range(0, len(images), batch_size)
        parts = [sums(params, images, np.int32(start)) for start in starts]
        return np.asarray(jax.device_get(parts), np.float64).sum(axis=0) / len(images)

    norm = jax.jit(squared_norm)

    def evaluate(params):
        penalty = 0.5 * weight_decay * float(norm(params))
        train_loss, train_mse = means(params, train_images).tolist()
        test_loss, test_mse = means(params, test_images).tolist()
        return {
            "train_loss": train_loss + penalty,
            "test_loss": test_loss + penalty,
            "train_mse": train_mse,
            "test_mse": test_mse,
        }

    return evaluate


def epoch_batches(seed: int, epoch: int, examples: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yields an epoch's index vectors: a fresh permutation, the incomplete last batch left out.

    The order depends on the seed and the epoch's number alone.
    """
    order = np.random.default_rng([seed, epoch]).permutation(examples).astype(np.int32)
    for start in range(0, examples - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def warm_start(
    opt_state: Any, problem: Problem, params: Params, images: jax.Array, batch_size: int
) -> tuple[Any, float, float]:
    """Measures the input second moments over the whole train set at the initial parameters.

    The batches are taken in the order of the set; as in the steps, an incomplete one is left out.

    Returns:
        The new optimizer state, the seconds that it took, and before these the seconds until the
        second batch was asked for: by then the first was compiled.
    """
    begin = time.perf_counter()
    compiled = begin

    def batches():
        nonlocal compiled
        for number in range(len(images) // batch_size):
            yield (images[number * batch_size : (number + 1) * batch_size],)
            if number == 0:
                compiled = time.perf_counter()

    opt_state = kfqn.warm_start(opt_state, problem.loss, params, batches())
    jax.block_until_ready(opt_state)
    return opt_state, time.perf_counter() - compiled, compiled - begin
