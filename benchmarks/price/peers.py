"""Second-order optimizers for JAX from other packages: timed where they import, else the error.

Those that are plain Optax transformations join the candidates under the module's name. kfac_jax has
an optimizer object that compiles its own step and wants the loss registered, so it is only named.
"""

import importlib

from benchmarks.price.candidates import Candidate

# Module, and its transformation as "submodule:function"; None where it has no Optax one.
PEERS = {
    "kfac_jax": None,
    "psgd_jax": "psgd_jax.kron:kron",
    "soap_jax": "soap_jax:soap",
    "distributed_shampoo": None,
}


def load() -> tuple[dict[str, Candidate], dict[str, str]]:
    """Candidates by module, and what became of each module in words."""
    found, words = {}, {}
    for module, where in PEERS.items():
        try:
            importlib.import_module(module)
            if where is None:
                words[module] = "imports; has no plain Optax step, not timed"
                continue
            path, function = where.split(":")
            make = getattr(importlib.import_module(path), function)
        except Exception as error:
            # A package may fail in any way on a Python or JAX that it was not written for.
            words[module] = f"{type(error).__name__}: {error}"
            continue
        found[module] = Candidate(lambda _, make=make: make(1e-3))
        words[module] = "timed"
    return found, words
