"""Tandem: train, compare, promote and serve image classifiers and word-level language models."""

__version__ = "0.1.0"
