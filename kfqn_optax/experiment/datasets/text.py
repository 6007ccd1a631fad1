"""The text for the character transformer: what Python's own ``help`` says about the language.

Every Python carries its topics in `pydoc_data.topics`, some 460,000 characters of documentation,
so nothing is fetched. The text differs a little between versions of Python; its SHA-256 goes into
a run's ``run.json``, and only runs with the same one compare exactly.
"""

import hashlib
from typing import Any, NamedTuple

import numpy as np

from kfqn_optax.experiment.datasets.load import Labelled, check_count

NAME = "char_transformer"
CONTEXT = 64  # characters of a window
TRAIN_SHARE = 0.9
# Newline, the printable ASCII characters, and one that stands for all others.
ALPHABET = "\n" + "".join(map(chr, range(32, 127))) + "\N{REPLACEMENT CHARACTER}"


class Text(NamedTuple):
    """Windows of a text, each with the character that follows at every place.

    Attributes:
        name: the problem.
        train: int32 [windows, CONTEXT] both, inputs and labels, as indices into `ALPHABET`.
        test: the same.
        characters: the length of the whole text.
        sha256: of the whole text in UTF-8.
    """

    name: str
    train: Labelled
    test: Labelled
    characters: int
    sha256: str

    @property
    def contents(self) -> str:
        """What the examples are, for people."""
        return f"windows of {CONTEXT} characters"

    @property
    def facts(self) -> dict[str, Any]:
        """What should be known of the data later."""
        return {
            "context": CONTEXT,
            "text_characters": self.characters,
            "text_sha256": self.sha256,
        }


def read() -> str:
    """The topics of the Python that runs this, one after the other in the order of their names."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FileNotFoundError(
            f"This Python has no pydoc_data.topics ({error}), which is the text of '{NAME}'; "
            "use a Python with its whole standard library."
        ) from error
    return "".join(topics[name] for name in sorted(topics))


def encode(text: str) -> np.ndarray:
    """The indices of a text's characters in `ALPHABET`.

    >>> encode("A \u00e9")
    array([34,  1, 96], dtype=int32)

    Args:
        text: any text.

    Returns:
        int32 [characters].
    """
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int32)
    printable = (codes >= 32) & (codes < 127)
    others = np.where(codes == ord("\n"), 0, len(ALPHABET) - 1)
    return np.where(printable, codes - 31, others).astype(np.int32)


def windows(codes: np.ndarray) -> Labelled:
    """Cuts a text into windows that do not overlap; what is left at the end is dropped.

    Args:
        codes: [characters].

    Returns:
        Inputs and, one place further, labels: every character but the first is a label once.
    """
    count = (len(codes) - 1) // CONTEXT
    inputs, labels = (
        np.ascontiguousarray(codes[start : start + count * CONTEXT].reshape(count, CONTEXT))
        for start in (0, 1)
    )
    return Labelled(inputs, labels)


def load(train_examples: int | None = None) -> Text:
    """The text's first 90% as training windows, the rest as test windows.

    Args:
        train_examples: how many training windows to return, the first ones. None: all.

    Returns:
        The windows.

    Raises:
        ValueError: more windows are asked for than there are.
        FileNotFoundError: this Python has no such text.
    """
    text = read()
    codes = encode(text)
    cut = int(TRAIN_SHARE * len(codes))
    train, test = windows(codes[:cut]), windows(codes[cut:])
    check_count(NAME, train_examples, len(train.inputs), "training windows")
    return Text(
        NAME,
        Labelled(train.inputs[:train_examples], train.labels[:train_examples]),
        test,
        len(text),
        hashlib.sha256(text.encode()).hexdigest(),
    )
