"""What is to be generated on this machine. Free of torch."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), ser_json_inf_nan="constants")


class SamplingRequest(_Closed):
    """The fields of `tandem.models.sampling.Sampling`, which checks them."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    min_p: float
    repetition_penalty: float
    stop: tuple[str, ...]
    random_start: bool
    logit_bias: tuple[tuple[str, float], ...] = ()
    num_alternatives: int = 0


class GenerationRequest(_Closed):
    """Which checkpoint writes, on which device, from what, and how.

    `digest` is the SHA-256 of the checkpoint's manifest where the registry knows it; `name` is empty and `version` 0
    for a checkpoint named by its run.
    """

    checkpoint: Path
    digest: str | None
    name: str
    version: int
    run_id: str
    device: str
    prompt: str | None
    max_words: int
    sampling: SamplingRequest
