"""`python -m benchmarks.serving [PART…]`."""

from benchmarks.serving.run import main

main()
