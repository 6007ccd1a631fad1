"""The pages of docs/: their Python runs, their tables of defaults are true, the API is complete."""

import doctest
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import kfqn_optax as kfqn

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# These run in tests of their own: on eight devices, and beside the table of wrappers.
ELSEWHERE = {"devices.md": "test_devices.py", "optax.md": "test_contract_page.py"}
WITH_CODE = [page for page in PAGES if ">>> " in page.read_text()]


def blocks(text):
    """The fenced blocks of Python of a page."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page", [p for p in WITH_CODE if p.name not in ELSEWHERE], ids=lambda page: page.name
)
def test_the_code_of_a_page_runs(page):
    result = doctest.testfile(
        str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert result.attempted > 0
    assert result.failed == 0


def test_pages_that_run_elsewhere_are_read_there():
    assert {page.name for page in WITH_CODE} > ELSEWHERE.keys()
    for page, test in ELSEWHERE.items():
        assert f'"docs" / "{page}"' in (ROOT / "tests" / test).read_text()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_every_block_of_python_is_an_example_that_runs(page):
    """Code in a fence without prompts would not be run by anything."""
    assert [block for block in blocks(page.read_text()) if not block.startswith(">>> ")] == []


def test_there_are_blocks():
    assert sum(len(blocks(page.read_text())) for page in PAGES) > 20


def test_defaults_in_the_table_of_arguments():
    """Each argument of each method is in the table, with its default."""
    text = (DOCS / "settings.md").read_text()
    table = text[text.index("| argument |") :]
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \| (\S+) \|", table, re.MULTILINE)
    for i, method in enumerate((kfqn.kbfgs, kfqn.kbfgs_l, kfqn.kfqn), start=1):
        told = {row[0]: row[i] for row in rows if row[i] != "-"}
        parameters = inspect.signature(method).parameters
        expected = {
            name: repr(parameter.default)
            for name, parameter in parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        assert told == expected, method.__name__


def test_every_public_name_is_on_one_page_of_the_api():
    """By a name that is not a module's too: of `health`, the module would be described."""
    entries = [
        entry
        for page in sorted((DOCS / "api").glob("*.md"))
        for entry in re.findall(r"^::: kfqn_optax\.([\w.]+)$", page.read_text(), re.MULTILINE)
    ]
    assert sorted(entry.rpartition(".")[2] for entry in entries) == sorted(kfqn.__all__)
    assert [e for e in entries if (ROOT / "kfqn_optax" / f"{e}.py").exists()] == []


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{version}}}" in (DOCS / "citing.md").read_text()
    assert f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()
