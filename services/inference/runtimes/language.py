"""Language models run by torch as they are: prompts in pieces, then many texts together in slots."""

import logging
from typing import cast

import torch
from torch import Tensor, nn

from services.inference.runtimes.eager import check_finite
from tandem.models.language_models import LanguageModel, ModelState
from tandem.models.slots import ALONE, Blocks, Slots, make_slots
from tandem.models.stepping import NetworkSteps
from tandem.models.transformer import TransformerLanguageModel

# Texts that are stepped together; more wait for one to end. A step of twice as many takes twice as long, nearly.
MAX_TEXTS = 64
# What the memories of a model's texts may take; a Transformer with a long window gets fewer slots.
_SLOT_BYTES = 512 * 2**20
# On a CPU, the fewest rows that are tried to agree with more; on a GPU, all rows are always computed, in one shape.
_CPU_MULTIPLES = (4, 8, 16)
_GPU_ROWS = 32
# Tokens before the texts that keep another company in the trial: more than one window of a Transformer's keys.
_LONG = 70

log = logging.getLogger("tandem.inference.runtimes")


class EagerLanguageModel(NetworkSteps):
    """A language model in eval mode on `device`."""

    name = "eager"
    dtype = "float32"

    def __init__(self, network: LanguageModel, device: torch.device) -> None:
        super().__init__(network, device)
        self._module = cast(nn.Module, network)
        self._blocks = ALONE
        self._vocabulary_size = network.embedding.num_embeddings
        self._state_bytes = sum(part.numel() * part.element_size() for part in self.read([0], None))

    @property
    def blocks(self) -> Blocks:
        """How texts are stepped together; of a model whose rows are not independent, ALONE."""
        return self._blocks

    @torch.inference_mode()
    def read(self, token_ids: list[int], state: ModelState | None) -> ModelState:
        """Return the state after `token_ids` (one or more); what the network says of them is not asked."""
        _, after = self._network.encode(torch.tensor([token_ids], device=self._device), state)
        return after

    def make_slots(self) -> Slots:
        """Return slots for as many texts as are stepped together."""
        return self._slots(self._capacity(), self._blocks)

    def warm(self) -> None:
        """Run once, and `find_blocks`; raise CheckpointCorrupt if an answer is not finite."""
        super().warm()
        self.find_blocks()

    def find_blocks(self) -> None:
        """Find how texts can be stepped together without their answers depending on it."""
        if self._device.type == "cpu":
            tried = [Blocks(each, MAX_TEXTS, turned) for turned in (True, False) for each in _CPU_MULTIPLES]
        else:
            tried = [Blocks(_GPU_ROWS, _GPU_ROWS)]
        self._blocks = next((blocks for blocks in tried if self._is_independent(blocks)), ALONE)
        if self._blocks == ALONE:
            log.info("texts of this model are stepped one by one: in company its answers differ in the last bits")

    def _slots(self, capacity: int, blocks: Blocks) -> Slots:
        return make_slots(self._module, self._device, capacity, blocks)

    def _capacity(self) -> int:
        """Return for how many texts there is room: of a Transformer, whose rows hold its whole window, maybe few."""
        num_bytes = self._state_bytes
        if isinstance(self._module, TransformerLanguageModel):
            num_bytes *= self._module.context_length + 1
        return max(1, min(MAX_TEXTS, _SLOT_BYTES // num_bytes))

    def _is_independent(self, blocks: Blocks) -> bool:
        """Return whether a text's logits are the same bits alone and among others, in any row, as it goes on."""
        capacity = self._capacity()
        alone = self._follow(self._slots(1, blocks), 1)
        slots = self._slots(capacity, blocks)
        counts = [count for count in (2, 7, 18, capacity) if count <= capacity]
        return all(bool((self._follow(slots, count) == alone).all()) for count in counts)

    def _follow(self, slots: Slots, count: int) -> Tensor:
        """Return the logits (2 steps, 1 to 3 rows, V) of one text that is in three of `count` rows; the others have
        read more."""
        size = self._vocabulary_size
        long = self.read([each % size for each in range(_LONG)], None)
        rows = sorted({0, count // 2, count - 1})
        for each in range(count):
            slots.put(None if each in rows else long)
        logits = [
            slots.step([token_id if each in rows else each % size for each in range(count)])[rows]
            for token_id in (0, size - 1)
        ]
        for row in reversed(range(count)):
            slots.remove(row)
        check_finite(logits[-1])
        return torch.stack(logits)
