"""The language models by name. Free of torch."""

from typing import Literal

LanguageModelName = Literal["RNN_TANH", "RNN_RELU", "LSTM", "GRU", "Transformer", "AWD_LSTM"]
