"""Entry point of the `tandem` command: finds the noun, and turns errors into one line and an exit code."""

import importlib
import io
import os
import signal
import sys

import click

from tandem import __version__
from tandem.errors import TandemError

# noun → (module, one-line help). The help stands here so that `tandem --help` imports no noun.
COMMANDS = {
    "up": ("tandem.cli.system", "Run the whole system on this machine: broker, trainer, inference, TensorBoard."),
    "down": ("tandem.cli.system", "Stop what `tandem up` started."),
    "status": ("tandem.cli.system", "Say what runs, and where."),
    "doctor": ("tandem.cli.doctor", "Check what works here, with the remedy for what does not."),
    "demo": ("tandem.cli.demo", "Train, serve, classify, compare and generate on real data, in minutes."),
    "data": ("tandem.cli.data", "Prepare datasets and list them."),
    "train": ("tandem.cli.train", "Submit a training run."),
    "runs": ("tandem.cli.runs", "List, show, watch and cancel runs."),
    "evaluate": ("tandem.cli.evaluate", "Evaluate a classifier on a split of a dataset."),
    "models": ("tandem.cli.models", "List, show, export, load, unload and watch models; set aliases."),
    "classify": ("tandem.cli.classify", "Classify images with a served model."),
    "compare": ("tandem.cli.compare", "Compare two models on the same images, or two predictions files."),
    "generate": ("tandem.cli.generate", "Generate text with a served language model."),
    "score": ("tandem.cli.score", "Say how likely texts are to a served language model."),
    "bench": ("tandem.cli.bench", "Measure this machine: training beside its bare step, serving beside its limit."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is run, not before."""

    def list_commands(self, _: click.Context) -> list[str]:
        """Return the nouns in the order of the table."""
        return list(COMMANDS)

    def get_command(self, _: click.Context, name: str) -> click.Command | None:
        """Import the module of command `name` and return its command."""
        if name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(COMMANDS[name][0]), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, _: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest the nearest command for a mistyped one."""
        import difflib

        if args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else "; 'tandem --help' lists them"
            context.fail(f"no command {args[0]!r}{hint}")
        return super().resolve_command(context, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="tandem")
def tandem() -> None:
    """Train, compare, promote and serve image classifiers and word-level language models.

    Data, runs and models lie under $TANDEM_HOME (default ~/.tandem). Every command takes --json.
    """


def main() -> None:
    """Run the command line: exit 0 on success, 1 on an explained failure, 2 on wrong usage, 130 on Ctrl-C."""
    # gRPC's core would write lines of its own about a failed handshake; ours says it better. Before it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    for stream in (sys.stdout, sys.stderr):
        # Files and pipes get UTF-8 whatever the locale, unless Python was told otherwise; a terminal that can't show a
        # character gets a question mark.
        if isinstance(stream, io.TextIOWrapper):
            kept = stream.isatty() or "PYTHONIOENCODING" in os.environ
            stream.reconfigure(encoding=stream.encoding if kept else "utf-8", errors="replace")
    try:
        code = tandem.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except TandemError as error:
        click.echo(f"tandem: {error}", err=True)
        code = 1
    except (KeyboardInterrupt, click.Abort):
        code = 128 + signal.SIGINT
    sys.exit(code if isinstance(code, int) else 0)
