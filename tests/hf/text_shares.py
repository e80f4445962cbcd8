"""A small hybrid, batches for it, and its loss in float64."""

import torch
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
