"""`tandem generate`: text from a language model, as it is drawn."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tandem.cli.calls import open_client, version_document
from tandem.cli.output import check_output, json_option, print_json, write_output
from tandem.settings import Settings
from tandem.volume import Volume

if TYPE_CHECKING:
    from tandem.wire.results import GenerationSummary, TextPiece

    Steps = Generator[TextPiece | GenerationSummary, None, None]

WORDS_A_LINE = 20


class BiasType(click.ParamType[tuple[str, float]]):
    """WORD=BIAS as a pair."""

    name = "bias"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """Return the word and the number; a word may have = in it."""
        word, _, bias = str(value).rpartition("=")
        try:
            return (word, float(bias)) if word else self.fail(f"{value!r} is not WORD=BIAS", param, ctx)
        except ValueError:
            self.fail(f"{value!r} is not WORD=BIAS: {bias!r} is no number", param, ctx)


@click.command()
@click.argument("reference", metavar="REF")
@click.option("--prompt", metavar="TEXT", help="What the text goes on from.  [default: the start of a line]")
@click.option("--random-start", is_flag=True, help="Start with a word drawn from all alike, instead of a prompt.")
@click.option("--words", type=click.IntRange(1), default=1000, show_default=True, help="Words, line ends included.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0 takes the likeliest word each time.")
@click.option("--top-k", type=click.IntRange(0), default=0, help="Draw from the k likeliest words.")
@click.option("--top-p", type=float, default=0.0, help="Draw from the likeliest words that hold this probability.")
@click.option("--min-p", type=float, default=0.0, help="Draw from the words this much as likely as the likeliest.")
@click.option(
    "--repetition-penalty",
    type=float,
    default=1.0,
    show_default=True,
    help="Divides (below 0: multiplies) the logit of each word that the prompt or the text has already.",
)
@click.option("--stop", metavar="WORD", multiple=True, help="End before this word, or <eos>; may be given again.")
@click.option(
    "--logit-bias",
    metavar="WORD=BIAS",
    type=BiasType(),
    multiple=True,
    help="Add to the logit of this word, or of <eos>: -1000 bans it; may be given again.",
)
@click.option(
    "--alternatives",
    "num_alternatives",
    metavar="K",
    type=click.IntRange(0, 20),
    default=0,
    help="With --json: for each word also the K likeliest.",
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="The same seed gives the same words.")
@click.option("--output", metavar="FILE", type=click.Path(path_type=Path), help="Write the words too, 20 a line.")
@click.option("--local", is_flag=True, help="Generate in a process on this machine, without a server.")
@json_option
def generate(
    reference: str,
    prompt: str | None,
    words: int,
    output: Path | None,
    local: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate text with language model REF, printed as it comes.

    Words of the prompt that the model does not know are read as <unk>, and named. A prompt or a text may be of any
    length: recurrent networks carry their state on, a Transformer's layers see the last tokens of their window.

    --json prints a line for each message, {"text", "words", "log_probabilities"} (with --alternatives those too, for
    each word a list of {word, log_probability}): the texts put together are the completion. The last line
    is {"summary": {text, num_words, seed, perplexity, model, num_prompt_tokens, unknown_words, finish_reason}}.
    --output writes a UTF-8 file of the words drawn, `<eos>` for an end of line, whole or not at all. A model of
    subwords draws those: --words counts them, and the file holds whole words. --local and a server draw the same words
    from a seed, unless two words are nearer than the last bits of a number.
    """
    if prompt is not None and sampling["random_start"]:
        raise click.UsageError("--prompt and --random-start exclude each other")
    if output is not None:
        check_output(output)
    writer = _Lines() if as_json else _Screen(prompt)
    steps = _local_steps if local else _served_steps
    # Closed at once on Ctrl-C too: the work behind it ends with it.
    with closing(steps(reference, prompt, words, sampling)) as told:
        for step in told:
            writer.show(step)
    if output is not None:
        _write(output, _whole_words(writer.words, writer.text))
        if not as_json:
            click.echo(f"written to {output}", err=True)


