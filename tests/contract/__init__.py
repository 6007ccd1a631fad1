"""The Optax contract: checks of what an optimizer does among other transformations of Optax.

A check takes any optimizer, not only ours, and compares it with the same optimizer alone. It
returns nothing if all is well, raises AssertionError if a result is wrong, and lets every other
error through: the optimizer, or Optax, refused. The table of ``docs/optax.md`` is made of them by
``benchmarks/optax_contract.py``; ``test_contract.py`` holds our methods to it.

* `optimizers`: ours, and peers.
* `problem`, `trees`: what all checks share.
* `wrappers`, `calls`, `devices`, `common`: the checks.
* `table`: the rows.
"""

from contract.common import common_tests, one_common_test
from contract.devices import on_devices
from contract.optimizers import KIN, OURS, PEERS, Optimizer
from contract.problem import BATCHES, alone, initial, loss_fn, step_of
from contract.table import CHECKS, ON_DEVICES, outcome
from contract.trees import close

__all__ = [
    "BATCHES",
    "CHECKS",
    "KIN",
    "ON_DEVICES",
    "OURS",
    "PEERS",
    "Optimizer",
    "alone",
    "close",
    "common_tests",
    "initial",
    "loss_fn",
    "on_devices",
    "one_common_test",
    "outcome",
    "step_of",
]
