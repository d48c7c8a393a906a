"""A language model that follows a script, in the place of a runtime: the next word is always the token after it."""

import threading
from typing import cast

import torch
from factories import vocabulary
from torch import Tensor

from tandem.models.language_models import ModelState
from tandem.models.slots import Kept, Slots

WORDS = vocabulary()


class Rows:
    """Slots that keep nothing but how many texts they have."""

    def __init__(self, capacity: int, model: "Model") -> None:
        self.capacity, self._model = capacity, model
        self.rows: list[Kept] = []
        self.largest = 0
        self.broken_at: int | None = None

    @property
    def num_texts(self) -> int:
        return len(self.rows)

    @property
    def is_full(self) -> bool:
        return len(self.rows) == self.capacity

    def put(self, state: ModelState | None) -> None:
        self.put_back(state or ())

    def put_back(self, kept: Kept) -> None:
        assert not self.is_full
        self.rows.append(kept)

    def take(self, row: int) -> Kept:
        kept = self.rows[row]
        self.remove(row)
        return kept

    def remove(self, row: int) -> None:
        self.rows[row] = self.rows[-1]
        self.rows.pop()

    def step(self, token_ids: list[int]) -> Tensor:
        assert len(token_ids) == len(self.rows)
        model = self._model
        model.num_steps += 1
        if model.fails_with is not None:
            raise model.fails_with
        if model.gate is not None:
            model.at_gate.set()
            assert model.gate.wait(60)
        self.largest = max(self.largest, len(token_ids))
        logits = torch.full((len(token_ids), len(WORDS)), -20.0)
        for row, token_id in enumerate(token_ids):
            logits[row, 2 + token_id % (len(WORDS) - 2)] = torch.nan if token_id == self.broken_at else 20.0
        return logits


class Model:
    """A runtime with such rows; it notes the pieces that it read. With a `gate` set, each step waits for it."""

    name, dtype = "scripted", "float32"

    def __init__(self, capacity: int = 4) -> None:
        self.slots = Rows(capacity, self)
        self.pieces: list[int] = []
        self.num_steps = 0
        self.fails_with: Exception | None = None
        self.gate: threading.Event | None = None
        self.at_gate = threading.Event()

    def read(self, token_ids: list[int], state: ModelState | None) -> ModelState:
        self.pieces.append(len(token_ids))
        return (torch.tensor(len(token_ids)),)

    def make_slots(self) -> Slots:
        self.slots.rows.clear()
        return cast(Slots, self.slots)

    def warm(self) -> None: ...
