"""Several processes for one run: how they are started, and how they meet.

`python -m services.trainer.distributed RUN_DIRECTORY --attempt N --parent PID --processes K` is torchrun on this
machine, as a library: the kernel ends it with the supervisor, and it ends the ranks. By hand, torchrun itself will do:

    torchrun --standalone --nproc-per-node 2 -m services.trainer.run RUN_DIRECTORY --attempt 1
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

from services.trainer.engine.ranks import ALONE, Ranks
from tandem.processes import die_with_parent


def join_ranks(wants_gpu: bool) -> Ranks:
    """Return this process's place among those that torchrun started; ALONE where it was started by itself.

    Gradients go over NCCL between GPUs and over gloo between CPUs; decisions always over gloo, so that none of them
    waits for a device.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    on_gpu = wants_gpu and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    control = dist.new_group(backend="gloo") if on_gpu else dist.group.WORLD
    return Ranks(dist.get_rank(), size, control)


def leave_ranks() -> None:
    """Close the connections to the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_contact(error: BaseException) -> bool:
    """Return whether `error` came of the connections between the processes."""
    # gloo raises plain RuntimeErrors.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def main() -> None:
    """Start the processes of a run and wait for them; exit 0 if all did."""
    from torch.distributed.run import main as torchrun

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--parent", type=int, default=os.getppid())
    parser.add_argument("--processes", type=int, required=True)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    # Else torchrun gives each process one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // arguments.processes, 1)))
    this = ["-m", "services.trainer.run", str(arguments.run), "--attempt", str(arguments.attempt)]
    torchrun(["--standalone", "--nproc-per-node", str(arguments.processes), *this])


if __name__ == "__main__":
    main()
