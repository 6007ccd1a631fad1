"""Many devices: eight in one process, two in each of two; every way gives what one device gives.

The ways are in `devices`; they run in processes of their own, all eight-device ones in the same.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from devices.collectives import collectives
from devices.processes import run
from jax.sharding import AxisType
from steps import equal

import kfqn_optax as kfqn
from kfqn_optax.sharding import Shards

PAGE = Path(__file__).parents[1] / "docs" / "devices.md"
WIDTHS, BATCH, STEPS = [12, 40, 7], 32, 50
# What a step must send: the gradient; of each layer A, mean input, mean cotangent, noise, rows.
SIDES = [(13, 40), (41, 7)]


@pytest.fixture(scope="module")
def eight():
    return run(
        {
            "ways": ["jit", "spread"],
            "widths": WIDTHS,
            "batch": BATCH,
            "steps": STEPS,
            "dtypes": ["float64"],
            "page": str(PAGE),
        }
    )


@pytest.fixture(scope="module")
def two_processes():
    return run(
        {
            "ways": ["shard_map"],
            "widths": WIDTHS,
            "batch": BATCH,
            "steps": STEPS,
            "dtypes": ["float64"],
        },
        devices=2,
        processes=2,
    )


def assert_same(report, way):
    assert report["one_device"]["moved"] > 0.1  # the steps lead somewhere
    assert report[way]["params"] < 1e-12
    assert report[way]["factors"] < 1e-12


@pytest.mark.parametrize("way", ["jit", "spread"])
def test_eight_devices_are_one(eight, way):
    assert eight["devices"] == 8
    assert_same(eight["float64"], way)


def test_two_processes_are_one_device(two_processes):
    for report in two_processes:
        assert (report["devices"], report["processes"]) == (4, 2)
        assert_same(report["float64"], "shard_map")


@pytest.mark.parametrize("way", ["jit", "shard_map"])
def test_a_step_sends_gradient_and_statistics_and_little_else(eight, two_processes, way):
    """In three all-reduces at most: the second after the probe."""
    report = eight if way == "jit" else two_processes[0]
    sent = report["float64"][way]["collectives"]
    assert set(sent) == {"all-reduce"}
    number, size = sent["all-reduce"]
    assert number <= 3
    gradient = sum(d_in * d_out for d_in, d_out in SIDES)
    moments = sum((d_in - 1) ** 2 for d_in, _ in SIDES)
    vectors = sum(2 * (d_in + d_out) + 8 for d_in, d_out in SIDES)
    assert 8 * (gradient + moments) < size < 8 * (gradient + moments + 2 * vectors)


def test_a_spread_state_is_smaller_on_each_device(eight):
    """Matrices of 1024 entries and more are an eighth; rows filled up from 41 to 48."""
    report = eight["float64"]
    large = 8 * (2 * 41**2 + 40**2)  # H_a and A of the second layer, H_g of the first
    kept = 8 * (2 * 6 * 41 + 5 * 40)
    assert report["jit"]["state_bytes"] == report["one_device"]["state_bytes"]
    assert report["jit"]["state_bytes"] - report["spread"]["state_bytes"] == large - kept


def test_the_page(eight):
    assert eight["page"]["attempted"] > 20
    assert eight["page"]["failed"] == 0, eight["page"]["output"]


# --- without devices ------------------------------------------------------------------------------

MESH = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))


def test_a_state_spread_and_gathered_is_the_state():
    state = {"a": jnp.arange(33.0 * 40).reshape(33, 40), "b": jnp.ones(2000), "c": jnp.ones((3, 3))}
    spread = kfqn.shard_state(state, MESH, "data")
    assert isinstance(spread["a"], Shards)
    assert not isinstance(spread["b"], Shards)
    assert not isinstance(spread["c"], Shards)
    equal(kfqn.whole_state(spread), state)
    equal(kfqn.whole_state(kfqn.shard_state(spread, MESH, "data")), state)
    equal(kfqn.whole_state(state), state)


@pytest.mark.parametrize(
    ("mesh", "axis", "message"),
    [
        (MESH, "model", "the mesh has no axis 'model' to spread a state over; its axes are 'data'"),
        (jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,)), "data",
         "axes of type Auto only, and the mesh has axes of type Explicit"),
    ],
)  # fmt: skip
def test_refused(mesh, axis, message):
    with pytest.raises(ValueError, match=message):
        kfqn.shard_state(jnp.ones(3), mesh, axis)


def test_what_counts_as_sent():
    text = """
      %a = f32[3,4]{1,0} all-reduce(%x), channel_id=1
      %b = (f64[2]{0}, /*index=1*/s32[]) all-reduce(%y, %z)
      %c = f32[8]{0} all-gather-start(%w)
      ROOT %d = f32[8]{0} add(%all-reduce.1, %c)
    """
    assert collectives(text) == {"all-reduce": (2, 48 + 20), "all-gather": (1, 32)}
