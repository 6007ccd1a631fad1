"""What a checkpoint must have in common with the run that goes on from it.

A run ends with the same bits only if config, data, program and device are the same, and it can go
on at all only if the arrays are. All of this is written into every checkpoint, and compared.
"""

import hashlib
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np

from kfqn_optax.experiment.config import differences
from kfqn_optax.experiment.devices import Devices
from kfqn_optax.experiment.leaves import describe
from kfqn_optax.experiment.optimizers import Config
from kfqn_optax.experiment.steps import TrainState

FORMAT = "kfqn-train 1"
_PACKAGES = ("kfqn-optax", "jax", "jaxlib", "flax", "optax", "numpy")
_SHOWN = 3  # arrays named in a message


def fingerprint(
    config: Config,
    dataset: Any,
    state: TrainState,
    devices: Devices = Devices(),  # noqa: B008  (immutable)
) -> dict[str, Any]:
    """Returns the facts of a run that its checkpoints carry, as plain values.

    Args:
        config: a checked config.
        dataset: the examples, with the attributes `train` and `test`.
        state: a state of this run; its shapes and dtypes are looked at.
        devices: that the run uses.
    """
    return {
        "format": FORMAT,
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "device": str(devices),
        "config": config.to_dict(),
        "data": {"training": _digest(dataset.train), "test": _digest(dataset.test)},
        "arrays": describe(state),
    }


def mismatch(found: Any, here: Mapping[str, Any], config: Config) -> str:
    """Says why a run cannot go on from a checkpoint.

    Args:
        found: what the checkpoint carries; any JSON value.
        here: `fingerprint` of this run.
        config: this run's config.

    Returns:
        The rest of a sentence that begins with the checkpoint; empty if nothing differs.
    """
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return f"is not one of kfqn-train: it does not say that its format is {FORMAT!r}"
    if any(not isinstance(found.get(name), type(here[name])) for name in here):
        return "does not carry all the facts that kfqn-train writes into a checkpoint"
    if keys := differences(found["config"], config):
        return f"is of another config: {', '.join(keys)}"
    for name, version in here["versions"].items():
        if (other := found["versions"].get(name)) != version:
            return (
                f"was written with {name} {other}, and this is {version}, which may give other "
                "numbers; install that version to continue"
            )
    if found["device"] != here["device"]:
        return (
            f"was written on the device {found['device']!r}, and this is {here['device']!r}, "
            "which gives other numbers; continue there"
        )
    for name, digest in here["data"].items():
        if found["data"].get(name) != digest:
            return f"is of other data: the {name} examples are not the same; give the same data"
    return _of_arrays(found["arrays"], here["arrays"])


def _of_arrays(found: Mapping[str, Any], here: Mapping[str, str]) -> str:
    """The same for the arrays: another model, or another optimizer."""
    differing = [
        *(f"{name} is not in it" for name in here if name not in found),
        *(f"{name!r} is in it, but not in this run" for name in found if name not in here),
        *(
            f"{name} is {found[name]!r} in it and {here[name]!r} in this run"
            for name in here
            if name in found and found[name] != here[name]
        ),
    ]
    if not differing:
        return ""
    more = len(differing) - _SHOWN
    shown = "; ".join(differing[:_SHOWN])
    return f"holds other arrays: {shown}" + (f"; and {more} more" if more > 0 else "")


def _digest(examples: Any) -> str:
    """SHA-256 of the arrays of a data set, with their shapes and dtypes."""
    digest = hashlib.sha256()
    for array in _arrays(examples):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _arrays(examples: Any) -> Iterator[np.ndarray]:
    return (np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(examples))
