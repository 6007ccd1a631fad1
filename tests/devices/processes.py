"""Starts processes with devices of their own and returns what they print."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


def run(asked, devices=8, processes=1, seconds=300, quick=True):
    """The report of one process, or the reports of several that share a mesh.

    ``quick``: compiled quickly, to slow programs.
    """
    tests = Path(__file__).parents[1]
    more = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
        "JAX_PLATFORMS": "cpu",
        # Threads for XLA. With fewer than devices and what runs beside them, as on a machine of two
        # cores, all were seen to wait in a collective for a device that had none.
        "NPROC": "32",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(quick)),
    }
    command = [sys.executable, "-P", "-m", "devices", json.dumps(asked)]
    started = []
    try:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        for number in range(processes):
            network = [address, str(processes), str(number)] if processes > 1 else []
            started.append(
                subprocess.Popen(
                    [*command, *network],
                    env=os.environ | more,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        reports = []
        for process in started:
            output, errors = process.communicate(timeout=seconds)
            assert process.returncode == 0, errors[-3000:]
            reports.append(json.loads(output.splitlines()[-1]))
    finally:
        for process in started:
            process.kill()
    return reports if processes > 1 else reports[0]
