"""How long OpenMP's threads spin for each other; to be set before torch is loaded."""

from collections.abc import MutableMapping

_TURNS = "5000"


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Set GOMP_SPINCOUNT in `environment`, unless it or OMP_WAIT_POLICY is set already.

    Training and serving share the cores of one machine, where libgomp's own 300,000 turns are spun in vain. With
    another process on one of 2 cores, a training step of the LSTM took 277 ms, and 133 ms with 5,000 turns; alone, 49
    and 54 ms (100 steps each; passive waiting: 81 and 79 ms). ResNet-18's step is the same with both.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", _TURNS)
