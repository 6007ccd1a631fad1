"""TensorBoard event files, read record by record: length, checksum, data, checksum."""

import struct

from tensorboardX.proto.event_pb2 import Event, SessionLog


def shown(workdir):
    """What TensorBoard shows of a run, {tag: {step: value}}: a restart hides what is after it.

    Nothing may be written twice but what a restart has hidden, and a record that a kill has cut
    off ends its file.
    """
    scalars = {}
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while len(content) >= 12:
            (length,) = struct.unpack("<Q", content[:8])
            if len(content) < 16 + length:
                break
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == SessionLog.START:
                scalars = {
                    tag: {step: value for step, value in values.items() if step < event.step}
                    for tag, values in scalars.items()
                }
            for value in event.summary.value:
                steps = scalars.setdefault(value.tag, {})
                assert event.step not in steps, (path.name, value.tag, event.step)
                steps[event.step] = value.simple_value
    return scalars
