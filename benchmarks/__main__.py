"""`python -m benchmarks [NAME…]`: run the benchmarks and print their tables."""

import importlib
import sys

NAMES = ("startup", "classification", "language_models", "generation", "compat", "jobs", "runtimes")


def main() -> None:
    """Run the named benchmarks, or all."""
    for name in sys.argv[1:] or NAMES:
        print(f"\n## {name}\n")
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
