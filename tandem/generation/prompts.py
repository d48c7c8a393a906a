"""What a text goes on from, and how long it gets: checked alike by the server and on this machine. Free of torch."""

import secrets
from dataclasses import dataclass

from tandem.data.detokenize import Detokenizer
from tandem.data.vocabulary import Vocabulary
from tandem.errors import InvalidPrompt, InvalidRequest
from tandem.wire.limits import DEFAULT_WORDS, MAX_PROMPT_BYTES, MAX_PROMPT_WORDS, MAX_TEXTS, MAX_WORDS


@dataclass(frozen=True)
class Prompt:
    """The token ids; `unknown_words` the vocabulary lacks were read as `<unk>`, or left out where it has none."""

    token_ids: tuple[int, ...]
    unknown_words: tuple[str, ...]


def check_max_words(max_words: int) -> int:
    """Return `max_words`, or the default for 0; raise InvalidRequest outside the limits."""
    if not 0 <= max_words <= MAX_WORDS:
        raise InvalidRequest(
            f"max_words is {max_words}; it must be between 1 and {MAX_WORDS:,}, or 0 for {DEFAULT_WORDS}",
            field="sampling.max_words",
        )
    return max_words or DEFAULT_WORDS


def check_num_texts(num_texts: int) -> int:
    """Return `num_texts`, or 1 for 0; raise InvalidRequest outside the limits."""
    if not 0 <= num_texts <= MAX_TEXTS:
        raise InvalidRequest(
            f"num_texts is {num_texts}; it must be between 1 and {MAX_TEXTS}, or 0 for 1", field="num_texts"
        )
    return num_texts or 1


def pick_seed() -> int:
    """Return a seed for who gave none: 32 bits, so that it can be typed and survives any JSON."""
    return secrets.randbits(32)


def check_prompt(prompt: str | None, random_start: bool = False) -> None:
    """Raise InvalidPrompt for one that is empty or too long, InvalidRequest for one beside a random start."""
    if prompt is None:
        return
    if random_start:
        raise InvalidRequest(
            "a text starts with a prompt or with a random word: leave one of the two out", field="sampling.random_start"
        )
    check_text(prompt, "prompt")
    # Counted in characters first: those of a message full of them need not be encoded to be too many.
    if len(prompt) > MAX_PROMPT_BYTES or len(prompt.encode()) > MAX_PROMPT_BYTES:
        raise InvalidPrompt(f"the prompt is too long; the limit is {MAX_PROMPT_BYTES:,} bytes", field="prompt")
    if not prompt.strip():
        raise InvalidPrompt("the prompt is empty: give it words, or leave it out to start a new line", field="prompt")


def check_text(text: str, field: str) -> None:
    """Raise InvalidPrompt where `text` has bytes of another encoding in it, as a shell passes them on."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidPrompt(f"the {field} is not UTF-8 text, at character {error.start + 1}", field=field) from None


def read_prompt(vocabulary: Vocabulary, prompt: str | None) -> tuple[Prompt, Detokenizer]:
    """Return the prompt in token ids, and what renders the words that follow; raise InvalidPrompt.

    Words that the vocabulary lacks are read as `<unk>`, even if there are no others. Only where it has no `<unk>` and
    nothing is left of the prompt, that is an error.
    """
    if prompt is None:
        return Prompt((), ()), Detokenizer(vocabulary.tokenizer)
    token_ids, unknown = vocabulary.encode(prompt)
    if len(token_ids) > MAX_PROMPT_WORDS:
        raise InvalidPrompt(
            f"the prompt has {len(token_ids):,} words; the limit is {MAX_PROMPT_WORDS:,}", field="prompt"
        )
    missing = tuple(dict.fromkeys(unknown))
    if not token_ids:
        named = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise InvalidPrompt(f"the model's vocabulary has no word of the prompt ({named}); use others", field="prompt")
    return Prompt(tuple(token_ids), missing), Detokenizer(vocabulary.tokenizer, prompt)
