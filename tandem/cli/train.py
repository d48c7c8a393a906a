"""`tandem train`: submit a training run, and follow it if asked."""

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tandem.cli.output import json_option, print_json
from tandem.errors import InvalidJob
from tandem.jobs.spec import ClassifierJob, LanguageModelJob, make_spec

Command = TypeVar("Command", bound=Callable[..., Any])


def spec_option(model: type[BaseModel], field: str, text: str, *names: str, required: bool = False) -> Any:
    """Return the click option of a spec's field; its default is shown, and left to the spec to fill in."""
    info = model.model_fields[field]
    flag = f"--{field.replace('_', '-')}"
    plain = get_args(info.annotation) or (info.annotation,)
    default = info.get_default()
    if default not in (None, PydanticUndefined):
        text = f"{text}  [default: {_shown(default)}]"
    if bool in plain:
        return click.option(f"{flag}/--no-{field.replace('_', '-')}", field, default=None, help=text)
    kind: Any = int if int in plain else float if float in plain else str
    if all(isinstance(value, str) for value in plain):
        kind = click.Choice(list(plain))
    return click.option(flag, *names, field, type=kind, default=None, required=required, help=text)


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return str(default)


def options(*decorators: Any) -> Callable[[Command], Command]:
    """Apply click options so that --help lists them in this order."""

    def apply(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def _shared(model: type[BaseModel]) -> Callable[[Command], Command]:
    return options(
        click.option("--data", "dataset", required=True, help="A prepared dataset ('tandem data list')."),
        click.option("--name", "model_name", default=None, help="Name in the registry.  [default: DATA-NETWORK]"),
        spec_option(model, "epochs", "Passes over the train split."),
        spec_option(model, "batch_size", "Examples in one update."),
        spec_option(model, "learning_rate", "Peak learning rate.", "--lr"),
        spec_option(model, "weight_decay", "Decay of weights; norms and biases are spared.", "--wd"),
        spec_option(model, "seed", "Everything random follows from it."),
        spec_option(model, "device", "auto, cpu, cuda or cuda:N."),
        spec_option(model, "precision", "bfloat16 computes under autocast; weights stay float32."),
        spec_option(model, "num_threads", "CPU threads; all cores if left out."),
        spec_option(model, "checkpoint_every_s", "Seconds between checkpoints within an epoch."),
        click.option("--follow", "-f", is_flag=True, help="Show progress until the run ends; Ctrl-C leaves it going."),
        json_option,
    )


@click.group()
def train() -> None:
    """Submit a training run; it is queued, and goes on whether or not you follow it."""


@train.command()
@options(
    click.option("--arch", required=True, help="Any torchvision classifier: resnet18, mobilenet_v3_small, vit_b_16 …"),
    _shared(ClassifierJob),
    spec_option(ClassifierJob, "momentum", "Of SGD, Nesterov's kind."),
    spec_option(ClassifierJob, "schedule", "How the learning rate falls."),
    spec_option(ClassifierJob, "warmup_epochs", "Epochs of linear warm-up."),
    spec_option(ClassifierJob, "label_smoothing", "Share of each label spread over all classes."),
    spec_option(
        ClassifierJob, "image_size", "Side in pixels that the network sees; the data's own if small, else 224."
    ),
    spec_option(ClassifierJob, "crop", "Cut training images at random."),
    spec_option(ClassifierJob, "flip", "Mirror half of the training images."),
    spec_option(ClassifierJob, "limit_train_images", "Use so many train images, spread over the classes."),
    spec_option(ClassifierJob, "limit_val_images", "Use so many val images, spread over the classes."),
)
def classifier(**values: Any) -> None:
    """Train an image classifier on a prepared image dataset."""
    _submit("train_classifier", values["arch"], **values)


@train.command()
@options(
    spec_option(LanguageModelJob, "model", "The network.", required=True),
    _shared(LanguageModelJob),
    spec_option(LanguageModelJob, "optimizer", "adamw, or sgd as the well-known example (then --lr 20, or 5)."),
    spec_option(LanguageModelJob, "embedding_size", "Width of the word embedding.", "--emsize"),
    spec_option(LanguageModelJob, "hidden_size", "Width of a recurrent or feed-forward layer.", "--nhid"),
    spec_option(LanguageModelJob, "num_layers", "Layers.", "--nlayers"),
    spec_option(LanguageModelJob, "num_heads", "Attention heads of the Transformer.", "--nhead"),
    spec_option(LanguageModelJob, "dropout", "Share of activations dropped in training."),
    spec_option(LanguageModelJob, "tied", "Share the weights of embedding and output."),
    spec_option(LanguageModelJob, "bptt", "Words in a training window."),
    spec_option(LanguageModelJob, "clip_norm", "Largest norm of the gradient.", "--clip"),
    spec_option(LanguageModelJob, "limit_train_tokens", "Use the first so many words of the train split."),
    spec_option(LanguageModelJob, "limit_val_tokens", "Use the first so many words of the valid and test splits."),
)
def lm(**values: Any) -> None:
    """Train a word-level language model on a prepared text dataset."""
    _submit("train_language_model", values["model"], **values)


def _submit(kind: str, network: str, *, follow: bool, as_json: bool, **values: Any) -> None:
    from tandem.cli.connections import celery_app, job_store
    from tandem.cli.follow import follow_run
    from tandem.jobs.runs import submit
    from tandem.settings import Settings
    from tandem.volume import Volume

    given = {name: value for name, value in values.items() if value is not None}
    given.setdefault("model_name", f"{values['dataset']}-{network}".lower()[:64])
    try:
        spec = make_spec({"kind": kind, **given})
    except InvalidJob as error:
        raise click.UsageError(str(error)) from None
    settings = Settings.from_environment()
    volume, store = Volume(settings.home), job_store(settings)
    record = submit(spec, volume, store, celery_app(settings))
    if as_json:
        print_json({"run_id": record.run_id})
    else:
        click.echo(f"run {record.run_id} is queued: {network} on {spec.dataset}, to become model {spec.model_name!r}")
    if follow:
        follow_run(record.run_id, volume, store, as_json)
    elif not as_json:
        click.echo(f"  tandem runs watch {record.run_id}    follows it")
