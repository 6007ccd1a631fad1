"""What runs on the device: the training step, the warm start, the evaluation; and the data order.

The training examples lie on the device throughout, a pytree of arrays with the examples along the
first axis of each; a step gets all of them and the indices of its batch. On several devices each
has all of them and takes its part of the batch (see `devices`).
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfqn_optax as kfqn
from kfqn_optax.experiment.devices import Devices
from kfqn_optax.experiment.optimizers import Config, Optimizer
from kfqn_optax.experiment.problems import Batch, ModelState, Params, Problem, squared_norm


class TrainState(NamedTuple):
    """What a step changes; its buffers are donated to the next step.

    Attributes:
        params: of the model.
        opt_state: of the optimizer.
        model_state: see `problems`.
        key: a random key to draw targets from; None for optimizers that need none.
    """

    params: Params
    opt_state: Any
    model_state: ModelState = ()
    key: jax.Array | None = None


def initial_state(
    optimizer: Optimizer, params: Params, model_state: ModelState, seed: int
) -> TrainState:
    """Returns the state before the first step."""
    key = jax.random.fold_in(jax.random.key(seed), 1) if optimizer.draws_targets else None
    return TrainState(params, optimizer.transformation.init(params), model_state, key)


def place(state: TrainState, devices: Devices) -> TrainState:
    """Returns the state, each part of it where the steps keep it."""
    params, opt_state, model_state, key = state
    everywhere = devices.everywhere
    return TrainState(
        everywhere(params), devices.place(opt_state), everywhere(model_state), everywhere(key)
    )


def count(examples: Batch) -> int:
    """Returns the number of examples."""
    return len(jax.tree.leaves(examples)[0])


def take(examples: Batch, rows: Any) -> Batch:
    """Returns some of the examples, by index or slice."""
    return jax.tree.map(lambda array: array[rows], examples)


def make_step(
    problem: Problem,
    optimizer: Optimizer,
    curvature_examples: int,
    microbatches: int = 1,
    devices: Devices = Devices(),  # noqa: B008  (immutable)
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, jax.Array]]:
    """Returns the training step, not yet jitted.

    Args:
        problem: gives the loss.
        optimizer: from `make_optimizer`.
        curvature_examples: how many of the batch's first examples curvature is measured on; 0: all.
        microbatches: in how many parts the batch goes through the network, one after the other.
        devices: that share the batch.

    Returns:
        A function of the state, all examples and the indices of the batch, which returns the next
        state and the loss of the batch before the step.
    """
    transformation = devices.transformation(optimizer.transformation)
    gradient = jax.value_and_grad(problem.loss, has_aux=True)

    def whole(params, model_state, drawn, examples, indices):
        batch = devices.share(take(examples, indices))
        (loss, next_model_state), grads = gradient(params, batch, model_state)
        # From the model state before the gradient pass, so with the same random masks.
        measured = take(batch, slice(curvature_examples or None))
        curvature_fn = lambda: problem.curvature_fn(  # noqa: E731
            params, devices.share(measured), model_state, drawn
        )
        return loss, next_model_state, grads, curvature_fn

    def in_parts(params, model_state, drawn, examples, indices):
        def parts(indices):
            rows = kfqn.microbatches(indices, microbatches)
            return devices.share(take(examples, rows), axis=1)

        def one(carry, batch):
            total, model_state = carry
            (loss, next_model_state), grads = gradient(params, batch, model_state)
            return (optax.tree.add(total, (loss, grads)), next_model_state), model_state

        zeros = (jnp.zeros((), jnp.float32), optax.tree.zeros_like(params))
        batches = parts(indices)
        (total, next_model_state), states = jax.lax.scan(one, (zeros, model_state), batches)
        loss, grads = jax.tree.map(lambda t: t / microbatches, total)
        if curvature_examples:
            batches = parts(indices[:curvature_examples])
        keys = None if drawn is None else jax.random.split(drawn, microbatches)
        curvature_fn = lambda: kfqn.over_microbatches(  # noqa: E731
            lambda *of_part: problem.curvature_fn(params, *of_part),
            (batches, states, keys),
        )
        return loss, next_model_state, grads, curvature_fn

    def step(state, examples, indices):
        params, opt_state, model_state, key = state
        drawn = None
        if optimizer.draws_targets:
            drawn, key = jax.random.split(key)
        measure = whole if microbatches == 1 else in_parts
        loss, model_state, grads, curvature_fn = measure(
            params, model_state, drawn, examples, indices
        )
        extra = {"curvature_fn": curvature_fn()} if optimizer.takes_curvature else {}
        updates, opt_state = transformation.update(grads, opt_state, params, **extra)
        params = optax.apply_updates(params, updates)
        return TrainState(params, opt_state, model_state, key), loss

    return step


def compile_step(
    problem: Problem,
    optimizer: Optimizer,
    config: Config,
    state: TrainState,
    examples: Batch,
    devices: Devices = Devices(),  # noqa: B008  (immutable)
) -> Callable[[TrainState, Batch, np.ndarray], tuple[TrainState, jax.Array]]:
    """Returns `make_step`'s function, compiled; the state that it is called with is donated."""
    step = make_step(problem, optimizer, config.curvature_examples, config.microbatches, devices)
    indices = jax.ShapeDtypeStruct((config.batch_size,), np.int32)
    places = devices.places(state)
    return jax.jit(step, donate_argnums=0, **places).lower(state, examples, indices).compile()


