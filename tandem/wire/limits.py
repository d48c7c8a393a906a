"""The published limits of the inference service: all that a caller can meet, under the names that the head of
`proto/tandem/v1/inference.proto` explains. A test holds the three together."""

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
# Of requests that hold no images: names, and a prompt of 1 MiB.
MAX_TEXT_MESSAGE_BYTES = 2 * 1024 * 1024
MAX_IMAGES = 1024
# Fields of a message, those of the tensors, requests and settings in it too. Twice the images there may be: a few too
# many are told by their number.
MAX_PARTS = 2 * MAX_IMAGES
# Of the inputs of ModelInfer without their raw contents: numbers of one byte each take up to eight, parsed.
MAX_TYPED_BYTES = 8 * 1024 * 1024
# Of the logits and probabilities that ModelInfer answers with.
MAX_OUTPUT_BYTES = 32 * 1024 * 1024
# Images times top_k, or tokens times alternatives: what an answer may hold.
MAX_ANSWERS = 100_000
MAX_PIXELS = 50_000_000
# A JPEG of 50 million pixels takes 30 ms for each scan, which may have 75 bytes; the usual progressive one has 10.
MAX_SCANS = 100
# Of a message's images together: few bytes can be many pixels, and each million takes milliseconds.
MAX_MESSAGE_PIXELS = 2_000_000_000
MAX_WORDS = 100_000
MAX_PROMPT_WORDS = 65_536
MAX_PROMPT_BYTES = 1024 * 1024
# Of one text.
MAX_STOP_WORDS = 64
MAX_BIASES = 1024
# Of the JSON of the biases that ModelInfer takes: as many words as may have one, of 64 each.
MAX_BIAS_CHARACTERS = 64 * 1024
# A text that is so many words ahead of its reader is paused until they are read.
MAX_UNREAD_WORDS = 256
# Texts from one beginning in a call.
MAX_TEXTS = 16
# Of one Score: texts, and of all of them together UTF-8 bytes and tokens; alternatives a token.
MAX_SCORE_TEXTS = 64
MAX_SCORE_BYTES = 1024 * 1024
MAX_SCORE_TOKENS = 65_536
MAX_ALTERNATIVES = 20
# Of a comparison of a dataset: images that its answer may hold, and their bytes in all.
MAX_RETURNED_IMAGES = 500
MAX_RETURNED_BYTES = 32 * 1024 * 1024
# In the server at once: images (of two models in a comparison) and texts, of all models and of one. Room for a few of
# the largest messages; at 500 images/s some eight seconds of work. One model leaves room for the others.
MAX_QUEUE_ITEMS = 4096
MAX_MODEL_ITEMS = 3072
# Of the images that those are, encoded and decoded.
MAX_QUEUE_BYTES = 1024 * 1024 * 1024
# Of the messages whose calls wait for a model to be loaded, before they are in the queue.
MAX_LOBBY_BYTES = 256 * 1024 * 1024
# Of all messages in the server, as they came: from when they are parsed until their call ends, or in a stream until
# their own work does. Parsed, each takes as much again.
MAX_IN_FLIGHT_BYTES = 1024 * 1024 * 1024
# Of one ClassifyStream or ModelStreamInfer in work: requests (as many as a batch has images, so that one stream alone
# can fill it), images (of the former alone), and the bytes of their messages.
MAX_STREAM_REQUESTS = 32
MAX_STREAM_IMAGES = 256
MAX_STREAM_BYTES = 64 * 1024 * 1024
# Generate, Complete, CompareDataset, ClassifyStream, ModelStreamInfer and texts by ModelInfer under way. A text within
# ModelStreamInfer counts beside its stream.
MAX_STREAMS = 128
# On one connection; further calls wait at the client.
MAX_CONNECTION_CALLS = 1024
# Of a call.
MAX_HEADER_BYTES = 16 * 1024
# Of one model; each call of ListModels tells them all.
MAX_ALIASES = 64
# Of WatchModels: callers, and changes that one may be behind before it gets all models anew.
MAX_WATCHERS = 64
MAX_CHANGES = 256
# Of StartShadow: shadows, and images of one.
MAX_SHADOWS = 8
MAX_SHADOW_IMAGES = 1_000_000

DEFAULT_TOP_K = 5
DEFAULT_WORDS = 100

# In a call's metadata: low, normal or high.
PRIORITY_KEY = "tandem-priority"
LIMIT_PREFIX = "tandem-limit-"

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)


def limits_metadata(num_devices: int = 1) -> tuple[tuple[str, str], ...]:
    """Return every limit as metadata, LIMIT_PREFIX before its name: what ListModels and GetModel begin with.

    What waits is bounded for each device; the bounds of all of them together are told.
    """
    limits = {
        "message-bytes": MAX_MESSAGE_BYTES,
        "text-message-bytes": MAX_TEXT_MESSAGE_BYTES,
        "parts-per-message": MAX_PARTS,
        "typed-tensor-bytes": MAX_TYPED_BYTES,
        "output-bytes": MAX_OUTPUT_BYTES,
        "images-per-message": MAX_IMAGES,
        "answers-per-message": MAX_ANSWERS,
        "pixels-per-image": MAX_PIXELS,
        "scans-per-image": MAX_SCANS,
        "pixels-per-message": MAX_MESSAGE_PIXELS,
        "words": MAX_WORDS,
        "prompt-words": MAX_PROMPT_WORDS,
        "prompt-bytes": MAX_PROMPT_BYTES,
        "stop-words": MAX_STOP_WORDS,
        "biases": MAX_BIASES,
        "bias-characters": MAX_BIAS_CHARACTERS,
        "unread-words": MAX_UNREAD_WORDS,
        "texts-per-generation": MAX_TEXTS,
        "score-texts": MAX_SCORE_TEXTS,
        "score-bytes": MAX_SCORE_BYTES,
        "score-tokens": MAX_SCORE_TOKENS,
        "alternatives-per-token": MAX_ALTERNATIVES,
        "returned-images": MAX_RETURNED_IMAGES,
        "returned-bytes": MAX_RETURNED_BYTES,
        "aliases-per-model": MAX_ALIASES,
        "watchers": MAX_WATCHERS,
        "watcher-changes": MAX_CHANGES,
        "shadows": MAX_SHADOWS,
        "shadow-images": MAX_SHADOW_IMAGES,
        "stream-requests": MAX_STREAM_REQUESTS,
        "stream-images": MAX_STREAM_IMAGES,
        "stream-bytes": MAX_STREAM_BYTES,
        "in-flight-bytes": MAX_IN_FLIGHT_BYTES,
        "lobby-bytes": MAX_LOBBY_BYTES,
        "connection-calls": MAX_CONNECTION_CALLS,
        "header-bytes": MAX_HEADER_BYTES,
        "queue-items": MAX_QUEUE_ITEMS * num_devices,
        "model-queue-items": MAX_MODEL_ITEMS * num_devices,
        "queue-bytes": MAX_QUEUE_BYTES * num_devices,
        "streams": MAX_STREAMS * num_devices,
    }
    return tuple((LIMIT_PREFIX + name, str(value)) for name, value in limits.items())
