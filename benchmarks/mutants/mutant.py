"""What a mutant is, and what became of it."""

import dataclasses
import hashlib


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        file: in ``kfqn_optax/``, without the ending.
        old: text that occurs in it exactly once.
        new: what it is replaced by.
        tests: arguments of pytest that name the tests which should find it, the quickest first.
        reason: of one that survives, why no test finds it; empty for all others.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    reason: str = ""

    @property
    def path(self) -> str:
        """The file's path from the root of the project."""
        return f"kfqn_optax/{self.file}.py"

    @property
    def key(self) -> str:
        """A short name that changes with what is mutated and with the tests."""
        text = "\0".join((self.file, self.old, self.new, *self.tests))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def in_file(file: str, *tests: str):
    """A function that makes mutants of one file, for the same tests unless it is given others."""

    def make(old: str, new: str, *others: str, reason: str = "") -> Mutant:
        return Mutant(file, old, new, others or tests, reason)

    return make
