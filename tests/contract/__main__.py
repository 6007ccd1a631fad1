"""The process of `contract.devices.on_devices`: runs some checks, and writes their outcomes."""

import json
import sys
from pathlib import Path

from contract import KIN, OURS, PEERS, devices, outcome

output, checks, *names = sys.argv[1:]
everybody = OURS | KIN | PEERS
outcomes = {
    check: {name: outcome(getattr(devices, check), everybody[name]) for name in names}
    for check in checks.split(",")
}
Path(output).write_text(json.dumps(outcomes))
