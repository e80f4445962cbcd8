"""Runs a function in several processes of a gloo group."""

import multiprocessing
import os

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


def together(work, size, folder, *arguments):
    """``work(folder, *arguments)`` in each of ``size`` processes, which share the default group and ``folder``."""
    arguments = work, size, str(folder), *arguments
    mp.start_processes(_enter, arguments, nprocs=size, start_method="forkserver")


def _enter(rank, work, size, folder, *arguments):
    torch.set_num_threads(1)
    # As torchrun says it to accelerate and transformers.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    work(folder, *arguments)
    dist.barrier()
    dist.destroy_process_group()
