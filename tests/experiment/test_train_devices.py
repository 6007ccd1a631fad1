"""`kfqn-train` on several devices and in microbatches: the numbers of one, in one piece."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from kfqn_optax.experiment import steps
from kfqn_optax.experiment.config import ConfigError
from kfqn_optax.experiment.devices import make_devices
from kfqn_optax.experiment.optimizers import Optimizer

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What a process with four devices prints."""
    more = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
        "JAX_PLATFORMS": "cpu",
        "NPROC": "32",  # threads for XLA, see devices/processes.py
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, HERE / "tiny_devices.py", tmp_path_factory.mktemp("runs")]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_four_devices_and_two_microbatches_train_as_one(report):
    assert report["devices"] == 4
    assert report["run"] == "4 x cpu: cpu"
    assert report["one"][2] < report["one"][0] - 0.1
    np.testing.assert_allclose(report["many"], report["one"][:2], rtol=1e-5)


def test_a_run_on_several_devices_goes_on_from_a_checkpoint(report):
    """A spread state too."""
    assert report["continued"][:2] == report["many"]
    np.testing.assert_allclose(report["continued"], report["one"], rtol=1e-5)


def test_what_is_refused(report):
    assert "devices (4 there, 2 here)" in report["elsewhere"]
    assert "config.devices is 5, but JAX finds 4 here (cpu: cpu); give at most 4" in report[
        "too many"
    ]  # fmt: skip
    assert "config.batch_size is 16, which 3 devices times 1 microbatches cannot share" in report[
        "uneven"
    ]  # fmt: skip


def test_batches_that_microbatches_do_not_divide():
    with pytest.raises(ConfigError, match="batch_size is 16, which 1 devices times 3 microbatches"):
        make_devices(tiny.config(microbatches=3))
    with pytest.raises(
        ConfigError, match="config.curvature_examples is 6, which 1 devices times 4"
    ):
        make_devices(tiny.config(microbatches=4, curvature_examples=6))
    assert str(make_devices(tiny.config(microbatches=4))) == "cpu: cpu"


def test_each_microbatch_has_random_keys_of_its_own():
    """Curvature sees those of the gradient: the same loss; and the next goes on where one ended."""

    def update(grads, state, params, *, curvature_fn):
        return optax.tree.zeros_like(params), curvature_fn(params, moments=[]).loss

    init = lambda params: jnp.zeros(())  # noqa: E731
    optimizer = Optimizer(optax.GradientTransformationExtraArgs(init, update), True)
    problem = tiny.CLASSIFIERS["char_transformer"]["nnx"](None)
    examples = jax.tree.map(jnp.asarray, tiny.characters(train=8).train)
    params, model_state = problem.init(0)
    step = jax.jit(steps.make_step(problem, optimizer, 0, microbatches=2))
    after, loss = step(steps.TrainState(params, 0.0, model_state), examples, np.arange(8))
    np.testing.assert_allclose(after.opt_state, loss, rtol=1e-5)
    expected, state = [], model_state
    for part in (slice(0, 8, 2), slice(1, 8, 2)):
        of_part, state = jax.jit(problem.loss)(params, steps.take(examples, part), state)
        expected.append(of_part)
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)
    for got, want in zip(keys(after.model_state), keys(state), strict=True):
        np.testing.assert_array_equal(got, want)


def test_each_microbatch_draws_targets_of_its_own():
    update = lambda grads, state, params, *, curvature_fn: (  # noqa: E731
        optax.tree.zeros_like(params),
        curvature_fn(params, moments=[]).loss,
    )
    transformation = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)
    optimizer = Optimizer(transformation, takes_curvature=True, draws_targets=True)
    examples, (params, _) = jnp.asarray(tiny.dataset().train[:8]), tiny.PROBLEM.init(0)
    step = jax.jit(steps.make_step(tiny.PROBLEM, optimizer, 0, microbatches=2))
    before = steps.initial_state(optimizer, params, (), seed=3)
    after, loss = step(before, examples, np.arange(8))
    drawn, following = jax.random.split(before.key)
    expected = [
        tiny.PROBLEM.loss(params, examples[part::2], (), key)[0]
        for part, key in enumerate(jax.random.split(drawn, 2))
    ]
    np.testing.assert_allclose(after.opt_state, np.mean(expected), rtol=1e-5)
    assert abs(after.opt_state - loss) > 1e-3  # that of the data's targets is another
    np.testing.assert_array_equal(*map(jax.random.key_data, (after.key, following)))


def keys(model_state):
    leaves = jax.tree.leaves(model_state)
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in leaves
    ]
