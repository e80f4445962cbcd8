"""Runs a function in several processes of a gloo group."""

import multiprocessing
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# One process imports what takes seconds, and those of all tests are forked from it.
multiprocessing.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "transformers.trainer",
        "transformers.models.gpt_neox.modeling_gpt_neox",
        "transformers.models.llama.modeling_llama",
        "ka_attention.hf",
    ]
)


def started(work, size, folder, *arguments):
    """The context of ``size`` new processes that run ``work(folder, *arguments)`` each, with one group of them all."""
    store = tempfile.mkdtemp(dir=folder)
    arguments = work, size, store, str(folder), *arguments
    return mp.start_processes(_enter, arguments, nprocs=size, start_method="forkserver", join=False)


def together(work, size, folder, *arguments):
    """The same, until all have ended; an exception in one of them is raised here."""
    context = started(work, size, folder, *arguments)
    while not context.join():
        pass


def _enter(rank, work, size, store, folder, *arguments):
    torch.set_num_threads(1)
    # As torchrun says it to accelerate and transformers.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    dist.init_process_group("gloo", store=dist.FileStore(f"{store}/store", size), rank=rank, world_size=size)
    work(folder, *arguments)
    dist.barrier()
    dist.destroy_process_group()
