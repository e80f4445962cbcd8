"""Fine-tuning of attached models: wrapped projections as PEFT makes them, recomputed activations, mixed precision."""

import pytest
import torch
from torch import nn
from zoo import make, tokens

from ka_attention.hf import KACache, KAConfig, KAStaticCache, attach, attention_modules


class LoRA(nn.Module):
    """A linear layer of the base model, frozen, plus a product of two small ones: what PEFT puts in its place."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))

    def merged(self):
        self.base_layer.weight.data += self.up.weight.data @ self.down.weight.data
        return self.base_layer


def greedy(model, ids):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)


def step(model, ids, learning_rate=0.1):
    """One step of gradient descent; the loss before it."""
    loss = model(ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= learning_rate * parameter.grad
                parameter.grad = None
    return loss.item()


def test_wrapped_projections_train_merge_and_generate():
    model, ids = attach(make("llama", initializer_range=0.05), KAConfig(gate="head", gate_init=0.5)), tokens()
    model.double().requires_grad_(False)
    for module in attention_modules(model):
        module.q_proj, module.v_proj = LoRA(module.q_proj).double(), LoRA(module.v_proj).double()
        module.ka_gate.requires_grad_(True)
    losses = [step(model, ids) for _ in range(4)]
    assert losses[-1] < losses[0] - 1e-3
    assert all((m.ka_gate.bias != 0.5).all() and m.v_proj.up.weight.abs().sum() > 0 for m in attention_modules(model))
    with torch.no_grad():
        wrapped, text = model(ids, use_cache=False).logits, greedy(model, ids)
        for module in attention_modules(model):
            module.q_proj, module.v_proj = module.q_proj.merged(), module.v_proj.merged()
        assert (model(ids, use_cache=False).logits - wrapped).abs().max() < 1e-11
    assert greedy(model, ids).equal(text)


@pytest.mark.parametrize("family", ["gpt_neox", "gemma3_text"])
def test_recomputed_activations_give_the_same_gradients(family):
    """With use_cache left at its default, where a model would fill a cache of its own in the first pass."""
    ids, gradients = tokens(), []
    for recompute in (False, True):
        model = attach(make(family), KAConfig(window=6, gate="token", gate_init=0.5)).double().train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("ka", [KAConfig(), KAConfig(window=4)], ids=["full", "window"])
@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_caches_agree_under_autocast(family, ka):
    """Growing and static caches hold the same rounded keys and outputs, so their logits differ by rounding alone."""
    model, ids = attach(make(family, initializer_range=0.05).float(), ka), tokens()
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
        with torch.autocast("cpu", torch.bfloat16):
            whole = model(ids, use_cache=False).logits
            budget = 2 * (whole - exact).abs().max()
            for cache in (KACache(model.config), KAStaticCache(model.config, 15)):
                chunks = [model(part, past_key_values=cache).logits for part in ids.split([5, 1, 1, 3, 2], 1)]
                assert (torch.cat(chunks, 1) - exact).abs().max() < budget
