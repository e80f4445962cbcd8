"""A small hybrid, batches for it, its loss in float64, and a training that can be saved and loaded."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ka_attention.hf import KAConfig, attach

STEPS, LENGTH = 20, 24
HYBRID = KAConfig(pattern="3:1", window=4, gate="head", gate_init=0.5)


def make_model(ka=HYBRID, **changes):
    """In float64 throughout, which a Llama is not: its norms are in float32."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=17,
        hidden_size=24,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=6,
        **changes,
    )
    return attach(GPTNeoXForCausalLM(config), ka).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        ids = torch.randint(17, (2, LENGTH), generator=generator)
        yield {"input_ids": ids, "labels": ids.where(torch.rand(ids.shape, generator=generator) < 0.8, -100)}


def shifted(batch):
    """The whole batch as ``share`` gives it to a group of one process."""
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return batch | {"shift_labels": labels, "num_items_in_batch": (labels != -100).sum()}


def loss_of(model, batch, items):
    """The loss of transformers, which computes it in float32, in float64; ``items`` tokens make a mean."""
    out = model(**batch)
    logits, labels = out.logits.flatten(0, 1), batch["shift_labels"].flatten()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / items
    assert torch.isclose(out.loss.double(), loss, rtol=1e-5)
    return loss


class Run:
    """A training that can be saved and loaded between any two steps, in any number of processes."""

    def __init__(self, model, part=shifted, size=1):
        self.model, self.part, self.size = model, part, size
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def steps(self, first, last):
        losses = []
        for batch in list(batches())[first:last]:
            items = shifted(batch)["num_items_in_batch"].item() / self.size
            loss = loss_of(self.model, self.part(batch) | {"num_items_in_batch": items}, items)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        found = torch.stack(losses)
        if self.size > 1:
            dist.all_reduce(found)
        return found / self.size

    def state(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, folder):
        dcp.save(self.state(), checkpoint_id=folder, no_dist=self.size == 1)

    def load(self, folder):
        state = self.state()
        dcp.load(state, checkpoint_id=folder, no_dist=self.size == 1)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return self
