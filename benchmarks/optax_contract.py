"""The Optax contract as a table: ours and optimizers of Optax among Optax's transformations.

    python benchmarks/optax_contract.py [--write docs/optax.md] [kbfgs adam ...]

Runs every check of ``tests/contract`` for each optimizer (some minutes for all of them) and
prints a Markdown table, with the reasons below it. ``--write`` puts it between the two marker
comments of a page.
"""

import argparse
import re
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
jax.config.update("jax_enable_x64", True)  # before the batches are made
import contract  # noqa: E402

BEGIN, END = "<!-- contract: begin -->", "<!-- contract: end -->"


def outcomes(names: list[str]) -> dict[str, dict[str, str]]:
    """What became of each check for each optimizer, by title and name."""
    everybody = contract.OURS | contract.KIN | contract.PEERS
    on_devices = contract.on_devices(names, contract.ON_DEVICES)
    table = {}
    for title, check in contract.CHECKS.items():
        if check.__name__ in on_devices:
            table[title] = on_devices[check.__name__]
        else:
            table[title] = {name: contract.outcome(check, everybody[name]) for name in names}
        print(title, table[title], file=sys.stderr, flush=True)
    return table


def markdown(table: dict[str, dict[str, str]], names: list[str]) -> str:
    """The table, and below it the reasons, each once."""
    reasons: list[str] = []

    def cell(text: str) -> str:
        verdict, _, reason = text.partition(": ")
        if not reason:
            return verdict
        reason = _short(reason)
        if reason not in reasons:
            reasons.append(reason)
        return f"{verdict} ({reasons.index(reason) + 1})"

    rows = [[title, *(cell(line[name]) for name in names)] for title, line in table.items()]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))]
    return "\n".join(lines)


def _short(reason: str, most: int = 200) -> str:
    """The first sentence of a message, in at most so many characters."""
    sentence = re.split(r"(?<=[a-z)`\]])\. |: pass ", reason)[0].rstrip(".")
    return sentence if len(sentence) <= most else sentence[:most].rsplit(" ", 1)[0] + " ..."


def write(page: Path, text: str) -> None:
    """Puts the text between the two markers of the page."""
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", default=[*contract.OURS, *contract.KIN, *contract.PEERS]
    )
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    options = parser.parse_args()
    text = markdown(outcomes(options.names), options.names)
    print(text)
    if options.write:
        write(options.write, text)


if __name__ == "__main__":
    main()
