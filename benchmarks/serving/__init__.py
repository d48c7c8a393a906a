"""What the inference server reaches of what its machine can do: see `benchmarks.serving.__main__`."""
