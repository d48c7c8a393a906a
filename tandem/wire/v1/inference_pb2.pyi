from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
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
    __slots__ = ("data", "raw", "name", "label")
    DATA_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    raw: RawImage
    name: str
    label: str
    def __init__(self, data: _Optional[bytes] = ..., raw: _Optional[_Union[RawImage, _Mapping]] = ..., name: _Optional[str] = ..., label: _Optional[str] = ...) -> None: ...

class RawImage(_message.Message):
    __slots__ = ("width", "height", "rgb")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    RGB_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    rgb: bytes
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ..., rgb: _Optional[bytes] = ...) -> None: ...

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

class ClassifyStreamRequest(_message.Message):
    __slots__ = ("id", "request")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    id: str
    request: ClassifyRequest
    def __init__(self, id: _Optional[str] = ..., request: _Optional[_Union[ClassifyRequest, _Mapping]] = ...) -> None: ...

class ClassifyStreamResponse(_message.Message):
    __slots__ = ("id", "response", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: str
    response: ClassifyResponse
    error: _status_pb2.Status
    def __init__(self, id: _Optional[str] = ..., response: _Optional[_Union[ClassifyResponse, _Mapping]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("name", "label", "a", "b", "agree", "error", "divergence")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    A_FIELD_NUMBER: _ClassVar[int]
    B_FIELD_NUMBER: _ClassVar[int]
    AGREE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    label: str
    a: _containers.RepeatedCompositeFieldContainer[ScoredClass]
    b: _containers.RepeatedCompositeFieldContainer[ScoredClass]
    agree: bool
    error: str
    divergence: float
    def __init__(self, name: _Optional[str] = ..., label: _Optional[str] = ..., a: _Optional[_Iterable[_Union[ScoredClass, _Mapping]]] = ..., b: _Optional[_Iterable[_Union[ScoredClass, _Mapping]]] = ..., agree: _Optional[bool] = ..., error: _Optional[str] = ..., divergence: _Optional[float] = ...) -> None: ...

class ComparisonSummary(_message.Message):
    __slots__ = ("a", "b", "num_images", "num_disagreements", "num_errors", "labelled", "kappa", "mean_divergence", "only_in_a", "only_in_b", "verdict")
    A_FIELD_NUMBER: _ClassVar[int]
    B_FIELD_NUMBER: _ClassVar[int]
    NUM_IMAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_DISAGREEMENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_ERRORS_FIELD_NUMBER: _ClassVar[int]
    LABELLED_FIELD_NUMBER: _ClassVar[int]
    KAPPA_FIELD_NUMBER: _ClassVar[int]
    MEAN_DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    ONLY_IN_A_FIELD_NUMBER: _ClassVar[int]
    ONLY_IN_B_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    a: ModelVersion
    b: ModelVersion
    num_images: int
    num_disagreements: int
    num_errors: int
    labelled: PairedAccuracy
    kappa: float
    mean_divergence: float
    only_in_a: _containers.RepeatedScalarFieldContainer[str]
    only_in_b: _containers.RepeatedScalarFieldContainer[str]
    verdict: str
    def __init__(self, a: _Optional[_Union[ModelVersion, _Mapping]] = ..., b: _Optional[_Union[ModelVersion, _Mapping]] = ..., num_images: _Optional[int] = ..., num_disagreements: _Optional[int] = ..., num_errors: _Optional[int] = ..., labelled: _Optional[_Union[PairedAccuracy, _Mapping]] = ..., kappa: _Optional[float] = ..., mean_divergence: _Optional[float] = ..., only_in_a: _Optional[_Iterable[str]] = ..., only_in_b: _Optional[_Iterable[str]] = ..., verdict: _Optional[str] = ...) -> None: ...

class Interval(_message.Message):
    __slots__ = ("low", "high")
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    low: float
    high: float
    def __init__(self, low: _Optional[float] = ..., high: _Optional[float] = ...) -> None: ...

class Standing(_message.Message):
    __slots__ = ("accuracy_at_1", "accuracy_at_1_interval", "accuracy_at_5", "accuracy_at_5_interval", "calibration_error")
    ACCURACY_AT_1_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_AT_1_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_AT_5_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_AT_5_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_ERROR_FIELD_NUMBER: _ClassVar[int]
    accuracy_at_1: float
    accuracy_at_1_interval: Interval
    accuracy_at_5: float
    accuracy_at_5_interval: Interval
    calibration_error: float
    def __init__(self, accuracy_at_1: _Optional[float] = ..., accuracy_at_1_interval: _Optional[_Union[Interval, _Mapping]] = ..., accuracy_at_5: _Optional[float] = ..., accuracy_at_5_interval: _Optional[_Union[Interval, _Mapping]] = ..., calibration_error: _Optional[float] = ...) -> None: ...

class ClassDifference(_message.Message):
    __slots__ = ("id", "both_right", "only_a_right", "only_b_right", "both_wrong", "mcnemar_mid_p", "adjusted_p")
    ID_FIELD_NUMBER: _ClassVar[int]
    BOTH_RIGHT_FIELD_NUMBER: _ClassVar[int]
    ONLY_A_RIGHT_FIELD_NUMBER: _ClassVar[int]
    ONLY_B_RIGHT_FIELD_NUMBER: _ClassVar[int]
    BOTH_WRONG_FIELD_NUMBER: _ClassVar[int]
    MCNEMAR_MID_P_FIELD_NUMBER: _ClassVar[int]
    ADJUSTED_P_FIELD_NUMBER: _ClassVar[int]
    id: str
    both_right: int
    only_a_right: int
    only_b_right: int
    both_wrong: int
    mcnemar_mid_p: float
    adjusted_p: float
    def __init__(self, id: _Optional[str] = ..., both_right: _Optional[int] = ..., only_a_right: _Optional[int] = ..., only_b_right: _Optional[int] = ..., both_wrong: _Optional[int] = ..., mcnemar_mid_p: _Optional[float] = ..., adjusted_p: _Optional[float] = ...) -> None: ...

class PairedAccuracy(_message.Message):
    __slots__ = ("num_labelled", "both_right", "only_a_right", "only_b_right", "both_wrong", "accuracy_a", "accuracy_b", "mcnemar_exact_p", "mcnemar_mid_p", "difference", "difference_interval", "standing_a", "standing_b", "classes")
    NUM_LABELLED_FIELD_NUMBER: _ClassVar[int]
    BOTH_RIGHT_FIELD_NUMBER: _ClassVar[int]
    ONLY_A_RIGHT_FIELD_NUMBER: _ClassVar[int]
    ONLY_B_RIGHT_FIELD_NUMBER: _ClassVar[int]
    BOTH_WRONG_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_A_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_B_FIELD_NUMBER: _ClassVar[int]
    MCNEMAR_EXACT_P_FIELD_NUMBER: _ClassVar[int]
    MCNEMAR_MID_P_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    STANDING_A_FIELD_NUMBER: _ClassVar[int]
    STANDING_B_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    num_labelled: int
    both_right: int
    only_a_right: int
    only_b_right: int
    both_wrong: int
    accuracy_a: float
    accuracy_b: float
    mcnemar_exact_p: float
    mcnemar_mid_p: float
    difference: float
    difference_interval: Interval
    standing_a: Standing
    standing_b: Standing
    classes: _containers.RepeatedCompositeFieldContainer[ClassDifference]
    def __init__(self, num_labelled: _Optional[int] = ..., both_right: _Optional[int] = ..., only_a_right: _Optional[int] = ..., only_b_right: _Optional[int] = ..., both_wrong: _Optional[int] = ..., accuracy_a: _Optional[float] = ..., accuracy_b: _Optional[float] = ..., mcnemar_exact_p: _Optional[float] = ..., mcnemar_mid_p: _Optional[float] = ..., difference: _Optional[float] = ..., difference_interval: _Optional[_Union[Interval, _Mapping]] = ..., standing_a: _Optional[_Union[Standing, _Mapping]] = ..., standing_b: _Optional[_Union[Standing, _Mapping]] = ..., classes: _Optional[_Iterable[_Union[ClassDifference, _Mapping]]] = ...) -> None: ...

class CompareDatasetRequest(_message.Message):
    __slots__ = ("model_a", "model_b", "dataset", "split", "top_k", "limit", "num_returned_images")
    MODEL_A_FIELD_NUMBER: _ClassVar[int]
    MODEL_B_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    NUM_RETURNED_IMAGES_FIELD_NUMBER: _ClassVar[int]
    model_a: str
    model_b: str
    dataset: str
    split: str
    top_k: int
    limit: int
    num_returned_images: int
    def __init__(self, model_a: _Optional[str] = ..., model_b: _Optional[str] = ..., dataset: _Optional[str] = ..., split: _Optional[str] = ..., top_k: _Optional[int] = ..., limit: _Optional[int] = ..., num_returned_images: _Optional[int] = ...) -> None: ...

class CompareDatasetResponse(_message.Message):
    __slots__ = ("num_done", "num_images", "disagreements", "summary", "timings", "images")
    NUM_DONE_FIELD_NUMBER: _ClassVar[int]
    NUM_IMAGES_FIELD_NUMBER: _ClassVar[int]
    DISAGREEMENTS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    num_done: int
    num_images: int
    disagreements: _containers.RepeatedCompositeFieldContainer[PairResult]
    summary: ComparisonSummary
    timings: Timings
    images: _containers.RepeatedCompositeFieldContainer[Image]
    def __init__(self, num_done: _Optional[int] = ..., num_images: _Optional[int] = ..., disagreements: _Optional[_Iterable[_Union[PairResult, _Mapping]]] = ..., summary: _Optional[_Union[ComparisonSummary, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("model", "prompt", "sampling", "num_texts")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    NUM_TEXTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: str
    sampling: SamplingParameters
    num_texts: int
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[str] = ..., sampling: _Optional[_Union[SamplingParameters, _Mapping]] = ..., num_texts: _Optional[int] = ...) -> None: ...

class SamplingParameters(_message.Message):
    __slots__ = ("max_words", "temperature", "top_k", "top_p", "seed", "allow_unknown", "min_p", "repetition_penalty", "stop", "random_start", "logit_bias", "num_alternatives")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
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
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    NUM_ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
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
    logit_bias: _containers.ScalarMap[str, float]
    num_alternatives: int
    def __init__(self, max_words: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., allow_unknown: _Optional[bool] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., stop: _Optional[_Iterable[str]] = ..., random_start: _Optional[bool] = ..., logit_bias: _Optional[_Mapping[str, float]] = ..., num_alternatives: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("text", "words", "summary", "log_probabilities", "alternatives", "text_index")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    TEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    text: str
    words: _containers.RepeatedScalarFieldContainer[str]
    summary: GenerateSummary
    log_probabilities: _containers.RepeatedScalarFieldContainer[float]
    alternatives: _containers.RepeatedCompositeFieldContainer[TokenAlternatives]
    text_index: int
    def __init__(self, text: _Optional[str] = ..., words: _Optional[_Iterable[str]] = ..., summary: _Optional[_Union[GenerateSummary, _Mapping]] = ..., log_probabilities: _Optional[_Iterable[float]] = ..., alternatives: _Optional[_Iterable[_Union[TokenAlternatives, _Mapping]]] = ..., text_index: _Optional[int] = ...) -> None: ...

class TokenAlternatives(_message.Message):
    __slots__ = ("alternatives",)
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    alternatives: _containers.RepeatedCompositeFieldContainer[TokenAlternative]
    def __init__(self, alternatives: _Optional[_Iterable[_Union[TokenAlternative, _Mapping]]] = ...) -> None: ...

class CompleteResponse(_message.Message):
    __slots__ = ("completions",)
    COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    completions: _containers.RepeatedCompositeFieldContainer[Completion]
    def __init__(self, completions: _Optional[_Iterable[_Union[Completion, _Mapping]]] = ...) -> None: ...

class Completion(_message.Message):
    __slots__ = ("text", "words", "summary", "log_probabilities", "alternatives")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    text: str
    words: _containers.RepeatedScalarFieldContainer[str]
    summary: GenerateSummary
    log_probabilities: _containers.RepeatedScalarFieldContainer[float]
    alternatives: _containers.RepeatedCompositeFieldContainer[TokenAlternatives]
    def __init__(self, text: _Optional[str] = ..., words: _Optional[_Iterable[str]] = ..., summary: _Optional[_Union[GenerateSummary, _Mapping]] = ..., log_probabilities: _Optional[_Iterable[float]] = ..., alternatives: _Optional[_Iterable[_Union[TokenAlternatives, _Mapping]]] = ...) -> None: ...

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

class ScoreRequest(_message.Message):
    __slots__ = ("model", "texts", "num_alternatives", "first_is_given")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    NUM_ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    FIRST_IS_GIVEN_FIELD_NUMBER: _ClassVar[int]
    model: str
    texts: _containers.RepeatedScalarFieldContainer[str]
    num_alternatives: int
    first_is_given: bool
    def __init__(self, model: _Optional[str] = ..., texts: _Optional[_Iterable[str]] = ..., num_alternatives: _Optional[int] = ..., first_is_given: _Optional[bool] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("model", "results", "summary", "timings")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    results: _containers.RepeatedCompositeFieldContainer[TextScore]
    summary: ScoreSummary
    timings: Timings
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ..., results: _Optional[_Iterable[_Union[TextScore, _Mapping]]] = ..., summary: _Optional[_Union[ScoreSummary, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class TextScore(_message.Message):
    __slots__ = ("tokens", "summary", "unknown_words")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_WORDS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[TokenScore]
    summary: ScoreSummary
    unknown_words: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tokens: _Optional[_Iterable[_Union[TokenScore, _Mapping]]] = ..., summary: _Optional[_Union[ScoreSummary, _Mapping]] = ..., unknown_words: _Optional[_Iterable[str]] = ...) -> None: ...

class TokenScore(_message.Message):
    __slots__ = ("token", "token_id", "log_probability", "alternatives")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    token: str
    token_id: int
    log_probability: float
    alternatives: _containers.RepeatedCompositeFieldContainer[TokenAlternative]
    def __init__(self, token: _Optional[str] = ..., token_id: _Optional[int] = ..., log_probability: _Optional[float] = ..., alternatives: _Optional[_Iterable[_Union[TokenAlternative, _Mapping]]] = ...) -> None: ...

class TokenAlternative(_message.Message):
    __slots__ = ("token", "token_id", "log_probability")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    token: str
    token_id: int
    log_probability: float
    def __init__(self, token: _Optional[str] = ..., token_id: _Optional[int] = ..., log_probability: _Optional[float] = ...) -> None: ...

class ScoreSummary(_message.Message):
    __slots__ = ("num_tokens", "sum_log_probability", "mean_log_probability", "perplexity", "num_unknown")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SUM_LOG_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    MEAN_LOG_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    PERPLEXITY_FIELD_NUMBER: _ClassVar[int]
    NUM_UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    sum_log_probability: float
    mean_log_probability: float
    perplexity: float
    num_unknown: int
    def __init__(self, num_tokens: _Optional[int] = ..., sum_log_probability: _Optional[float] = ..., mean_log_probability: _Optional[float] = ..., perplexity: _Optional[float] = ..., num_unknown: _Optional[int] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "kind", "latest", "aliases", "versions", "loaded", "failed", "out_of_service", "loaded_bytes")
    class AliasesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class FailedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LATEST_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    OUT_OF_SERVICE_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    latest: int
    aliases: _containers.ScalarMap[str, int]
    versions: _containers.RepeatedScalarFieldContainer[int]
    loaded: _containers.RepeatedScalarFieldContainer[int]
    failed: _containers.ScalarMap[int, str]
    out_of_service: bool
    loaded_bytes: int
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., latest: _Optional[int] = ..., aliases: _Optional[_Mapping[str, int]] = ..., versions: _Optional[_Iterable[int]] = ..., loaded: _Optional[_Iterable[int]] = ..., failed: _Optional[_Mapping[int, str]] = ..., out_of_service: _Optional[bool] = ..., loaded_bytes: _Optional[int] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model", "kind", "class_ids", "image_size", "vocabulary_size", "metrics", "num_parameters", "runtime", "memory_bytes", "devices")
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
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    kind: str
    class_ids: _containers.RepeatedScalarFieldContainer[str]
    image_size: int
    vocabulary_size: int
    metrics: _containers.ScalarMap[str, float]
    num_parameters: int
    runtime: Runtime
    memory_bytes: int
    devices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ..., kind: _Optional[str] = ..., class_ids: _Optional[_Iterable[str]] = ..., image_size: _Optional[int] = ..., vocabulary_size: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., num_parameters: _Optional[int] = ..., runtime: _Optional[_Union[Runtime, _Mapping]] = ..., memory_bytes: _Optional[int] = ..., devices: _Optional[_Iterable[str]] = ...) -> None: ...

class LoadModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class LoadModelResponse(_message.Message):
    __slots__ = ("model", "load_ms")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LOAD_MS_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    load_ms: float
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ..., load_ms: _Optional[float] = ...) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadModelResponse(_message.Message):
    __slots__ = ("versions",)
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, versions: _Optional[_Iterable[int]] = ...) -> None: ...

class SetAliasRequest(_message.Message):
    __slots__ = ("name", "alias", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    alias: str
    version: int
    def __init__(self, name: _Optional[str] = ..., alias: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class SetAliasResponse(_message.Message):
    __slots__ = ("model", "previous_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: Model
    previous_version: int
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ..., previous_version: _Optional[int] = ...) -> None: ...

class DeleteAliasRequest(_message.Message):
    __slots__ = ("name", "alias")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    name: str
    alias: str
    def __init__(self, name: _Optional[str] = ..., alias: _Optional[str] = ...) -> None: ...

class DeleteAliasResponse(_message.Message):
    __slots__ = ("model", "previous_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: Model
    previous_version: int
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ..., previous_version: _Optional[int] = ...) -> None: ...

class WatchModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchModelsResponse(_message.Message):
    __slots__ = ("snapshot", "change")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    snapshot: ModelsSnapshot
    change: ModelChange
    def __init__(self, snapshot: _Optional[_Union[ModelsSnapshot, _Mapping]] = ..., change: _Optional[_Union[ModelChange, _Mapping]] = ...) -> None: ...

class ModelsSnapshot(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class ModelChange(_message.Message):
    __slots__ = ("kind", "name", "version", "alias", "previous_version", "reason")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[ModelChange.Kind]
        KIND_PUBLISHED: _ClassVar[ModelChange.Kind]
        KIND_WITHDRAWN: _ClassVar[ModelChange.Kind]
        KIND_ALIAS_SET: _ClassVar[ModelChange.Kind]
        KIND_ALIAS_DELETED: _ClassVar[ModelChange.Kind]
        KIND_LOADED: _ClassVar[ModelChange.Kind]
        KIND_UNLOADED: _ClassVar[ModelChange.Kind]
        KIND_FAILED: _ClassVar[ModelChange.Kind]
    KIND_UNSPECIFIED: ModelChange.Kind
    KIND_PUBLISHED: ModelChange.Kind
    KIND_WITHDRAWN: ModelChange.Kind
    KIND_ALIAS_SET: ModelChange.Kind
    KIND_ALIAS_DELETED: ModelChange.Kind
    KIND_LOADED: ModelChange.Kind
    KIND_UNLOADED: ModelChange.Kind
    KIND_FAILED: ModelChange.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    kind: ModelChange.Kind
    name: str
    version: int
    alias: str
    previous_version: int
    reason: str
    def __init__(self, kind: _Optional[_Union[ModelChange.Kind, str]] = ..., name: _Optional[str] = ..., version: _Optional[int] = ..., alias: _Optional[str] = ..., previous_version: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class StartShadowRequest(_message.Message):
    __slots__ = ("name", "alias", "candidate", "share")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    name: str
    alias: str
    candidate: str
    share: float
    def __init__(self, name: _Optional[str] = ..., alias: _Optional[str] = ..., candidate: _Optional[str] = ..., share: _Optional[float] = ...) -> None: ...

class StartShadowResponse(_message.Message):
    __slots__ = ("shadow",)
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    shadow: Shadow
    def __init__(self, shadow: _Optional[_Union[Shadow, _Mapping]] = ...) -> None: ...

class GetShadowsRequest(_message.Message):
    __slots__ = ("name", "alias")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    name: str
    alias: str
    def __init__(self, name: _Optional[str] = ..., alias: _Optional[str] = ...) -> None: ...

class GetShadowsResponse(_message.Message):
    __slots__ = ("shadows",)
    SHADOWS_FIELD_NUMBER: _ClassVar[int]
    shadows: _containers.RepeatedCompositeFieldContainer[Shadow]
    def __init__(self, shadows: _Optional[_Iterable[_Union[Shadow, _Mapping]]] = ...) -> None: ...

class StopShadowRequest(_message.Message):
    __slots__ = ("name", "alias")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    name: str
    alias: str
    def __init__(self, name: _Optional[str] = ..., alias: _Optional[str] = ...) -> None: ...

class StopShadowResponse(_message.Message):
    __slots__ = ("shadow",)
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    shadow: Shadow
    def __init__(self, shadow: _Optional[_Union[Shadow, _Mapping]] = ...) -> None: ...

class Shadow(_message.Message):
    __slots__ = ("name", "alias", "share", "age_s", "num_seen", "num_waiting", "num_dropped", "ended", "summary")
    class NumDroppedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    NUM_SEEN_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_DROPPED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    name: str
    alias: str
    share: float
    age_s: float
    num_seen: int
    num_waiting: int
    num_dropped: _containers.ScalarMap[str, int]
    ended: str
    summary: ComparisonSummary
    def __init__(self, name: _Optional[str] = ..., alias: _Optional[str] = ..., share: _Optional[float] = ..., age_s: _Optional[float] = ..., num_seen: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_dropped: _Optional[_Mapping[str, int]] = ..., ended: _Optional[str] = ..., summary: _Optional[_Union[ComparisonSummary, _Mapping]] = ...) -> None: ...

class Runtime(_message.Message):
    __slots__ = ("name", "dtype", "reason", "max_probability_drift", "mean_probability_drift")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MAX_PROBABILITY_DRIFT_FIELD_NUMBER: _ClassVar[int]
    MEAN_PROBABILITY_DRIFT_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    reason: str
    max_probability_drift: float
    mean_probability_drift: float
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., reason: _Optional[str] = ..., max_probability_drift: _Optional[float] = ..., mean_probability_drift: _Optional[float] = ...) -> None: ...