def make_evaluate(
    problem: Problem,
    train_examples: Batch,
    test_examples: Batch,
    *,
    weight_decay: float,
    batch_size: int,
    devices: Devices = Devices(),  # noqa: B008  (immutable)
) -> Callable[..., dict[str, float]]:
    """Returns a function from parameters (and model state) to the four measures of the metrics.

    A loss is the mean over a set plus weight_decay/2 |w|^2; the problem's measure is a mean over
    the set (a squared error also over an image's pixels). The sets are passed through in batches of
    `batch_size`; the last one is filled up with examples that do not count, so that one program
    serves all.
    """

    @jax.jit
    def sums(params, model_state, examples, start):
        size = count(examples)
        rows = start + jnp.arange(min(batch_size, size), dtype=jnp.int32)
        counts = rows < size
        batch = devices.share(take(examples, jnp.minimum(rows, size - 1)))
        losses, measures = problem.errors(params, batch, model_state)
        return jnp.where(counts, losses, 0.0).sum(), jnp.where(counts, measures, 0.0).sum()

    def means(params, model_state, examples):
        size = count(examples)
        starts = range(0, size, batch_size)
        parts = [sums(params, model_state, examples, np.int32(start)) for start in starts]
        return np.asarray(jax.device_get(parts), np.float64).sum(axis=0) / size

    norm = jax.jit(squared_norm)

    def evaluate(params, model_state=()):
        penalty = 0.5 * weight_decay * float(norm(params))
        train_loss, train_measure = means(params, model_state, train_examples).tolist()
        test_loss, test_measure = means(params, model_state, test_examples).tolist()
        return {
            "train_loss": train_loss + penalty,
            "test_loss": test_loss + penalty,
            f"train_{problem.measure}": train_measure,
            f"test_{problem.measure}": test_measure,
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
    opt_state: Any,
    problem: Problem,
    params: Params,
    examples: Batch,
    batch_size: int,
    model_state: ModelState = (),
    microbatches: int = 1,
    devices: Devices = Devices(),  # noqa: B008  (immutable)
    key: jax.Array | None = None,
) -> tuple[Any, float, float]:
    """Measures second moments over the whole train set at the initial parameters.

    The batches are taken in the order of the set; as in the steps, an incomplete one is left out,
    and each goes through the network in so many parts. With a random key targets are drawn from it,
    other ones for each part.

    Returns:
        The new optimizer state, the seconds that it took, and before these the seconds until the
        second batch was asked for: by then the first was compiled.
    """
    begin = time.perf_counter()
    compiled = begin

    def batches():
        nonlocal compiled
        size = batch_size // microbatches
        for number in range(count(examples) // batch_size * microbatches):
            drawn = None if key is None else jax.random.fold_in(key, number)
            batch = take(examples, slice(number * size, (number + 1) * size))
            yield devices.share(batch), drawn
            if number == 0:
                compiled = time.perf_counter()

    opt_state = problem.warm_start(opt_state, params, batches(), model_state)
    jax.block_until_ready(opt_state)
    return opt_state, time.perf_counter() - compiled, compiled - begin
