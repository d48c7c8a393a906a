"""From a job spec to a training run: the process set up, the data opened, and the right kind of job made."""

import os
import shutil

import torch

from services.trainer.classifier_job import classifier_job
from services.trainer.engine.ranks import ALONE, Ranks
from services.trainer.job import Job
from services.trainer.language_model_job import language_model_job
from tandem.data.manifest import ImageDataset, TextDataset, read_dataset
from tandem.data.randomness import derive_seed
from tandem.errors import InvalidJob, TrainingFailed
from tandem.jobs.spec import ClassifierJob, LanguageModelJob, TrainingSpec
from tandem.models.devices import resolve_device
from tandem.volume import Volume


def assemble(spec: TrainingSpec, volume: Volume, run_id: str, ranks: Ranks = ALONE) -> Job:
    """Return the job of `spec`; raise TandemError where data, network and device don't fit together."""
    if ranks.size > 1 and spec.num_devices != ranks.size:
        raise InvalidJob(f"torchrun started {ranks.size} processes; the job's num_devices says otherwise")
    device = _device(spec, ranks)
    if spec.compile and not shutil.which(os.environ.get("CXX", "g++")):
        raise TrainingFailed("--compile needs a C++ compiler, and there is no g++ here; leave it away, or install one")
    _set_threads(spec.num_threads, ranks)
    _set_determinism(isinstance(spec, ClassifierJob) and spec.deterministic)
    dataset = read_dataset(volume, spec.dataset)
    torch.manual_seed(derive_seed(spec.seed, "weights"))
    if isinstance(spec, ClassifierJob) and isinstance(dataset, ImageDataset):
        return classifier_job(spec, dataset, volume, run_id, device, ranks)
    if isinstance(spec, LanguageModelJob) and isinstance(dataset, TextDataset):
        return language_model_job(spec, dataset, volume, run_id, device, ranks)
    raise InvalidJob(f"dataset {spec.dataset!r} holds {dataset.kind}, which {spec.kind} can't use")


def _device(spec: TrainingSpec, ranks: Ranks) -> torch.device:
    device = resolve_device(spec.device)
    if ranks.size == 1 or device.type == "cpu":
        return device
    if ranks.size > torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise InvalidJob(f"--num-devices {ranks.size}: there are {there} GPUs here; use --num-devices {there}")
    return torch.device("cuda", torch.cuda.current_device())


def _set_threads(num_threads: int | None, ranks: Ranks) -> None:
    if num_threads:
        torch.set_num_threads(num_threads)
    elif ranks.size > 1:
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // ranks.size, 1))


def _set_determinism(strict: bool) -> None:
    """Have equal runs give equal bytes: on a GPU kernels that do not add up in the order of chance.

    That much is always so, and lets a run resume exactly. `strict` makes torch refuse the operations that it has no
    deterministic kernel for (the backward pass of adaptive pooling, in AlexNet and VGG).
    """
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if strict:
        # cuBLAS reads it when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
