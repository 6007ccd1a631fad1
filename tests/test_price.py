"""`benchmarks.price` at small size: every number of its tables is there and follows from others."""

import json
import statistics
import sys

import pytest

pytest.importorskip("benchmarks.price", reason="the benchmarks are not beside the tests")
from benchmarks.price import __main__ as command
from benchmarks.price import candidates, count, device, problems, report

PEAKS = {"flops_per_s": 1e10, "highest_flops_per_s": 5e9, "bytes_per_s": 1e9}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A file of results, after a second run that measured something else."""
    output = tmp_path_factory.mktemp("price") / "price.json"
    arguments = ["--sizes", "width-4", "--rounds", "3", "--output"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "peaks", lambda: PEAKS)
        chosen = ["adam", "kbfgs", "kbfgs, one pass", "fast, every 2nd step"]
        patch.setattr(sys, "argv", ["price", *arguments, str(output), "--candidates", *chosen])
        command.main()
        stages = ["--candidates", "--stages", "kbfgs"]
        patch.setattr(sys, "argv", ["price", *arguments, str(output), *stages])
        command.main()
    return json.loads(output.read_text())


def test_steps(measured):
    rows = measured["steps"]["width-4"]["rows"]
    assert list(rows) == ["plain", "adam", "kbfgs", "kbfgs, one pass", "fast, every 2nd step"]
    plain = statistics.median(rows["plain"]["steps_s"])
    for row in rows.values():
        assert len(row["steps_s"]) == 3
        assert row["ratio"] == pytest.approx(row["median_s"] / plain, rel=0.01)
        assert row["slowest_ratio"] == pytest.approx(max(row["steps_s"]) / plain, rel=0.01)
        assert row["compile_s"] > 0
        assert "queued_ratio" in row  # such a small step is timed in queues too
    weights = 3 * (4 * 4 + 4) * 4
    assert rows["adam"]["state_bytes"] == 2 * weights + 4
    # momentum; A and its inverse, [5, 5] each; H_g, [4, 4]
    factors = 3 * 4 * (2 * 5 * 5 + 4 * 4)
    assert weights + factors < rows["kbfgs"]["state_bytes"] < weights + factors + 1000
    assert rows["kbfgs"]["state_bytes"] == rows["kbfgs, one pass"]["state_bytes"]


def test_stages(measured):
    rows = measured["stages"]["width-4: kbfgs"]["rows"]
    assert tuple(rows) == count.STAGES
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    for row in rows.values():
        of_bytes = row["counted"]["bytes"] / PEAKS["bytes_per_s"]
        of_flops = row["counted"]["flops"] / PEAKS["flops_per_s"]
        assert max(of_bytes, of_flops) <= row["floor_s"] <= max(of_bytes, 2 * of_flops)


def test_tables(measured):
    table = report.table("steps", "width-4", measured["steps"]["width-4"])
    ratio = measured["steps"]["width-4"]["rows"]["kbfgs"]["ratio"]
    assert f"| kbfgs | {ratio:.2f} |" in table


def test_names_that_do_not_exist():
    with pytest.raises(ValueError, match="there is no candidate 'adams'"):
        candidates.choose(["adams"])
    with pytest.raises(ValueError, match="there is no problem 'width'"):
        problems.make("width")
