"""What ``docs/reliability.md`` says of mistakes made on purpose is what came of them."""

import importlib
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_table_is_that_of_the_results(monkeypatch):
    """All that are defined were tried as they are defined now, and who survives has a reason."""
    monkeypatch.syspath_prepend(ROOT)
    runner = importlib.import_module("benchmarks.mutants.__main__")
    results = json.loads((ROOT / "benchmarks/results/mutants.json").read_text())
    assert list(results) == [mutant.key for mutant in runner.MUTANTS]
    for mutant in runner.MUTANTS:
        assert results[mutant.key]["reason"] == mutant.reason
        assert not runner.is_open(results[mutant.key]), mutant
    page = (ROOT / "docs/reliability.md").read_text()
    assert runner.table(results) in page
