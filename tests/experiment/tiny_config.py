"""A config file for the tiny problem, which stands in the place of CURVES."""

import tiny


def get_config():
    return tiny.config()
