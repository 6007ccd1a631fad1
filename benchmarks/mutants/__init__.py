"""Mistakes made on purpose in the package's mathematics, each of which a fast test has to find."""
