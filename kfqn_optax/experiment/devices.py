"""Which devices a run uses, and what of it lies on which.

On one device nothing is said of places at all. On several, each has all training examples, the
parameters and, unless the config spreads it, the optimizer's state; a step's batch is shared out
evenly, every device gathering its own part, so only gradients and statistics travel.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import kfqn_optax as kfqn
from kfqn_optax.experiment.config import ConfigError
from kfqn_optax.experiment.optimizers import Config

_AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Attributes:
        mesh: all of them along one axis; None for the default device alone.
        spread: whether each keeps only its part of the optimizer's state.
    """

    mesh: Mesh | None = None
    spread: bool = False

    def __str__(self) -> str:
        device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        kind = f"{device.platform}: {device.device_kind}"
        return kind if self.mesh is None else f"{self.mesh.size} x {kind}"

    def everywhere(self, tree: Any) -> Any:
        """Arrays, put on all devices."""
        return tree if self.mesh is None else jax.device_put(tree, self._sharding())

    def share(self, tree: Any, axis: int = 0) -> Any:
        """Arrays of a traced program, an axis of each shared out evenly; whole if it cannot be."""
        mesh = self.mesh

        def one(array: jax.Array) -> jax.Array:
            if mesh is None or array.shape[axis] % mesh.size:
                return array
            sharding = self._sharding(*[None] * axis, _AXIS)
            return jax.lax.with_sharding_constraint(array, sharding)

        return jax.tree.map(one, tree)

    def place(self, opt_state: Any) -> Any:
        """The optimizer's state as the steps keep it."""
        if self.mesh is not None and self.spread:
            return kfqn.shard_state(opt_state, self.mesh, _AXIS)
        return self.everywhere(opt_state)

    def places(self, state: Any) -> dict[str, Any]:
        """Arguments of ``jax.jit`` for a step that leaves its state where it is."""
        if self.mesh is None:
            return {}
        return {"out_shardings": (jax.tree.map(lambda x: x.sharding, state), self._sharding())}

    def transformation(
        self, transformation: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """The transformation of a state that was placed."""
        if self.mesh is not None and self.spread:
            return kfqn.sharded(transformation, self.mesh, _AXIS)
        return transformation

    def _sharding(self, *spec: str | None) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec(*spec))


def make_devices(config: Config) -> Devices:
    """Returns the devices that a checked config asks for.

    Raises:
        ConfigError: there are fewer, or batches cannot be shared out evenly.
    """
    found = jax.local_devices()
    wanted = config.devices or len(found)
    if wanted > len(found):
        raise ConfigError(
            f"config.devices is {wanted}, but JAX finds {len(found)} here "
            f"({found[0].platform}: {found[0].device_kind}); give at most {len(found)}, or 0 for "
            "all. CPUs count as one device unless XLA_FLAGS says otherwise: "
            "--xla_force_host_platform_device_count=N."
        )
    for name, examples in (
        ("batch_size", config.batch_size),
        ("curvature_examples", config.curvature_examples),
    ):
        if examples % (wanted * config.microbatches):
            raise ConfigError(
                f"config.{name} is {examples}, which {wanted} devices times {config.microbatches} "
                f"microbatches cannot share evenly; give a multiple of "
                f"{wanted * config.microbatches}."
            )
    if wanted == 1:
        return Devices()
    mesh = Mesh(np.array(found[:wanted]), (_AXIS,), axis_types=(AxisType.Auto,))
    return Devices(mesh, config.shard_state)
