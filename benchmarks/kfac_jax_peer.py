"""Train loss of an autoencoder by epoch with kfac-jax, and the price of its steps.

    python -m benchmarks.kfac_jax_peer --problem mnist --data FILE.npz [--initial_damping 150]

Not for this package's environment: kfac-jax 0.0.8 fails on JAX 0.10. It ran with JAX 0.8.2, Flax
0.12.6 and Optax 0.2.8 in an environment of its own, from the root of the repository. FILE.npz is
that of ``benchmarks.time_to_loss``, where also the start, the order of the examples and the file of
results are from. The settings are those of kfac-jax's own example of this autoencoder: damping,
learning rate and momentum adapt, inverses every 5th step; what damping begins with is an option.

The price is the mean of 20 steps, four rounds of inverses, over the median of 20 plain steps, which
take turns with them.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np
import optax

from benchmarks import time_to_loss
from benchmarks.price import problems

TIMED = 20
SETTINGS = {
    "inverse_update_period": 5,
    "num_burnin_steps": 5,
    "curvature_ema": 0.95,
    "use_adaptive_damping": True,
    "damping_adaptation_interval": 5,
    "damping_adaptation_decay": 0.95,
    "use_adaptive_learning_rate": True,
    "use_adaptive_momentum": True,
    "min_damping": 1e-5,
    "max_damping": 1000.0,
}


def forward(params, x):
    """The output of the dense layers, in plain JAX: kfac-jax finds layers in what it traces."""
    layers = [params["params"][f"Dense_{i}"] for i in range(len(params["params"]))]
    for i, layer in enumerate(layers, start=1):
        x = x @ layer["kernel"] + layer["bias"]
        if i not in (len(layers) // 2, len(layers)):
            x = jax.nn.relu(x)
    return x


def binary(params, x):
    """Cross entropy of each image."""
    logits = forward(params, x)
    kfac_jax.register_sigmoid_cross_entropy_loss(logits, x)
    return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(logits, x), axis=1))


def squared(params, x):
    """Half the squared error of each image."""
    output = forward(params, x)
    kfac_jax.register_squared_error_loss(output, x, weight=0.5)
    return 0.5 * jnp.mean(jnp.sum((output - x) ** 2, axis=1))


def _seconds(function, *arguments, **named):
    """Time of a call, its result waited for; and the result."""
    begin = time.perf_counter()
    result = jax.block_until_ready(function(*arguments, **named))
    return time.perf_counter() - begin, result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", default="mnist", choices=list(time_to_loss.TARGETS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--initial_damping", type=float, default=150.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=time_to_loss.RESULTS / "time_to_loss.jsonl")
    options = parser.parse_args()

    problem = problems.make(options.problem)
    examples = time_to_loss.examples_of(options.data, "train")
    order = time_to_loss.orders(options.seed, options.epochs, len(examples))
    params = time_to_loss.initial(problem, options.seed)
    loss_fn = squared if options.problem == "faces" else binary
    difference = abs(
        loss_fn(params, examples[:1000]) / problem.loss_fn(params, examples[:1000]) - 1
    )
    if difference > 1e-5:
        raise ValueError(f"the loss here is not the problem's, off by {difference:.1e} of it.")

    value_and_grad = jax.value_and_grad(loss_fn)
    weight_decay = time_to_loss.LIMIT["weight_decay"]
    optimizer = kfac_jax.Optimizer(
        value_and_grad,
        l2_reg=weight_decay,
        multi_device=False,
        initial_damping=options.initial_damping,
        **SETTINGS,
    )
    plain = jax.jit(jax.value_and_grad(problem.loss_fn))
    loss_of_all = jax.jit(functools.partial(time_to_loss.mean_loss, problem.loss_fn))
    key = jax.random.key(options.seed)
    state = optimizer.init(params, key, examples[:1000])
    done, plain_s, step_s, losses = 0, [], [], []
    steps = order.reshape(-1, order.shape[-1])
    burn_in = steps[: SETTINGS["num_burnin_steps"]]
    batches = (examples[batch] for batch in np.concatenate([burn_in, steps]))
    begin = time.perf_counter()
    for epoch in order:
        for batch in epoch:
            timed = 10 <= done < 10 + TIMED  # after what the first steps compile
            if timed:
                plain_s.append(_seconds(plain, params, examples[batch])[0])
            old = params, state, jax.random.fold_in(key, done), batches
            took, (params, state, *_) = _seconds(optimizer.step, *old, global_step_int=done)
            if timed:
                step_s.append(took)
            done += 1
        losses.append(round(float(loss_of_all(params, examples)), 2))
        print(f"epoch {len(losses)}: {losses[-1]}", flush=True)
    found = {
        "problem": options.problem,
        "method": "kfac-jax, adaptive",
        "learning_rate": None,
        "initial_damping": options.initial_damping,
        "seed": options.seed,
        "examples": len(examples),
        "epochs": options.epochs,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "seconds_with_compile": round(time.perf_counter() - begin, 1),
        "ratio": round(statistics.fmean(step_s) / statistics.median(plain_s), 3),
        "slowest": round(max(step_s) / statistics.median(plain_s), 3),
        "train_loss": losses,
    }
    with options.output.open("a") as file:
        file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
