"""Text that is too short for the batch or the window: refused at submit, and where training reads it."""

import pytest
import torch
from samples import write_text_dataset

from tandem.data.corpus import columns, num_windows, windows
from tandem.data.manifest import TextDataset
from tandem.errors import InvalidJob, TrainingFailed
from tandem.jobs.checks import check_job, check_text_length
from tandem.jobs.spec import make_spec
from tandem.volume import Volume, to_json

TRAIN = {"kind": "train_language_model", "dataset": "text", "model_name": "m", "model": "LSTM"}


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    volume = Volume(tmp_path_factory.mktemp("volume"))
    dataset = write_text_dataset(volume, "text")
    lacking = TextDataset(**{**dataset.model_dump(), "name": "lacking", "num_tokens": {"train": 500, "valid": 1}})
    volume.dataset("lacking").mkdir()
    (volume.dataset("lacking") / "dataset.json").write_bytes(to_json(lacking.model_dump(mode="json")))
    return volume


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 51}, "--batch-size: 51 is too wide for the 100 train tokens; use at most 50"),
        ({"batch_size": 1, "bptt": 100}, "--bptt: 100 is longer than the 100 train tokens; use at most 99"),
        ({"dataset": "lacking"}, "--data: 'lacking' has no text in its valid split"),
    ],
)
def test_what_does_not_fit_the_text_is_refused_at_submit(
    volume: Volume, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidJob) as caught:
        check_job(make_spec({**TRAIN, "limit_train_tokens": 100, **changes}), volume)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_limit_the_manifest_counts(volume: Volume) -> None:
    with pytest.raises(InvalidJob, match="--batch-size: 99999 is too wide for the 2,"):
        check_job(make_spec({**TRAIN, "batch_size": 99_999}), volume)


def test_what_fits_passes(volume: Volume) -> None:
    for changes in ({"batch_size": 50, "bptt": 35}, {"batch_size": 1, "bptt": 99}):
        spec = make_spec({**TRAIN, "limit_train_tokens": 100, **changes})
        assert check_job(spec, volume) == spec


@pytest.mark.parametrize(("num_tokens", "batch_size"), [(0, 1), (1, 1), (39, 20), (100, 51)])
def test_the_check_and_the_training_agree(num_tokens: int, batch_size: int) -> None:
    with pytest.raises(InvalidJob, match="--batch-size"):
        check_text_length(num_tokens, batch_size, 1)
    with pytest.raises(TrainingFailed, match=f"the text has {num_tokens} tokens, too few for a batch of {batch_size}"):
        columns(torch.arange(num_tokens), batch_size)


def test_windows_are_as_long_as_the_rows_where_bptt_is_longer() -> None:
    check_text_length(40, 20, 35)
    rows = columns(torch.arange(40), 20)
    assert num_windows(rows.shape[1], 35) == 1
    ((inputs, targets),) = windows(rows, 35)
    assert inputs.shape == targets.shape == (20, 1)
