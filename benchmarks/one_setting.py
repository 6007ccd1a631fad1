"""Block K-BFGS with its defaults, on every problem: loss by step, train and test.

    python -m benchmarks.one_setting --problem mnist --data FILE.npz [--seeds 0 1 2] [--steps 480]
    python -m benchmarks.one_setting --problem mnist --data FILE.npz --rates 0.03 3 --steps 200
    python -m benchmarks.one_setting --table

FILE.npz is what ``benchmarks.time_to_loss --export`` writes. One line of JSON a run, appended to
``benchmarks/results/one_setting.jsonl``; what that holds is not run again. Curvature from 100 of
the 1000 examples; weight decay 1e-5 (Adam and Muon have none).

Losses are those of all test examples and of the first ``--examples`` of the training set, at the
parameters and at their running average (decay ``min(0.95, (1 + t) / (10 + t))``), after every
``--every`` steps. ``--table`` prints the plain-step equivalents until a target is reached: steps
times what a step costs as a multiple of a plain one, in ``price_cpu.json``, for block K-BFGS the
price of its first 200 steps and that of the later ones; the median over seeds of the train loss
counts, straight lines between the measurements.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import kfqn_optax as kfqn
from benchmarks import time_to_loss
from benchmarks.price import problems
from kfqn_optax.block_step import FIRST_STEPS, LATER_EVERY

RESULTS = Path(__file__).parent / "results"
OUTPUT = RESULTS / "one_setting.jsonl"
BATCH, PART = problems.BATCH, 100
LATER = f"block, every {LATER_EVERY}th step"  # in `price`
METHODS = {
    "block": lambda lr: kfqn.block_kbfgs(lr, weight_decay=1e-5),
    **{name: time_to_loss.METHODS[name][0] for name in ("fast", "muon", "adam")},
}


def trainer(problem, method, rate, train, parts):
    """A compiled function of some steps, and the state it starts from."""
    tx, loss_fn = METHODS[method](rate), problem.loss_fn

    def step(carry, batch):
        params, state, average, t = carry
        x = train[batch]
        grads, extra = jax.grad(loss_fn)(params, x), {}
        if method in ("block", "fast"):
            extra["curvature_fn"] = kfqn.curvature_fn(loss_fn, params, x[:PART])
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(0.95, (1 + t) / (10 + t))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
        return (params, state, average, t + 1), None

    def loss_of(params, x):
        whole = len(x) // BATCH * BATCH
        some = x[:whole].reshape(-1, BATCH, x.shape[-1])
        return jnp.mean(jax.lax.map(lambda part: loss_fn(params, part), some))

    @jax.jit
    def run(carry, batches):
        carry, _ = jax.lax.scan(step, carry, batches)
        at = {"": carry[0], "averaged_": carry[2]}
        losses = {
            f"{where}{name}_loss": loss_of(params, x)
            for where, params in at.items()
            for name, x in parts.items()
        }
        return carry, losses

    def start(seed):
        params = time_to_loss.initial(problem, seed)
        return params, tx.init(params), params, jnp.zeros(())

    return run, start


def measure(options):
    problem = problems.make(options.problem)
    train = time_to_loss.examples_of(options.data, "train")
    test = time_to_loss.examples_of(options.data, "test")
    parts = {"train": train[: options.examples], "test": test}
    for rate in options.rates:
        run, start = trainer(problem, options.method, rate, train, parts)
        for seed in options.seeds:
            key = {
                "problem": problem.name,
                "method": options.method,
                "learning_rate": rate,
                "seed": seed,
                "steps": options.steps,
                "every": options.every,
                "train_examples": len(train),
                "measured_on": options.examples,
            }
            if any(key.items() <= found.items() for found in time_to_loss.read(options.output)):
                continue
            epochs = -(-options.steps * BATCH // len(train))
            batches = time_to_loss.orders(seed, epochs, len(train)).reshape(-1, BATCH)
            carry, begin, losses = start(seed), time.perf_counter(), {}
            for first in range(0, options.steps, options.every):
                carry, seen = run(carry, batches[first : first + options.every])
                for name, value in jax.device_get(seen).items():
                    losses.setdefault(name, []).append(round(float(value), 3))
                print(
                    problem.name, rate, seed, first + options.every, seen["train_loss"], flush=True
                )
            found = key | {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
            if options.method == "block":
                trust = optax.tree.get(carry[1], "trust")
                found |= {"rejected": int(trust.rejected), "kappa": round(float(trust.kappa), 3)}
            found |= {"seconds_with_compile": round(time.perf_counter() - begin, 1)} | losses
            with options.output.open("a") as file:
                file.write(json.dumps(found) + "\n")


def reached(losses, every, target):
    """The step at which a curve first goes through a target; None if it does not."""
    for i, loss in enumerate(losses):
        if math.isfinite(loss) and loss <= target:
            if i == 0:
                return every
            before = losses[i - 1]
            return every * (i + (before - target) / (before - loss))
    return None


def equivalents(steps, method, rows):
    """What so many steps cost, in plain ones; later steps of block K-BFGS have their own price."""
    prices = (rows[name]["ratio"] for name in (method, LATER if method == "block" else method))
    return time_to_loss.equivalents(steps, FIRST_STEPS, *prices)


def table(options):
    runs = time_to_loss.read(options.output)
    prices = json.loads((RESULTS / "price_cpu.json").read_text())["steps"]
    kinds = dict.fromkeys((r["problem"], r["method"], r["learning_rate"], r["steps"]) for r in runs)
    for name in dict.fromkeys(problem for problem, *_ in kinds):
        targets = time_to_loss.TARGETS[name]
        print(f"\n{name}: plain-step equivalents to a train loss, at the parameters / averaged\n")
        heads = ["method", "learning rate", "seeds", "step", *(f"to {t}" for t in targets)]
        heads += ["steps", "train", "test", "averaged train", "averaged test"]
        print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
        for problem, method, rate, steps in kinds:
            mine = [
                r
                for r in runs
                if (r["problem"], r["method"], r["learning_rate"], r["steps"])
                == (name, method, rate, steps)
            ]
            if problem != name:
                continue
            rows = prices[name]["rows"]
            median = {
                field: [statistics.median(at) for at in zip(*(r[field] for r in mine), strict=True)]
                for field in (
                    "train_loss", "test_loss", "averaged_train_loss", "averaged_test_loss"
                )
            }  # fmt: skip
            cells = [method, f"{rate:g}", str(len(mine)), f"{rows[method]['ratio']:.2f}"]
            for target in targets:
                both = [
                    reached(median[field], mine[0]["every"], target)
                    for field in ("train_loss", "averaged_train_loss")
                ]
                cells.append(
                    " / ".join(
                        "not" if s is None else f"{equivalents(s, method, rows):.0f}" for s in both
                    )
                )
            cells.append(str(steps))
            ends = ("train_loss", "test_loss", "averaged_train_loss", "averaged_test_loss")
            cells += [f"{median[field][-1]:.2f}" for field in ends]
            print("| " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problem", default="mnist", choices=list(time_to_loss.TARGETS))
    parser.add_argument("--method", default="block", choices=list(METHODS))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument(
        "--examples", type=int, default=10_000, help="of the training set, measured"
    )
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if options.table:
        table(options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
