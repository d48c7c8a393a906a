"""The published limits of the inference service, as `proto/tandem/v1/inference.proto` states them."""

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MAX_IMAGES = 1024
# Images times top_k: the classes that an answer may hold.
MAX_ANSWERS = 100_000
MAX_PIXELS = 50_000_000
MAX_WORDS = 100_000
MAX_PROMPT_WORDS = 65_536
MAX_PROMPT_BYTES = 1024 * 1024

DEFAULT_TOP_K = 5
DEFAULT_WORDS = 100

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
