"""Measurements; see README.md here. A package so that its parts find each other."""
