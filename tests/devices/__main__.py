"""Compares the ways of training in this process, which has devices of its own; prints JSON.

python -m devices '{"ways": [...], "widths": [...], ...}' [ADDRESS PROCESSES NUMBER]
"""

import contextlib
import doctest
import io
import json
import sys

import jax
import numpy as np

from .training import Training


def errors(found, expected):
    """The largest difference of any entry, relative to the largest entry of its array."""

    def one(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-300))

    def factors(result):
        layers = jax.tree.leaves(result[1], is_leaf=lambda node: hasattr(node, "input_status"))
        held = [node for node in layers if hasattr(node, "input_status")]
        return [(node.input, node.output, node.input_moment) for node in held]

    return {
        "params": max(jax.tree.leaves(jax.tree.map(one, found[0], expected[0]))),
        "factors": max(jax.tree.leaves(jax.tree.map(one, factors(found), factors(expected)))),
    }


def page(path):
    """The Python of a page, run here, where there are devices."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        result = doctest.testfile(path, module_relative=False)
    return {"attempted": result.attempted, "failed": result.failed, "output": output.getvalue()}


def main(asked, address=None, processes="1", number="0"):
    asked = json.loads(asked)
    jax.config.update("jax_enable_x64", True)
    if address:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(processes), int(number))
    report = {"devices": jax.device_count(), "processes": jax.process_count()}
    ways, dtypes, path = asked.pop("ways"), asked.pop("dtypes"), asked.pop("page", None)
    order = np.random.default_rng(1).permutation(asked["batch"])
    for dtype in dtypes:
        training = Training(jax.devices(), dtype=dtype, **asked)
        alone = training.one_device()
        expected = alone.pop("result")
        moved = errors(training.start, expected)["params"]
        report[dtype] = {"one_device": alone | {"moved": moved}}
        for way in ways:
            outcome = (
                training.one_device(order) if way == "other_order" else getattr(training, way)()
            )
            report[dtype][way] = outcome | errors(outcome.pop("result"), expected)
    if path:
        report["page"] = page(path)
    print(json.dumps(report), flush=True)


main(*sys.argv[1:])
