"""The problem, and some steps of training on it in several ways."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfqn_optax as kfqn

from .collectives import collectives

METHODS = {"kbfgs": kfqn.kbfgs, "kbfgs_l": kfqn.kbfgs_l, "kfqn": kfqn.kfqn}
EVERYWHERE = PartitionSpec()


class Model(nn.Module):
    """Dense layers with tanh between them."""

    widths: tuple
    dtype: str

    @nn.compact
    def __call__(self, x):
        for width in self.widths[1:-1]:
            x = nn.tanh(nn.Dense(width, dtype=self.dtype, param_dtype=self.dtype)(x))
        return nn.Dense(self.widths[-1], dtype=self.dtype, param_dtype=self.dtype)(x)


class Training:
    """Targets of a network of the same shape, batches that all differ.

    Every way returns parameters and factors after all the steps, on the host; the collectives of a
    step; and the bytes of the optimizer's state on one device.
    """

    def __init__(self, devices, widths, batch, steps, dtype, method="kbfgs", **numbers):
        self.mesh = jax.make_mesh(
            (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
        )
        self.tx = METHODS[method](**{"learning_rate": 0.1, "damping": 0.1} | numbers)
        self.model = Model(tuple(widths), dtype)
        rng = np.random.default_rng(0)
        x = rng.normal(size=(steps, batch, widths[0])).astype(dtype)
        with jax.default_device(jax.local_devices()[0]):
            teacher = jax.jit(self.model.init)(jax.random.key(1), x[0])
            t = jax.jit(self.model.apply)(teacher, x)
            params = jax.jit(self.model.init)(jax.random.key(0), x[0])
            state = jax.jit(self.tx.init)(params)
        self.batches = x, np.asarray(t)
        self.start = jax.tree.map(np.asarray, (params, state))

    def loss_fn(self, params, x, t):
        return jnp.mean(jnp.sum((self.model.apply(params, x) - t) ** 2, axis=-1))

    def step(self, carry, batch, tx=None):
        params, state = carry
        loss, grads = jax.value_and_grad(self.loss_fn)(params, *batch)
        fn = kfqn.curvature_fn(self.loss_fn, params, *batch)
        return self.update(tx or self.tx, grads, state, params, fn), loss

    def update(self, tx, grads, state, params, fn):
        updates, state = tx.update(grads, state, params, curvature_fn=fn)
        return optax.apply_updates(params, updates), state

    # --- the ways ---------------------------------------------------------------------------------

    def one_device(self, order=None):
        """The whole batch on one device; the examples of each batch in another order, if given."""
        x, t = self.batches
        batches = self.batches if order is None else (x[:, order], t[:, order])
        run = jax.jit(lambda start, batches: jax.lax.scan(self.step, start, batches)[0])
        device = jax.local_devices()[0]
        start, batches = jax.device_put((self.start, batches), device)
        return self._outcome(run.lower(start, batches).compile(), start, batches)

    def jit(self):
        """The batch sharded; nothing is said of devices inside the step."""
        run = jax.jit(lambda start, batches: jax.lax.scan(self.step, start, batches)[0])
        return self._on_mesh(run)

    def shard_map(self, check_vma=True):
        """Each device its part of the batch; the means over devices are written out."""

        def step(carry, batch):
            params, state = carry
            of_device = jax.lax.pcast(params, "data", to="varying")
            grads = jax.lax.pmean(jax.grad(self.loss_fn)(of_device, *batch), "data")
            fn = kfqn.over_axis(kfqn.curvature_fn(self.loss_fn, params, *batch), "data")
            return self.update(self.tx, grads, state, params, fn), None

        run = jax.shard_map(
            lambda start, batches: jax.lax.scan(step, start, batches)[0],
            mesh=self.mesh,
            in_specs=(EVERYWHERE, PartitionSpec(None, "data")),
            out_specs=EVERYWHERE,
            check_vma=check_vma,
        )
        return self._on_mesh(jax.jit(run))

    def pmap(self):
        """The same in ``jax.pmap``, one step after the other."""

        def step(carry, x, t):
            params, state = carry
            grads = jax.lax.pmean(jax.grad(self.loss_fn)(params, x, t), "data")
            fn = kfqn.over_axis(kfqn.curvature_fn(self.loss_fn, params, x, t), "data")
            return self.update(self.tx, grads, state, params, fn)

        size = self.mesh.size
        run = jax.pmap(step, axis_name="data")
        carry = jax.tree.map(lambda a: np.broadcast_to(a, (size, *np.shape(a))), self.start)
        for x, t in zip(*self.batches, strict=True):
            carry = run(carry, *(a.reshape(size, -1, a.shape[-1]) for a in (x, t)))
        return {"result": jax.tree.map(lambda a: np.asarray(a[0]), carry)}

    def spread(self):
        """As `jit`, each device with a part of the state."""
        tx = kfqn.sharded(self.tx, self.mesh, "data")

        @jax.jit
        def run(start, batches):
            (params, state), _ = jax.lax.scan(functools.partial(self.step, tx=tx), start, batches)
            return params, state

        params, state = self._put(self.start)
        start = params, kfqn.shard_state(state, self.mesh, "data")
        return self._on_mesh(run, start)

    def microbatches(self, count=2):
        """As `jit`, the batch in parts, one after the other."""

        def step(carry, batch):
            params, state = carry
            parts = kfqn.microbatches(batch, count)
            zeros = optax.tree.zeros_like(params)
            add = lambda total, part: (  # noqa: E731
                optax.tree.add(total, jax.grad(self.loss_fn)(params, *part)),
                None,
            )
            total, _ = jax.lax.scan(add, zeros, parts)
            grads = jax.tree.map(lambda t: t / count, total)
            measure = lambda *part: kfqn.curvature_fn(self.loss_fn, params, *part)  # noqa: E731
            fn = kfqn.over_microbatches(measure, parts)
            return self.update(self.tx, grads, state, params, fn), None

        return self._on_mesh(jax.jit(lambda start, batches: jax.lax.scan(step, start, batches)[0]))

    # --- shared -----------------------------------------------------------------------------------

    def _put(self, tree, *spec):
        sharding = NamedSharding(self.mesh, PartitionSpec(*spec))

        def one(array):
            array = np.asarray(array)
            return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])

        return jax.tree.map(one, tree)

    def _on_mesh(self, run, start=None):
        start = self._put(self.start) if start is None else start
        batches = self._put(self.batches, None, "data")
        compiled = run.lower(start, batches).compile()
        return self._outcome(compiled, start, batches, NamedSharding(self.mesh, EVERYWHERE))

    def _outcome(self, compiled, start, batches, everywhere=None):
        result = compiled(start, batches)
        state = result[1]
        whole = jax.jit(kfqn.whole_state, out_shardings=everywhere)(result)
        return {
            "result": jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), whole),
            "collectives": collectives(compiled.as_text()),
            "state_bytes": sum(a.addressable_data(0).nbytes for a in jax.tree.leaves(state)),
        }
