"""What the protocol's clients are told of the server and its models."""

from collections.abc import Sequence

import tandem
from services.inference.batching import MAX_BATCH, MAX_DELAY_S
from services.inference.durations import Total
from services.inference.lanes import Priority
from services.inference.loading import Served, ServedClassifier, version_of
from services.inference.oip.classifiers import IMAGE, LOGITS, PIXELS, PROBABILITIES
from services.inference.oip.texts import PROMPT, TEXT
from services.inference.statistics import ModelStatistics
from tandem.wire.limits import MAX_IMAGES
from tandem.wire.oip import grpc_service_pb2 as pb

# By the names that the protocol's public documents give them.
EXTENSIONS = (
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "schedule_policy",
    "statistics",
)
_TYPES = {"UINT8": pb.TYPE_UINT8, "FP32": pb.TYPE_FP32, "BYTES": pb.TYPE_STRING}

TensorMetadata = pb.ModelMetadataResponse.TensorMetadata


def server_metadata() -> pb.ServerMetadataResponse:
    """Return the server's name, version and extensions."""
    return pb.ServerMetadataResponse(name="tandem", version=tandem.__version__, extensions=EXTENSIONS)


def model_metadata(name: str, served: Served, versions: Sequence[int]) -> pb.ModelMetadataResponse:
    """Return names, datatypes and shapes; `name` is the caller's, for a checkpoint that has none."""
    inputs, outputs = _tensors(served)
    return pb.ModelMetadataResponse(
        name=version_of(served).name or name,
        versions=[str(version) for version in versions],
        platform=_platform(served),
        inputs=inputs,
        outputs=outputs,
        properties=_properties(served),
    )


def model_config(name: str, served: Served) -> pb.ModelConfig:
    """Return the same in the words of a configuration file, and how requests are batched."""
    inputs, outputs = _tensors(served)
    is_classifier = isinstance(served, ServedClassifier)
    # Where there are batches, their dimension is not told.
    first = 1 if is_classifier else 0
    config = pb.ModelConfig(
        name=version_of(served).name or name,
        platform=_platform(served),
        backend="tandem",
        max_batch_size=MAX_IMAGES if is_classifier else 0,
        input=[
            pb.ModelInput(name=each.name, data_type=_TYPES[each.datatype], dims=each.shape[first:], optional=True)
            for each in inputs
        ],
        output=[
            pb.ModelOutput(name=each.name, data_type=_TYPES[each.datatype], dims=each.shape[first:]) for each in outputs
        ],
        parameters={key: pb.ModelParameter(string_value=value) for key, value in _properties(served).items()},
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=not is_classifier),
    )
    if isinstance(served, ServedClassifier) and served.joins:
        config.dynamic_batching.CopyFrom(
            pb.ModelDynamicBatching(
                preferred_batch_size=[MAX_BATCH],
                max_queue_delay_microseconds=round(MAX_DELAY_S * 1e6),
                priority_levels=len(Priority),
                default_priority_level=Priority.NORMAL + 1,
            )
        )
    return config


def model_statistics(served: Served, counts: ModelStatistics) -> pb.ModelStatistics:
    """Return the message of `counts`."""
    version = version_of(served)
    failed = Total(counts.fail.count + counts.cancel.count, counts.fail.ns + counts.cancel.ns)
    return pb.ModelStatistics(
        name=version.name or served.located.label,
        version=str(version.version) if version.version else "",
        last_inference=round(counts.last_success_at * 1000),
        inference_count=counts.num_items,
        execution_count=counts.num_batches,
        inference_stats=pb.InferStatistics(
            success=_duration(counts.success),
            fail=_duration(failed),
            queue=_duration(counts.queue),
            compute_input=_duration(counts.compute_input),
            compute_infer=_duration(counts.compute_infer),
            compute_output=_duration(counts.compute_output),
        ),
        batch_stats=[
            pb.InferBatchStatistics(batch_size=size, compute_infer=_duration(total))
            for size, total in sorted(counts.batches.items())
        ],
    )


def _duration(total: Total) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=total.count, ns=total.ns)


def _tensors(served: Served) -> tuple[list[TensorMetadata], list[TensorMetadata]]:
    if not isinstance(served, ServedClassifier):
        return [_tensor(PROMPT, "BYTES", 1)], [_tensor(TEXT, "BYTES", 1)]
    size, num_classes = served.card.preprocessing.image_size, len(served.card.classes)
    inputs = [_tensor(PIXELS, "UINT8", -1, 3, size, size), _tensor(IMAGE, "BYTES", -1)]
    return inputs, [_tensor(name, "FP32", -1, num_classes) for name in (LOGITS, PROBABILITIES)]


def _tensor(name: str, datatype: str, *shape: int) -> TensorMetadata:
    return TensorMetadata(name=name, datatype=datatype, shape=shape)


def _platform(served: Served) -> str:
    return f"tandem_{served.runtime.name}"


def _properties(served: Served) -> dict[str, str]:
    version = version_of(served)
    return {
        "kind": served.card.kind,
        "architecture": version.architecture,
        "dtype": version.dtype,
        "run_id": version.run_id,
        "step": str(version.step),
    }
