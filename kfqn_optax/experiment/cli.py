"""The commands `kfqn-train` and `kfqn-compare`.

    kfqn-train --config configs/curves.py --workdir runs/first --config.damping=0.1
    kfqn-train --config configs/curves.py --workdir runs/first --config.damping=0.1  # goes on
    kfqn-compare runs/first runs/second --output compare.png

What the caller can mend is one sentence on standard error and exit status 1 (2 for a command line
that cannot be read); a run that a signal stopped has 128 and the signal's number, 143 for SIGTERM
and 130 for Ctrl-C; anything else is a fault of the program and keeps its traceback.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from kfqn_optax.experiment import plots
from kfqn_optax.experiment import train as training
from kfqn_optax.experiment.config import KEYS, ConfigError, check, unknown_key
from kfqn_optax.experiment.losses import NonFiniteLoss
from kfqn_optax.experiment.stop import Stopped
from kfqn_optax.experiment.workdir import RunError, continues, read_run


class _UsageError(Exception):
    """A command line that cannot be read."""


def train(argv: Sequence[str] | None = None) -> int:
    """Trains as a config file and the overrides after it say.

    Args:
        argv: the command line, the program's name first; `sys.argv` if left out.

    Returns:
        The exit status.
    """
    return _in_a_sentence("kfqn-train", _train, list(sys.argv if argv is None else argv))


def compare(argv: Sequence[str] | None = None) -> int:
    """Draws runs of one problem into one figure and prints a table of them.

    Args:
        argv: the command line, the program's name first; `sys.argv` if left out.

    Returns:
        The exit status.
    """
    return _in_a_sentence("kfqn-compare", _compare, list(sys.argv if argv is None else argv))


def _in_a_sentence(program: str, run: Callable[[list[str]], None], argv: list[str]) -> int:
    try:
        run(argv)
    except _UsageError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except (ConfigError, RunError, NonFiniteLoss, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except Stopped as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"{program}: interrupted; what is written is kept.", file=sys.stderr)
        return 130
    return 0


def _train(argv: list[str]) -> None:
    if {"-h", "-help", "--help"} & set(argv[1:]):
        print(_train_help())
        return
    config, workdir = read_command_line(argv)
    check(config)
    # Before the data are loaded, which may take a while; `train` does both again.
    continues(workdir, config)
    try:
        dataset = training.load_dataset(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    training.train(config, workdir, dataset)
    print(f"see {Path(workdir) / 'metrics.jsonl'} and {Path(workdir) / 'losses.png'}")


def read_command_line(argv: list[str]) -> tuple[ConfigDict, str]:
    """Returns the config, overrides applied, and the workdir that a command line names."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "the config file", flag_values=values, sys_argv=argv
    )
    flags.DEFINE_string("workdir", None, "the folder of the run", flag_values=values)
    for argument in argv[1:]:
        override = re.match(r"--?config\.([^=]+)", argument)
        if override and override[1] not in KEYS:
            raise unknown_key(override[1])
    _refuse_missing_file(argv)
    try:
        rest = values(argv)[1:]
    except (flags.Error, SyntaxError) as error:
        # An error inside the config file carries its traceback; the last line says what it was.
        last = str(error).strip().splitlines()[-1]
        refused = last.removeprefix(f"{ConfigError.__module__}.{ConfigError.__name__}: ")
        raise (_UsageError(last) if refused == last else ConfigError(refused)) from error
    for name in ("config", "workdir"):
        if values[name].value is None:
            raise _UsageError(f"--{name} is missing; kfqn-train --help shows how to call it.")
    if rest:
        raise _UsageError(f"{rest[0]!r} is not an option; kfqn-train --help shows how to call it.")
    return values.config, values.workdir


def _refuse_missing_file(argv: list[str]) -> None:
    """Raises `ConfigError` if the config file does not exist; absl would tell it in four lines."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        given = re.fullmatch(r"--?config(?:=(.*))?", argument)
        path = (given[1] or following).split(":", 1)[0] if given else None
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"there is no config file {path!r}; see the folder configs/.")


def _train_help() -> str:
    lines = [
        "usage: kfqn-train --config FILE --workdir DIR [--config.KEY=VALUE ...]",
        "",
        "Trains a network as a config file says, or goes on with the run that DIR holds, if it was",
        "broken off and has the same config. The keys, with their defaults:",
        "",
    ]
    for name, key in KEYS.items():
        default = "unset" if isinstance(key.default, type) else key.default
        lines.append(f"  {name:<22} {default!s:<8} {key.meaning}; must be {key.rule}")
    return "\n".join(lines)


def _compare(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "kfqn-compare", description="Draws runs of one problem into one figure, prints a table."
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="the workdir of a run")
    parser.add_argument("--output", default="compare.png", help="the figure (default: %(default)s)")
    options = parser.parse_args(argv[1:])
    output = Path(options.output)
    if output.suffix != ".png":
        raise _UsageError(f"--output is {options.output!r}; give a name that ends in .png.")

    runs = [read_run(folder) for folder in options.folders]
    for run in runs:
        if run.cut_off:
            print(
                f"kfqn-compare: the last line of {run.folder / 'metrics.jsonl'} is incomplete "
                "(the run was cut off while writing, or is writing now); it is left out.",
                file=sys.stderr,
            )
    first = runs[0]
    for run in runs[1:]:
        if run.config["problem"] != first.config["problem"]:
            raise RunError(
                f"{first.folder} is a run of problem {first.config['problem']!r} and {run.folder} "
                f"one of {run.config['problem']!r}; losses of different problems do not compare."
            )
    print(plots.table(runs), end="")
    output.parent.mkdir(parents=True, exist_ok=True)
    plots.save(plots.compare_figure(runs), output)
    print(f"figure: {output}")