def _served_steps(reference: str, prompt: str | None, words: int, sampling: dict[str, Any]) -> "Steps":
    with open_client() as client:
        from tandem.client import SamplingOptions

        options = SamplingOptions(**(sampling | {"logit_bias": dict(sampling["logit_bias"])}))
        yield from client.generate(reference, prompt, words, options)


def _local_steps(reference: str, prompt: str | None, words: int, sampling: dict[str, Any]) -> "Steps":
    from tandem.checkpoints.registry import Registry
    from tandem.generation.process import run_generation
    from tandem.generation.prompts import check_max_words, check_prompt, check_text, pick_seed
    from tandem.generation.request import GenerationRequest, SamplingRequest

    check_max_words(words)
    check_prompt(prompt)
    for word in sampling["stop"]:
        check_text(word, "stop word")
    settings = Settings.from_environment()
    located = Registry(Volume(settings.home, settings.checkpoint_store)).resolve(reference)
    seed = pick_seed() if sampling["seed"] is None else sampling["seed"]
    request = GenerationRequest(
        checkpoint=located.checkpoint,
        digest=located.digest,
        name=located.version.name if located.version else "",
        version=located.version.version if located.version else 0,
        run_id=located.run_id,
        # One text has use for one device.
        device=settings.device.split(",")[0],
        prompt=prompt,
        max_words=words,
        sampling=SamplingRequest(**(sampling | {"seed": seed})),
    )
    yield from run_generation(request)


class _Screen:
    """The text for a person on stdout; what else there is to say on stderr."""

    def __init__(self, prompt: str | None) -> None:
        self.words: list[str] = []
        self.text = ""
        self._prompt = prompt

    def show(self, step: "TextPiece | GenerationSummary") -> None:
        from tandem.wire.results import TextPiece

        if not isinstance(step, TextPiece):
            self._sum_up(step)
            return
        if not self.words and self._prompt:
            click.echo(self._prompt, nl=False)
        self.words += step.words
        self.text += step.text
        click.echo(step.text, nl=False)

    def _sum_up(self, summary: "GenerationSummary") -> None:
        click.echo()
        if summary.unknown_words:
            click.echo(f"not in the vocabulary: {', '.join(summary.unknown_words)}", err=True)
        stopped = ", ended by a stop word" if summary.finish_reason == "stop" else ""
        click.echo(
            f"{summary.num_words:,} words, perplexity {summary.perplexity:.1f}, seed {summary.seed}, "
            f"by {summary.model.label} ({summary.model.architecture}){stopped}",
            err=True,
        )


class _Lines:
    """JSON lines for programs."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.text = ""

    def show(self, step: "TextPiece | GenerationSummary") -> None:
        from tandem.wire.results import TextPiece

        if isinstance(step, TextPiece):
            self.words += step.words
            self.text += step.text
            print_json(_piece_document(step))
            return
        summary = {
            "text": self.text,
            "num_words": step.num_words,
            "seed": step.seed,
            "perplexity": step.perplexity,
            "model": version_document(step.model),
            "num_prompt_tokens": step.num_prompt_tokens,
            "unknown_words": list(step.unknown_words),
            "finish_reason": step.finish_reason,
        }
        print_json({"summary": summary})


def _piece_document(piece: "TextPiece") -> dict[str, Any]:
    document: dict[str, Any] = {
        "text": piece.text,
        "words": list(piece.words),
        "log_probabilities": list(piece.log_probabilities),
    }
    if piece.alternatives:
        document["alternatives"] = [[asdict(each) for each in ranked] for ranked in piece.alternatives]
    return document


def _whole_words(words: list[str], text: str) -> list[str]:
    """Return the words of `text`; subwords, which bring their blanks with them, are put together first."""
    if "".join("\n" if word == "<eos>" else word for word in words) != text:
        return words
    return text.replace("\n", " <eos> ").split()


def _write(path: Path, words: list[str]) -> None:
    lines = [" ".join(words[first : first + WORDS_A_LINE]) for first in range(0, len(words), WORDS_A_LINE)]
    write_output(path, "\n".join(lines) + "\n")
