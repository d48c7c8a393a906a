"""Benchmarks: each file carries its claim; RESULTS.md has the figures."""
