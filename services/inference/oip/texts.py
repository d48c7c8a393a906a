"""A language model behind the protocol: a prompt and parameters in, text out, whole or as it is drawn."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from services.inference.context import Context
from services.inference.engine import Engine
from services.inference.generate import generate
from services.inference.loading import ServedLanguageModel
from services.inference.oip.answers import Value, respond, timing_parameters
from services.inference.oip.parameters import Parameters, Terms, read_terms
from services.inference.oip.tensors import Output, from_elements, read_inputs, read_outputs
from tandem.errors import InvalidRequest
from tandem.generation.prompts import pick_seed
from tandem.models.sampling import Sampling
from tandem.wire.limits import MAX_PROMPT_BYTES
from tandem.wire.oip import grpc_service_pb2 as pb
from tandem.wire.results import GenerationSummary, TextPiece

PROMPT, TEXT = "prompt", "text"
# Marks the last answer to a request; public clients know it by this name.
FINAL = "triton_final_response"


async def infer(
    engine: Engine, model: ServedLanguageModel, reference: str, request: pb.ModelInferRequest, context: Context
) -> pb.ModelInferResponse:
    """Return the whole text in one answer; raise what `generate` does."""
    texts: list[str] = []
    summary: dict[str, Value] = {}
    async with aclosing(_pieces(engine, reference, request, context)) as pieces:
        async for piece in pieces:
            if isinstance(piece, TextPiece):
                texts.append(piece.text)
            else:
                summary = _summary(model, piece)
    return respond(request, model, [_text("".join(texts))], summary)


async def stream(
    engine: Engine, model: ServedLanguageModel, reference: str, request: pb.ModelInferRequest, context: Context
) -> AsyncGenerator[pb.ModelInferResponse, None]:
    """Yield the text in pieces, as it is drawn; the last answer has no text, and the summary as parameters."""
    async with aclosing(_pieces(engine, reference, request, context)) as pieces:
        async for piece in pieces:
            if isinstance(piece, TextPiece):
                yield respond(request, model, [_text(piece.text)], {FINAL: False})
            else:
                yield respond(request, model, [_text("")], {FINAL: True, **_summary(model, piece)})


def _pieces(
    engine: Engine, reference: str, request: pb.ModelInferRequest, context: Context
) -> AsyncGenerator[TextPiece | GenerationSummary, None]:
    parameters = Parameters(request.parameters)
    terms: Terms = read_terms(parameters, context)
    max_words, sampling = parameters.integer("max_words") or 0, _sampling(parameters)
    parameters.finish()
    if any(read_outputs(request, (TEXT,)).values()):
        raise InvalidRequest("outputs.text: classification is for classifiers", field="outputs.text")
    return generate(engine, reference, _prompt(request), max_words, sampling, terms.deadline, terms.priority)


def _prompt(request: pb.ModelInferRequest) -> str | None:
    inputs = read_inputs(request, (PROMPT,))
    if PROMPT not in inputs:
        return None
    tensor = inputs[PROMPT]
    tensor.check("BYTES", (1,), (1, 1))
    (data,) = tensor.elements()
    if len(data) > MAX_PROMPT_BYTES:
        raise tensor.wrong(f"has {len(data):,} bytes; the limit is {MAX_PROMPT_BYTES:,}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise tensor.wrong(f"is not UTF-8 text, at byte {error.start}") from None


def _sampling(parameters: Parameters) -> Sampling:
    temperature, penalty = parameters.number("temperature"), parameters.number("repetition_penalty")
    seed = parameters.integer("seed")
    return Sampling(
        temperature=1.0 if temperature is None else temperature,
        top_k=parameters.integer("top_k") or 0,
        top_p=parameters.number("top_p") or 0.0,
        seed=pick_seed() if seed is None else seed,
        allow_unknown=parameters.flag("allow_unknown"),
        min_p=parameters.number("min_p") or 0.0,
        repetition_penalty=1.0 if penalty is None else penalty,
        stop=tuple(parameters.text("stop").split()),
        random_start=parameters.flag("random_start"),
        logit_bias=tuple(sorted(parameters.numbers("logit_bias").items())),
    )


def _text(text: str) -> Output:
    return from_elements(TEXT, (1,), [text.encode()])


def _summary(model: ServedLanguageModel, summary: GenerationSummary) -> dict[str, Value]:
    return {
        "seed": summary.seed,
        "finish_reason": summary.finish_reason,
        "num_prompt_tokens": summary.num_prompt_tokens,
        "num_words": summary.num_words,
        "mean_negative_log_probability": summary.mean_negative_log_probability,
        **timing_parameters(model, summary.timings),
    }
