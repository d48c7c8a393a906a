"""`tandem train`: submit a training run, and follow it if asked."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tandem.cli.links import link_options
from tandem.cli.output import json_option
from tandem.cli.scheduling import scheduling_options
from tandem.cli.submission import submit_training
from tandem.jobs.presets import Kind, load_preset, preset_names
from tandem.jobs.spec import ClassifierJob, LanguageModelJob

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
        spec_option(model, "precision", "bfloat16 computes under autocast; auto: where the device has it."),
        spec_option(model, "num_threads", "CPU threads; all cores if left out."),
        spec_option(model, "accumulation", "Parts of an update, one after another, for less memory."),
        spec_option(model, "num_devices", "GPUs of this machine (or processes on its CPU) that share every batch."),
        spec_option(model, "compile", "torch.compile; needs a C++ compiler."),
        spec_option(model, "schedule", "How the learning rate falls."),
        spec_option(
            model, "warmup_epochs", "Epochs of warm-up; 1 if left out, 30 % of all for onecycle, none for anneal."
        ),
        spec_option(model, "checkpoint_every_s", "Seconds between checkpoints within an epoch."),
        spec_option(model, "keep_last", "Newest checkpoints that stay, besides the best."),
        spec_option(model, "keep_every", "Also keep a checkpoint at the end of each so many epochs."),
        click.option(
            "--sweep",
            "sweeps",
            multiple=True,
            metavar="NAME=V1,V2",
            help="A run for each value of this option; repeated, for each combination.",
        ),
        click.option("--max-parallel", type=click.IntRange(1), help="So many runs of a sweep at a time."),
        link_options,
        scheduling_options,
        click.option("--show-spec", is_flag=True, help="Print the job spec, and submit nothing."),
        click.option("--follow", "-f", is_flag=True, help="Show progress until the run ends; Ctrl-C leaves it going."),
        json_option,
    )


def _preset(kind: Kind) -> Any:
    names = click.Choice(preset_names(kind))
    return click.option("--preset", type=names, help="Named values; any option overrides its own.")


@click.group()
def train() -> None:
    """Submit a training run; it is queued, and goes on whether or not you follow it."""


_WEIGHTS_SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".safetensors")
_CLASSIFIER = partial(spec_option, ClassifierJob)


@train.command()
@options(
    _preset("train_classifier"),
    _CLASSIFIER("arch", "Any torchvision classifier: resnet18, mobilenet_v3_small, vit_b_16 …"),
    _CLASSIFIER("stem", "small: 3×3, stride 1, no pooling, for small images (ResNet family)."),
    click.option(
        "--weights", metavar="FILE|REF", help="Begin with weights: safetensors, a torch state dict, or a model."
    ),
    click.option(
        "--resume", "resume_from", metavar="REF", help="Continue a checkpoint of another run, optimizer and all."
    ),
    _shared(ClassifierJob),
    _CLASSIFIER("start_epoch", "Begin the schedule at this epoch."),
    _CLASSIFIER("momentum", "Of SGD."),
    _CLASSIFIER("nesterov", "Nesterov's momentum."),
    _CLASSIFIER("decay_all", "Decay norms and biases too, as the reference script does."),
    _CLASSIFIER("step_epochs", "Epochs between the falls of --schedule step; a third of all if left out."),
    _CLASSIFIER("step_factor", "What the rate is multiplied by at each fall of --schedule step."),
    _CLASSIFIER("label_smoothing", "Share of each label spread over all classes."),
    _CLASSIFIER("mixup", "Alpha of mixup; 0 is off."),
    _CLASSIFIER("cutmix", "Alpha of CutMix; 0 is off. With mixup, either by chance."),
    _CLASSIFIER("ema_decay", "Evaluate and save a moving average of the weights; 0 is off."),
    _CLASSIFIER("image_size", "Side in pixels that the network sees; the data's own if small, else 224."),
    _CLASSIFIER("resize", "Shorter side before the centre is cut out for evaluation."),
    _CLASSIFIER("start_size", "Side in the first epochs, growing to --image-size."),
    _CLASSIFIER("growth", "Share of the epochs in which the side grows."),
    _CLASSIFIER("crop", "shift pads and cuts, resized takes a random part; auto: by the size of the images."),
    click.option("--no-crop", "crop", flag_value="none", help="Train on whole images: the same as --crop none."),
    _CLASSIFIER("min_crop_area", "Least share of an image that --crop resized takes."),
    _CLASSIFIER("flip", "Mirror half of the training images."),
    _CLASSIFIER("color_jitter", "Strength of changes in brightness, contrast and saturation."),
    _CLASSIFIER("auto_augment", "torchvision's RandAugment or TrivialAugmentWide."),
    _CLASSIFIER("random_erasing", "Share of the images that a random rectangle is erased from."),
    _CLASSIFIER("flip_evaluation", "At the end also evaluate on images and their mirror images."),
    _CLASSIFIER("data_path", "Pixels on the GPU, pixels mapped into memory, or files decoded each epoch."),
    _CLASSIFIER("num_workers", "Loader processes; one for each core if left out.", "--workers"),
    _CLASSIFIER("deterministic", "Refuse operations that have no deterministic kernel."),
    _CLASSIFIER("limit_train_images", "Use so many train images, spread over the classes."),
    _CLASSIFIER("limit_val_images", "Use so many val images, spread over the classes."),
)
def classifier(preset: str | None, weights: str | None, **values: Any) -> None:
    """Train an image classifier on a prepared image dataset."""
    given = {name: value for name, value in values.items() if value is not None}
    if weights:
        given[_kind_of_weights(weights)] = weights
    submit_training("train_classifier", "arch", **{**(load_preset(preset) if preset else {}), **given})


def _kind_of_weights(weights: str) -> str:
    path = Path(weights)
    if path.is_file():
        return "weights_file"
    if path.suffix in _WEIGHTS_SUFFIXES or ("/" in weights and not weights.startswith("run:")):
        raise click.UsageError(f"--weights: there is no file {weights}")
    return "weights_from"


_LANGUAGE_MODEL = partial(spec_option, LanguageModelJob)


@train.command()
@options(
    _preset("train_language_model"),
    _LANGUAGE_MODEL("model", "The network; needed unless --preset names one."),
    _shared(LanguageModelJob),
    _LANGUAGE_MODEL("optimizer", "adamw, or sgd as the well-known example (then --lr 20, or 5)."),
    _LANGUAGE_MODEL("momentum", "Of SGD."),
    _LANGUAGE_MODEL("embedding_size", "Width of the word embedding.", "--emsize"),
    _LANGUAGE_MODEL("hidden_size", "Width of a recurrent or feed-forward layer.", "--nhid"),
    _LANGUAGE_MODEL("num_layers", "Layers.", "--nlayers"),
    _LANGUAGE_MODEL("num_heads", "Attention heads of the Transformer.", "--nhead"),
    _LANGUAGE_MODEL("dropout", "Share of activations dropped in training."),
    _LANGUAGE_MODEL("embedding_dropout", "Of AWD_LSTM: share of words whose embedding is dropped."),
    _LANGUAGE_MODEL("input_dropout", "Of AWD_LSTM: share of the embedding's output that is dropped."),
    _LANGUAGE_MODEL("hidden_dropout", "Of AWD_LSTM: share of what passes between layers that is dropped."),
    _LANGUAGE_MODEL("weight_dropout", "Of AWD_LSTM: share of the weights from state to state that is dropped."),
    _LANGUAGE_MODEL("activation_penalty", "Penalty on large activations (AR); AWD_LSTM is trained with 2."),
    _LANGUAGE_MODEL("change_penalty", "Penalty on their change from word to word (TAR); AWD_LSTM is trained with 1."),
    _LANGUAGE_MODEL(
        "average_after", "Average the weights once so many epochs have brought nothing; with --schedule constant."
    ),
    _LANGUAGE_MODEL("tied", "Share the weights of embedding and output."),
    _LANGUAGE_MODEL("bptt", "Words in a training window."),
    _LANGUAGE_MODEL("variable_bptt", "Windows of random lengths about --bptt."),
    _LANGUAGE_MODEL("context_length", "Words that a layer of the Transformer looks back; 4 windows if left out."),
    _LANGUAGE_MODEL("clip_norm", "Largest norm of the gradient.", "--clip"),
    _LANGUAGE_MODEL("limit_train_tokens", "Use the first so many words of the train split."),
    _LANGUAGE_MODEL("limit_val_tokens", "Use the first so many words of the valid and test splits."),
    click.option(
        "--dry-run", is_flag=True, help="One update and a short evaluation, as model 'dry-run', to see that all works."
    ),
)
def lm(preset: str | None, dry_run: bool, **values: Any) -> None:
    """Train a word-level language model on a prepared text dataset."""
    given = {name: value for name, value in values.items() if value is not None}
    if dry_run and "model_name" in given:
        raise click.UsageError("--dry-run makes a model called 'dry-run': leave out --name")
    merged = {**(load_preset(preset) if preset else {}), **given}
    submit_training("train_language_model", "model", **(_dried(merged) if dry_run else merged))


def _dried(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` cut down to one update, under a name of their own: no model of use gets a version from it."""
    fields = LanguageModelJob.model_fields
    batch_size, bptt = (values.get(each, fields[each].default) for each in ("batch_size", "bptt"))
    limits = {"epochs": 1, "limit_train_tokens": batch_size * (bptt + 1), "limit_val_tokens": 2 * bptt + 2}
    return {"model_name": "dry-run", **values, **limits}
