"""From a checkpoint to a checked file: load, trace, write beside the output, check that very file, rename."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from tandem.checkpoints.card import ClassifierCard, LanguageModelCard, Preprocessing, parse_card
from tandem.checkpoints.files import MODEL_FILE, read_verified
from tandem.checkpoints.tensors import load_checkpoint
from tandem.data.images import decode_image, normalise, resize_and_crop
from tandem.errors import ExportFailed, InvalidImage, InvalidRequest
from tandem.export.check import TOLERANCE, Agreement, Predict, check
from tandem.export.language_check import check_language_model
from tandem.export.language_formats import LANGUAGE_FORMATS, LanguageFormat
from tandem.export.language_programs import state_of
from tandem.export.metadata import describe, describe_language_model
from tandem.export.programs import FORMATS, Format, trace
from tandem.export.request import ExportReport, ExportRequest, LanguageExportReport, check_output, partial_file
from tandem.volume import fsync_directory


def export_model(request: ExportRequest, form: Format | None = None) -> ExportReport:
    """Export as `request` says and return what came of it; where anything is wrong, nothing is written.

    `form` replaces how the file is written and run. Raises CheckpointCorrupt, InvalidRequest (a language model),
    InvalidImage, Conflict (the output is there), and ExportFailed where the network can't be exported, the file is not
    what the network is, or it can't be written.
    """
    form = form or FORMATS[request.format]
    checkpoint = load_checkpoint(request.checkpoint, request.digest)
    card = checkpoint.card
    if not isinstance(card, ClassifierCard):
        raise InvalidRequest(f"{request.label} is a language model", field="model")
    images = load_images(request.images, card.preprocessing)
    program = trace(checkpoint.network, card.preprocessing.image_size)
    with _published(request) as partial:
        form.write(program, describe(card, request.label), partial)
        agreement = check(_eager(checkpoint.network), form.load(partial), images, request.batch_size)
    return _report(request, form, agreement)


def export_any(request: ExportRequest) -> ExportReport | LanguageExportReport:
    """Export what `request` names, whichever kind it is; see export_model and export_language_model."""
    card = parse_card(read_verified(request.checkpoint, (MODEL_FILE,), request.digest)[MODEL_FILE])
    return export_model(request) if card.kind == "classifier" else export_language_model(request)


def export_language_model(request: ExportRequest, form: LanguageFormat | None = None) -> LanguageExportReport:
    """Export as `request` says and return what came of it; where anything is wrong, nothing is written.

    `form` replaces how the file is written and run. Raises what export_model does.
    """
    form = form or LANGUAGE_FORMATS[request.format]
    checkpoint = load_checkpoint(request.checkpoint, request.digest)
    card, vocabulary, network = checkpoint.card, checkpoint.vocabulary, checkpoint.network
    if not isinstance(card, LanguageModelCard) or vocabulary is None:
        raise InvalidRequest(f"{request.label} is a classifier", field="model")
    state, dynamic_time = state_of(network), form.has_dynamic_time(network)
    tensors = [(each.name, each.dtype, each.shape) for each in state]
    document = describe_language_model(card, request.label, vocabulary, tensors, dynamic_time)
    with _published(request) as partial:
        form.write(network, document, partial)
        step = form.load(partial, state)
        agreement = check_language_model(network, step, state, len(vocabulary), dynamic_time)
    return LanguageExportReport(
        model=request.label,
        format=request.format,
        file=str(request.output),
        file_bytes=request.output.stat().st_size,
        opset=form.opset,
        dynamic=("batch", "time") if dynamic_time else ("batch",),
        tolerance=TOLERANCE,
        **vars(agreement),
    )


@contextmanager
def _published(request: ExportRequest) -> Iterator[Path]:
    """Give the name that the file is written under until it is checked; put it in place, or leave nothing."""
    partial = partial_file(request.output, os.getpid())
    try:
        yield partial
        _publish(partial, request)
    except OSError as error:
        raise ExportFailed(f"can't write {request.output}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def load_images(files: tuple[Path, ...], preprocessing: Preprocessing) -> Tensor:
    """Return the images as the network takes them, float32 (N, 3, S, S); raise InvalidImage naming a bad one."""
    return normalise(torch.stack([_load(file, preprocessing) for file in files]), preprocessing)


def _load(file: Path, preprocessing: Preprocessing) -> Tensor:
    try:
        return resize_and_crop(decode_image(file.read_bytes()), preprocessing)
    except OSError as error:
        raise InvalidImage(f"{file} can't be read: {error.strerror}") from error
    except InvalidImage as error:
        raise InvalidImage(f"{file}: {error}") from error


def _eager(network: torch.nn.Module) -> Predict:
    def predict(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = network(images)
        return logits

    return predict


def _publish(partial: Path, request: ExportRequest) -> None:
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    check_output(request.output, request.force)
    partial.replace(request.output)
    fsync_directory(request.output.parent)


def _report(request: ExportRequest, form: Format, agreement: Agreement) -> ExportReport:
    return ExportReport(
        model=request.label,
        format=request.format,
        file=str(request.output),
        file_bytes=request.output.stat().st_size,
        opset=form.opset,
        tolerance=TOLERANCE,
        **vars(agreement),
    )
