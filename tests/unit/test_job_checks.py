"""What is found wrong with a job at submit, against its data and the registry."""

from typing import Any

import pytest
from factories import publish_classifier, publish_language_model
from samples import write_image_dataset, write_text_dataset

from tandem.data.manifest import ClassName, ImageDataset
from tandem.errors import Conflict, DatasetNotFound, InvalidJob, ModelNotFound, RunNotFound, TandemError
from tandem.jobs.checks import check_job
from tandem.jobs.spec import ClassifierJob, EvaluationJob, make_spec
from tandem.volume import Volume, to_json

TRAIN = {"kind": "train_classifier", "dataset": "shapes", "model_name": "m", "arch": "squeezenet1_1", "batch_size": 16}
EVALUATE = {"kind": "evaluate_classifier", "dataset": "shapes", "model": "known@latest"}

PROMOTE = {**EVALUATE, "kind": "promote_classifier", "alias": "production"}


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    volume = Volume(tmp_path_factory.mktemp("volume"))
    shapes = write_image_dataset(volume, "shapes")
    write_text_dataset(volume, "words")
    for name, packed, ids in (("photos", False, ("a", "b")), ("lonely", True, ("a",))):
        manifest = ImageDataset(
            name=name,
            fingerprint="0" * 64,
            source="test",
            classes=tuple(ClassName(id=each, words=each) for each in ids),
            num_images={"train": 100, "val": 10},
            packed=packed,
        )
        volume.dataset(name).mkdir()
        (volume.dataset(name) / "dataset.json").write_bytes(to_json(manifest.model_dump(mode="json")))
    publish_classifier(volume, "known", "run-a", classes=[each.id for each in shapes.classes])
    publish_language_model(volume, "text", "run-l")
    return volume


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 61}, InvalidJob, "--batch-size: 61 is more than the 60 train images; use at most 60"),
        ({"limit_train_images": 10}, InvalidJob, "--batch-size: 16 is more than the 10 train images; use at most 10"),
        ({"dataset": "lonely"}, InvalidJob, "'lonely' has one class; a classifier needs at least 2"),
        ({"dataset": "words"}, InvalidJob, "--data: 'words' is a dataset of text; this job needs images"),
        ({"dataset": "nothing"}, DatasetNotFound, "no dataset 'nothing'"),
        ({"dataset": "photos", "data_path": "mapped"}, InvalidJob, "--data-path: 'photos' holds large images"),
        ({"resize": 16}, InvalidJob, "--resize: 16 is below the 32 pixels that are cut out"),
        ({"start_size": 64}, InvalidJob, "--start-size: 64 is above the final size of 32 pixels"),
        ({"model_name": "text"}, Conflict, "'text' is a language model; give the classifier another --name"),
        ({"weights_from": "nobody"}, ModelNotFound, "no model 'nobody'"),
        ({"weights_from": "text"}, InvalidJob, "--weights: text is a language model"),
        ({"weights_from": "known", "arch": "resnet18"}, InvalidJob, "use --arch squeezenet1_1 --stem stock"),
        ({"resume_from": "known", "epochs": 1}, InvalidJob, "--resume: known was trained on other data (shapes)"),
        ({**EVALUATE, "dataset": "words"}, InvalidJob, "'words' is a dataset of text"),
        ({**EVALUATE, "model": "text"}, InvalidJob, "text is a language model"),
        ({**EVALUATE, "dataset": "photos"}, InvalidJob, "known:1 does not know the class 'a' of dataset 'photos'"),
        ({**PROMOTE, "alias": "latest"}, InvalidJob, "alias 'latest' moves by itself"),
        ({**PROMOTE, "dataset": "words"}, InvalidJob, "'words' is a dataset of text"),
        ({**PROMOTE, "dataset": "photos", "split": "test"}, DatasetNotFound, "no images in a split 'test'"),
        ({**PROMOTE, "model": "run:run-a/1"}, InvalidJob, "REF: run:run-a/1 is a checkpoint of a run"),
        ({**PROMOTE, "model": "run:nobody"}, RunNotFound, "no run 'nobody'"),
        ({**PROMOTE, "against": "text"}, InvalidJob, "text is a language model"),
        ({**PROMOTE, "against": "run:run-a/1"}, InvalidJob, "--if-better-than: run:run-a/1 is a checkpoint of a run"),
        ({**EVALUATE, "split": "test"}, DatasetNotFound, "no images in a split 'test' (there: train, val)"),
    ],
)
def test_what_can_not_work_is_refused_with_the_remedy(
    volume: Volume, changes: dict[str, Any], error: type[TandemError], message: str
) -> None:
    spec = make_spec(changes if "kind" in changes else {**TRAIN, **changes})
    with pytest.raises(error) as caught:
        check_job(spec, volume)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_references_become_definite(volume: Volume) -> None:
    training = check_job(make_spec({**TRAIN, "weights_from": "known@latest"}), volume)
    assert isinstance(training, ClassifierJob)
    assert training.weights_from == "known:1"
    evaluation = check_job(make_spec(EVALUATE), volume)
    assert isinstance(evaluation, EvaluationJob)
    assert evaluation.model == "known:1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_epoch": 10}, "start_epoch 10 must be below epochs (10)"),
        ({"arch": "mobilenet_v2", "stem": "small"}, "stem small is for networks of the ResNet family"),
        ({"batch_size": 6, "accumulation": 4}, "batch_size 6 gives less than 2 images to each of its 4 parts"),
        ({"start_size": 80, "image_size": 64}, "start_size 80 is above image_size (64)"),
        ({"resize": 32, "image_size": 64}, "resize 32 is below image_size (64)"),
        ({"data_path": "device", "auto_augment": "randaugment"}, "data_path device can crop and flip only"),
        ({"data_path": "device", "device": "cpu"}, "data_path device is for a GPU"),
        ({"num_devices": 2, "device": "cuda:1"}, "with num_devices 2 give cpu or cuda"),
        ({"weights_from": "a", "resume_from": "b"}, "exclude one another"),
    ],
)
def test_options_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        make_spec({**TRAIN, **changes})
    assert message in str(caught.value)


def test_a_job_without_a_network_says_which_option_is_missing() -> None:
    with pytest.raises(InvalidJob, match="--arch is missing"):
        make_spec({name: value for name, value in TRAIN.items() if name != "arch"})
