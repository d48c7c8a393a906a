"""The loss of each token of a split, as a file: what two language models are compared by, token by token.

`token_losses.npy` holds float32 (N - 1,), in nats: element i is the loss of token i + 1 of the split's tokens, given
all before it. The first token is not predicted. Models of one vocabulary on one split (`evaluation.json` beside it has
both fingerprints) give arrays that pair up.
"""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from tandem.errors import InvalidRequest
from tandem.volume import replace_file

LOSSES_FILE = "token_losses.npy"

Losses = np.ndarray[tuple[int], np.dtype[np.float32]]


def write_token_losses(path: Path, losses: "np.ndarray[Any, np.dtype[np.float32]]") -> None:
    """Put losses (N - 1,) at `path`, atomically."""
    data = io.BytesIO()
    np.save(data, losses, allow_pickle=False)
    replace_file(path, data.getvalue())


def read_token_losses(path: Path) -> Losses:
    """Return the losses in the file `path`; raise InvalidRequest if it is no such file."""
    try:
        losses = np.load(path, allow_pickle=False)
        if not isinstance(losses, np.ndarray) or losses.ndim != 1 or losses.dtype != np.float32:
            raise ValueError("it holds no float32 of one dimension")
    except (OSError, ValueError, EOFError) as error:
        raise InvalidRequest(f"{path} is no file of token losses ({error}); 'tandem evaluate' writes one") from error
    return losses


def perplexity(loss: float) -> float:
    """Return exp(loss); of a loss beyond 700 nats, where that would overflow, exp(700), about 1e304."""
    return math.exp(min(loss, 700.0))
