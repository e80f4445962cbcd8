"""Convolutions on a GPU: caches, also in CUDA graphs, are as near the model in float64 as the pass without a cache."""

import pytest
import torch
from test_convolution import CONFIGS
from zoo import make

from ka_attention.harness.models.passes import captured
from ka_attention.hf import KACache, KAConfig, KAStaticCache, attach

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LENGTH, PROMPT = 48, 20
HYBRID = KAConfig(pattern="2:1", window=4, gate="head", gate_init=0.5, output_gate=True, convolution=4)


def grown(model, ids):
    cache = KACache(model.config)
    chunks = ids[:, :PROMPT], *ids[:, PROMPT:].split(1, 1)
    return torch.cat([model(chunk, past_key_values=cache).logits for chunk in chunks], 1)


def static(model, ids):
    cache = KAStaticCache(model.config, LENGTH)
    chunks = ids[:, :PROMPT], *ids[:, PROMPT:].split(1, 1)
    return torch.cat([model(chunk, past_key_values=cache).logits for chunk in chunks], 1)


def graphed(model, ids):
    """A static cache whose steps are replays of one CUDA graph; what its capture decoded is taken back before."""
    cache = KAStaticCache(model.config, LENGTH)

    def step(token):
        return model(token, past_key_values=cache).logits

    step(ids[:, :PROMPT])
    replay = captured(step, ids[:, PROMPT : PROMPT + 1])
    cache.reset()
    outs = [step(ids[:, :PROMPT])]
    outs += [replay(token).clone() for token in ids[:, PROMPT:].split(1, 1)]
    return torch.cat(outs, 1)


@pytest.mark.parametrize("ka", [HYBRID, CONFIGS["full"], CONFIGS["windows"]], ids=["hybrid", "full", "windows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", [grown, static, graphed])
@torch.no_grad()
def test_decoding_is_as_near_the_truth_as_the_pass_without_a_cache(way, dtype, ka):
    torch.manual_seed(0)
    model = attach(make("llama", hidden_size=128, initializer_range=0.1), ka).eval().to(dtype)
    ids = torch.randint(model.config.vocab_size, (2, LENGTH))
    truth = model.double()(ids, use_cache=False).logits
    model = model.to("cuda", dtype)

    def error(logits):
        return ((logits.double().cpu() - truth).abs().amax() / truth.abs().amax()).item()

    whole, decoded = error(model(ids.cuda(), use_cache=False).logits), error(way(model, ids.cuda()))
    print(f"{way.__name__} {dtype}: whole {whole:.2g}, decoded {decoded:.2g}")
    assert decoded <= 2 * whole + torch.finfo(dtype).eps


@torch.no_grad()
def test_generate_writes_the_same_with_every_cache():
    torch.manual_seed(0)
    model = attach(make("llama", hidden_size=128, initializer_range=0.1), HYBRID).eval().float().cuda()
    ids = torch.randint(model.config.vocab_size, (3, PROMPT), device="cuda")
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, use_cache=False, **settings)
    for kind in ("dynamic", "static"):  # static: compiled, in CUDA graphs
        assert torch.equal(model.generate(ids, cache_implementation=kind, **settings), want), kind
