"""One training in several ways that must give the same: on one device, on many, in parts.

* `training`: the problem, and the steps in each of the ways.
* `collectives`: what a compiled program sends between devices.
* `__main__`: a process with devices of its own, which compares the ways and prints JSON.
* `processes`: starts such processes, one, or two that talk to each other.
"""
