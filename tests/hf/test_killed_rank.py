"""A process that is killed in the middle of a step: the others end with an error, and the run resumes."""

import os
import signal
import time

import torch
import torch.distributed as dist
from processes import started, together
from text_shares import Run, make_model
from torch.nn.parallel import DistributedDataParallel

from ka_attention.hf import sequence_parallel, share

STEPS, KILLED = 5, 3  # in the middle of the step after three


def train(folder, killed=None):
    """Goes on after the last step that was saved, and saves every step."""
    group, size = dist.group.WORLD, dist.get_world_size()
    model = sequence_parallel(make_model(), group)
    run = Run(DistributedDataParallel(model), lambda batch: share(batch, group), size)
    done = [step for step in range(1, STEPS + 1) if os.path.exists(f"{folder}/{step}/.metadata")]
    if done:
        run.load(f"{folder}/{done[-1]}")
    for step in range(done[-1] if done else 0, STEPS):
        if step == killed and dist.get_rank() == 1:
            model.gpt_neox.layers[2].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        loss = run.steps(step, step + 1)
        if dist.get_rank() == 0:
            torch.save(loss, f"{folder}/loss-{step}")
        run.save(f"{folder}/{step + 1}")


def test_the_others_end_and_the_run_resumes(tmp_path):
    context = started(train, 3, tmp_path, KILLED)
    began = time.monotonic()
    for process in context.processes:
        process.join(60)
    assert time.monotonic() - began < 60
    codes = [process.exitcode for process in context.processes]
    assert codes == [1, -signal.SIGKILL, 1], codes  # an exception in each of the others
    assert not (tmp_path / str(KILLED + 1)).exists()
    together(train, 3, tmp_path)
    found = torch.cat([torch.load(tmp_path / f"loss-{step}") for step in range(STEPS)])
    assert (found - Run(make_model()).steps(0, STEPS)).abs().max() < 1e-10
