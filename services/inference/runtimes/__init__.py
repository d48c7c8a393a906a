"""How a network is run: a small interface, and one module for each way."""
