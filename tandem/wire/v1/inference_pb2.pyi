from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ModelVersion(_message.Message):
    __slots__ = ("name", "version", "run_id", "step", "architecture", "dtype")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    run_id: str
    step: int
    architecture: str
    dtype: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., run_id: _Optional[str] = ..., step: _Optional[int] = ..., architecture: _Optional[str] = ..., dtype: _Optional[str] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("decode_ms", "queue_ms", "compute_ms")
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    decode_ms: float
    queue_ms: float
    compute_ms: float
    def __init__(self, decode_ms: _Optional[float] = ..., queue_ms: _Optional[float] = ..., compute_ms: _Optional[float] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("data", "name", "label")
    DATA_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    name: str
    label: str
    def __init__(self, data: _Optional[bytes] = ..., name: _Optional[str] = ..., label: _Optional[str] = ...) -> None: ...

class ClassifyRequest(_message.Message):
    __slots__ = ("model", "images", "top_k")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    model: str
    images: _containers.RepeatedCompositeFieldContainer[Image]
    top_k: int
    def __init__(self, model: _Optional[str] = ..., images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., top_k: _Optional[int] = ...) -> None: ...

class ClassifyResponse(_message.Message):
    __slots__ = ("model", "results", "timings")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    results: _containers.RepeatedCompositeFieldContainer[ImageResult]
    timings: Timings
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ..., results: _Optional[_Iterable[_Union[ImageResult, _Mapping]]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class ImageResult(_message.Message):
    __slots__ = ("name", "top_k", "error")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    name: str
    top_k: _containers.RepeatedCompositeFieldContainer[ScoredClass]
    error: str
    def __init__(self, name: _Optional[str] = ..., top_k: _Optional[_Iterable[_Union[ScoredClass, _Mapping]]] = ..., error: _Optional[str] = ...) -> None: ...

class ScoredClass(_message.Message):
    __slots__ = ("index", "id", "words", "probability")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    index: int
    id: str
    words: str
    probability: float
    def __init__(self, index: _Optional[int] = ..., id: _Optional[str] = ..., words: _Optional[str] = ..., probability: _Optional[float] = ...) -> None: ...

class CompareRequest(_message.Message):
    __slots__ = ("model_a", "model_b", "images", "top_k")
    MODEL_A_FIELD_NUMBER: _ClassVar[int]
    MODEL_B_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    model_a: str
    model_b: str
    images: _containers.RepeatedCompositeFieldContainer[Image]
    top_k: int
    def __init__(self, model_a: _Optional[str] = ..., model_b: _Optional[str] = ..., images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., top_k: _Optional[int] = ...) -> None: ...

class CompareResponse(_message.Message):
    __slots__ = ("results", "summary", "timings")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[PairResult]
    summary: ComparisonSummary
    timings: Timings
    def __init__(self, results: _Optional[_Iterable[_Union[PairResult, _Mapping]]] = ..., summary: _Optional[_Union[ComparisonSummary, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class PairResult(_message.Message):
    __slots__ = ("name", "label", "a", "b", "agree", "error")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    A_FIELD_NUMBER: _ClassVar[int]
    B_FIELD_NUMBER: _ClassVar[int]
    AGREE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    name: str
    label: str
    a: _containers.RepeatedCompositeFieldContainer[ScoredClass]
    b: _containers.RepeatedCompositeFieldContainer[ScoredClass]
    agree: bool
    error: str
    def __init__(self, name: _Optional[str] = ..., label: _Optional[str] = ..., a: _Optional[_Iterable[_Union[ScoredClass, _Mapping]]] = ..., b: _Optional[_Iterable[_Union[ScoredClass, _Mapping]]] = ..., agree: _Optional[bool] = ..., error: _Optional[str] = ...) -> None: ...

class ComparisonSummary(_message.Message):
    __slots__ = ("a", "b", "num_images", "num_disagreements", "num_errors", "labelled")
    A_FIELD_NUMBER: _ClassVar[int]
    B_FIELD_NUMBER: _ClassVar[int]
    NUM_IMAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_DISAGREEMENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_ERRORS_FIELD_NUMBER: _ClassVar[int]
    LABELLED_FIELD_NUMBER: _ClassVar[int]
    a: ModelVersion
    b: ModelVersion
    num_images: int
    num_disagreements: int
    num_errors: int
    labelled: PairedAccuracy
    def __init__(self, a: _Optional[_Union[ModelVersion, _Mapping]] = ..., b: _Optional[_Union[ModelVersion, _Mapping]] = ..., num_images: _Optional[int] = ..., num_disagreements: _Optional[int] = ..., num_errors: _Optional[int] = ..., labelled: _Optional[_Union[PairedAccuracy, _Mapping]] = ...) -> None: ...

class PairedAccuracy(_message.Message):
    __slots__ = ("num_labelled", "both_right", "only_a_right", "only_b_right", "both_wrong", "accuracy_a", "accuracy_b", "mcnemar_exact_p", "mcnemar_mid_p")
    NUM_LABELLED_FIELD_NUMBER: _ClassVar[int]
    BOTH_RIGHT_FIELD_NUMBER: _ClassVar[int]
    ONLY_A_RIGHT_FIELD_NUMBER: _ClassVar[int]
    ONLY_B_RIGHT_FIELD_NUMBER: _ClassVar[int]
    BOTH_WRONG_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_A_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_B_FIELD_NUMBER: _ClassVar[int]
    MCNEMAR_EXACT_P_FIELD_NUMBER: _ClassVar[int]
    MCNEMAR_MID_P_FIELD_NUMBER: _ClassVar[int]
    num_labelled: int
    both_right: int
    only_a_right: int
    only_b_right: int
    both_wrong: int
    accuracy_a: float
    accuracy_b: float
    mcnemar_exact_p: float
    mcnemar_mid_p: float
    def __init__(self, num_labelled: _Optional[int] = ..., both_right: _Optional[int] = ..., only_a_right: _Optional[int] = ..., only_b_right: _Optional[int] = ..., both_wrong: _Optional[int] = ..., accuracy_a: _Optional[float] = ..., accuracy_b: _Optional[float] = ..., mcnemar_exact_p: _Optional[float] = ..., mcnemar_mid_p: _Optional[float] = ...) -> None: ...

class CompareDatasetRequest(_message.Message):
    __slots__ = ("model_a", "model_b", "dataset", "split", "top_k", "limit")
    MODEL_A_FIELD_NUMBER: _ClassVar[int]
    MODEL_B_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    model_a: str
    model_b: str
    dataset: str
    split: str
    top_k: int
    limit: int
    def __init__(self, model_a: _Optional[str] = ..., model_b: _Optional[str] = ..., dataset: _Optional[str] = ..., split: _Optional[str] = ..., top_k: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class CompareDatasetResponse(_message.Message):
    __slots__ = ("num_done", "num_images", "disagreements", "summary", "timings")
    NUM_DONE_FIELD_NUMBER: _ClassVar[int]
    NUM_IMAGES_FIELD_NUMBER: _ClassVar[int]
    DISAGREEMENTS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    num_done: int
    num_images: int
    disagreements: _containers.RepeatedCompositeFieldContainer[PairResult]
    summary: ComparisonSummary
    timings: Timings
    def __init__(self, num_done: _Optional[int] = ..., num_images: _Optional[int] = ..., disagreements: _Optional[_Iterable[_Union[PairResult, _Mapping]]] = ..., summary: _Optional[_Union[ComparisonSummary, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("model", "prompt", "sampling")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: str
    sampling: SamplingParameters
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[str] = ..., sampling: _Optional[_Union[SamplingParameters, _Mapping]] = ...) -> None: ...

class SamplingParameters(_message.Message):
    __slots__ = ("max_words", "temperature", "top_k", "top_p", "seed", "allow_unknown", "min_p", "repetition_penalty", "stop", "random_start")
    MAX_WORDS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ALLOW_UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    RANDOM_START_FIELD_NUMBER: _ClassVar[int]
    max_words: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    allow_unknown: bool
    min_p: float
    repetition_penalty: float
    stop: _containers.RepeatedScalarFieldContainer[str]
    random_start: bool
    def __init__(self, max_words: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., allow_unknown: _Optional[bool] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., stop: _Optional[_Iterable[str]] = ..., random_start: _Optional[bool] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("text", "words", "summary")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    text: str
    words: _containers.RepeatedScalarFieldContainer[str]
    summary: GenerateSummary
    def __init__(self, text: _Optional[str] = ..., words: _Optional[_Iterable[str]] = ..., summary: _Optional[_Union[GenerateSummary, _Mapping]] = ...) -> None: ...

class GenerateSummary(_message.Message):
    __slots__ = ("model", "num_prompt_tokens", "num_words", "seed", "finish_reason", "unknown_words", "mean_negative_log_probability", "timings")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_WORDS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_WORDS_FIELD_NUMBER: _ClassVar[int]
    MEAN_NEGATIVE_LOG_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    num_prompt_tokens: int
    num_words: int
    seed: int
    finish_reason: str
    unknown_words: _containers.RepeatedScalarFieldContainer[str]
    mean_negative_log_probability: float
    timings: Timings
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ..., num_prompt_tokens: _Optional[int] = ..., num_words: _Optional[int] = ..., seed: _Optional[int] = ..., finish_reason: _Optional[str] = ..., unknown_words: _Optional[_Iterable[str]] = ..., mean_negative_log_probability: _Optional[float] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "kind", "latest", "aliases", "versions", "loaded")
    class AliasesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LATEST_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    latest: int
    aliases: _containers.ScalarMap[str, int]
    versions: _containers.RepeatedScalarFieldContainer[int]
    loaded: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., latest: _Optional[int] = ..., aliases: _Optional[_Mapping[str, int]] = ..., versions: _Optional[_Iterable[int]] = ..., loaded: _Optional[_Iterable[int]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model", "kind", "class_ids", "image_size", "vocabulary_size", "metrics", "num_parameters")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CLASS_IDS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SIZE_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    kind: str
    class_ids: _containers.RepeatedScalarFieldContainer[str]
    image_size: int
    vocabulary_size: int
    metrics: _containers.ScalarMap[str, float]
    num_parameters: int
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ..., kind: _Optional[str] = ..., class_ids: _Optional[_Iterable[str]] = ..., image_size: _Optional[int] = ..., vocabulary_size: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., num_parameters: _Optional[int] = ...) -> None: ...
