"""Lies here so that pytest puts this directory on the path: tests import `factories` by its name."""
