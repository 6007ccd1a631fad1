"""SIGKILL at random moments: a run that is started again each time ends with the same bits.

The processes are real and die for good. In `make test` they are forked from a process that has
imported everything, and train with Adam, so that twenty fit into half a minute; with the marker
`slow`, each is an interpreter of its own that trains with K-BFGS. A quarter of the kills comes
somewhere between a process's start and its end, the others in the 1.5 s after its first step,
most of which goes into writing checkpoints, one a step.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import event_files
import pytest
import states

KILLS = 20
EPOCHS = 100  # of 4 steps
SELDOM = "checkpoint_every=100000"
COMPILED = "compiled in"  # what is said just before the first step
SCRIPT = Path(__file__).with_name("tiny_train.py")


class _Interpreters:
    """Each process is a new interpreter."""

    def __init__(self, folder):
        del folder

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def start(self, log, *arguments):
        """Begins a run and returns the number of its process, and a function that waits for it."""
        with open(log, "a") as file:
            command = [sys.executable, str(SCRIPT), *arguments]
            process = subprocess.Popen(command, stdout=file, stderr=file)
        return process.pid, process.wait


class _Forks:
    """Each process is forked from one that has imported everything, and finds programs compiled."""

    def __init__(self, folder):
        self._env = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def __enter__(self):
        command = [sys.executable, "-W", "ignore", str(SCRIPT), "--serve"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = subprocess.Popen(command, text=True, env=self._env, **pipes)
        return self

    def __exit__(self, *_):
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def start(self, log, *arguments):
        self._server.stdin.write(json.dumps([str(log), *arguments]) + "\n")
        self._server.stdin.flush()
        return self._number(), self._number

    def _number(self):
        return int(self._server.stdout.readline())


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (_Forks, ["optimizer=adam", "learning_rate=0.03"]),
        pytest.param(_Interpreters, ["optimizer=kbfgs"], marks=pytest.mark.slow),
    ],
    ids=["forks-adam", "interpreters-kbfgs"],
)
def test_killed_at_random_moments(tmp_path, processes, overrides):
    overrides = [*overrides, f"epochs={EPOCHS}"]
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    moments, kills = random.Random(2006), 0
    with processes(tmp_path) as server:
        for name in ("first", "whole"):  # the first waits for imports and compilers
            begun = time.monotonic()
            _, wait = server.start(log, str(tmp_path / name), *overrides, SELDOM)
            assert wait() == 0, log.read_text()
            life = time.monotonic() - begun
        for number in range(KILLS):
            starts = log.read_text().count(COMPILED)
            pid, wait = server.start(log, str(broken), *overrides, "checkpoint_every=1")
            if number % 4 == 0:
                time.sleep(moments.uniform(0.0, life))
            else:
                _wait_for(log, starts + 1)
                time.sleep(moments.uniform(0.0, 1.5))
            os.kill(pid, signal.SIGKILL)
            kills += wait() == -signal.SIGKILL
        _, wait = server.start(log, str(broken), *overrides, SELDOM)
        assert wait() == 0, log.read_text()

    told = log.read_text()
    resumed = [int(step) for step in re.findall(r"going on from step (\d+)", told)]
    unfinished = told.count("was not finished")
    print(f"{kills} kills; went on from steps {resumed}; {unfinished} unfinished checkpoints")
    assert kills == KILLS, "the run is too short for so many kills"
    assert len(set(resumed)) >= KILLS // 4
    assert "refused" not in told
    _assert_same_run(whole, broken)


def _wait_for(log, starts):
    """Waits until so many processes have begun to take steps."""
    end = time.monotonic() + 120
    while log.read_text().count(COMPILED) < starts:
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.01)


def _assert_same_run(whole, broken):
    """Same metrics but for the clock, same events, same figure, same state bit by bit."""
    expected, found = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, broken)
    )
    seconds = [line.pop("seconds") for line in found]
    assert seconds == sorted(seconds)
    for line in expected:
        del line["seconds"]
    assert found == expected
    expected, found = event_files.shown(whole), event_files.shown(broken)
    assert found.pop("seconds").keys() == expected.pop("seconds").keys()
    assert found == expected
    assert (broken / "losses.png").read_text() == str(EPOCHS + 1)
    states.assert_same(states.last(whole), states.last(broken))
