"""Llama-like hybrids: names of arms, parameters, weights, states; passes compute what the model says."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from transformers import DynamicCache

from ka_attention.errors import UserError
from ka_attention.harness.models.mixers import KERNEL, ShortConvolution, streaming
from ka_attention.harness.models.passes import IGNORED, Passes
from ka_attention.hf import KACache
from ka_attention.studies.hybrid.models import HybridArm, LlamaSettings, arm, build, count, state_bytes
from ka_attention.studies.hybrid.recipes import RECIPES
from ka_attention.studies.hybrid.study import decoder, step

SETTINGS = LlamaSettings(vocab_size=2048, hidden_size=64, layers=4, heads=4, intermediate_size=160)
LENGTH = 24
ARMS = (
    "full",
    "full-gated",
    "canon-gated",
    "3to1-ka-head-w4-gated",
    "3to1-ka-token-w2+3-qkv",
    "3to1-ka-head-w4-gated-bias",
    "3to1-ka-head-w4-gated-qkv-normed",
    "all-ka-head-w4+64-from0-gated",
    "1to1-softmax-w4-gated",
    "all-ka-w1",
    "3to1-conv-gated",
    "3to1-conv-drawn",
    "3to1-none-gated",
    "3to1-gdn-gated",
    "3to1-mamba2-gated",
)


def tokens():
    return torch.randint(SETTINGS.vocab_size, (2, LENGTH + 1))


@pytest.mark.parametrize("name", ARMS)
def test_passes_compute_what_the_model_says_and_its_gradients(name, monkeypatch):
    monkeypatch.setattr("ka_attention.harness.models.passes.CHUNK", 10)  # 48 tokens: chunks of 10, and one of 8
    model, ids = build(arm(name), SETTINGS, LENGTH, 0).double(), tokens()
    targets = ids[:, 1:].clone()
    targets[0, :5] = IGNORED
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    wanted = torch.autograd.grad(want, list(model.parameters()), allow_unused=True)
    passes = Passes(compiled=False)
    found = passes.loss(model, ids[:, :-1], targets)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
    grads = torch.autograd.grad(found, list(model.parameters()), allow_unused=True)
    for parameter, grad, other in zip(model.named_parameters(), grads, wanted, strict=True):
        if other is None or grad is None:  # queries and keys of a window of 1
            assert other is None or not other.any(), parameter[0]
        else:
            torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-12)
    by_token = passes.token_losses(model, ids[:, :-1], targets)
    assert not by_token[0, :5].any()
    torch.testing.assert_close(by_token.sum() / (targets != IGNORED).sum(), found)


def test_one_graph_serves_all_layers_and_models_of_a_shape(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, compile=torch.compile, **k: compile(f, backend="aot_eager", **k))
    torch.compiler.reset()
    counters.clear()
    passes, ids = Passes(compiled=True), tokens()
    settings = replace(SETTINGS, layers=2)
    for seed in (0, 1):
        model = build(arm("1to1-none-gated"), settings, LENGTH, seed)
        passes.loss(model, ids[:, :-1], ids[:, 1:]).backward()
        passes.token_losses(model, ids[:, :-1], ids[:, 1:])
    assert counters["stats"]["unique_graphs"] == 6  # before and after two mixers, the norm, the score
    torch.compiler.reset()


@pytest.mark.parametrize("name", sorted({name for recipe in RECIPES.values() for name in recipe.arms}))
def test_arms_of_the_recipes_are_data(name):
    each = arm(name)
    assert each.output_gate == name.endswith("gated")
    assert (each.window is not None) == ("-w" in name)
    assert each.label


def test_names_of_arms():
    assert arm("3to1-ka-head-w4-fromspread-first-gated-qkv") == HybridArm(
        "ka", 4, "head", "spread", "3to1", first=True, output_gate=True, convolution="qkv"
    )
    added = ", biases on q, k, output gate + conv qkv"
    assert arm("3to1-softmax-w4-gated-qkv-bias").label == f"3:1 softmax, window 4{added}"
    assert arm("full-normed").label == "full softmax, norms on q, k"
    assert arm("3to1-gdn-normed").normed
    assert arm("all-softmax-w4-normed").normed
    assert arm("all-ka-w8").start == 1.0
    assert arm("3to1-ka-token-w2").start == 0.5
    assert arm("canon").convolution == "front"
    assert arm("3to1-ka-w2+4+8").windows(8) == (2, 4, 8, 2, 4, 8)
    assert arm("3to1-ka-w2+4+8").label == "3:1 KA, windows 2+4+8"
    assert arm("3to1-conv-drawn").start == "drawn"
    assert arm("3to1-ka-head-w4-from0-fast-gated").gate_rate == 10.0
    assert arm("3to1-ka-head-w4-from0-fast").label == "3:1 KA, gate per head, window 4, gates from 0, fast gates"
    assert arm("3to1-ka-w4").narrow(8) == (0, 1, 2, 4, 5, 6)
    assert arm("1to1-ka-w4-first").narrow(4) == (1, 3)
    for name in (
        "3to1-ka",
        "3to1-conv-w4",
        "ka-w4",
        "3to1-softmax-w4-from1",
        "full-w4",
        "3to1-ka-w0",
        "3to1-ka-w4-fast",
        *(f"all-{mixer}{part}" for mixer in ("gdn", "conv", "none") for part in ("-qkv", "-bias", "-normed")),
    ):
        with pytest.raises(UserError, match="--set arms"):
            arm(name)


@pytest.mark.parametrize(("name", "millions"), [("quick", 0.64), ("47m", 47.7), ("120m", 128.0)])
def test_arms_of_a_recipe_have_as_many_parameters(name, millions, monkeypatch):
    monkeypatch.setattr("ka_attention.studies.hybrid.models._initialise", lambda *_: None)
    recipe = RECIPES[name]
    with torch.device("meta"):
        for each in ("full", "3to1-ka-token-w4-gated-qkv", "3to1-none-gated", "all-softmax-w8", "3to1-conv-gated"):
            size = count(build(arm(each), recipe, recipe.sequence_length, 0))
            assert size == pytest.approx(millions * 1e6, rel=0.02)


def test_what_two_arms_have_in_common_starts_alike():
    full, hybrid, other = (build(arm(n), SETTINGS, LENGTH, s) for n, s in (("full", 0), ("3to1-ka-w4", 0), ("full", 1)))
    for name, weight in full.named_parameters():
        assert torch.equal(weight, hybrid.get_parameter(name))
        assert torch.equal(weight, other.get_parameter(name)) == (weight.ndim == 1)
    assert full.model.layers[0].self_attn.o_proj.weight.detach().std().item() == pytest.approx(0.02 / 8**0.5, rel=0.1)


@pytest.mark.parametrize("name", ["3to1-gdn", "3to1-mamba2", "3to1-conv-drawn", "canon"])
def test_convolutions_and_decays_are_drawn_by_the_seed(name):
    def drawn(seed):
        layer = build(arm(name), SETTINGS, LENGTH, seed).model.layers[0].self_attn
        return torch.cat([p.flatten() for n, p in layer.named_parameters() if "proj" not in n and "gate" not in n])

    first, again, other = map(drawn, (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    if name == "canon":  # the input itself, and a convolution of it
        weight = build(arm(name), SETTINGS, LENGTH, 0).model.layers[0].self_attn.front.weight
        assert weight[0].mean().item() == pytest.approx(1, abs=0.2)
        assert weight[1:].abs().max().item() == pytest.approx(KERNEL**-0.5, abs=0.05)


def test_gates_start_where_the_arm_says():
    gates = build(arm("3to1-ka-head-w4-fromspread"), SETTINGS, LENGTH, 0).model.layers[1].self_attn.ka_gate.bias
    assert gates.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(
    "name", ["canon-gated", "3to1-ka-head-w4-qkv", "3to1-conv-gated", "3to1-none", "3to1-gdn-gated", "3to1-mamba2"]
)
def test_a_model_reads_on_where_its_state_ends(name):
    model, ids = build(arm(name), SETTINGS, LENGTH, 0).eval(), tokens()[:, :-1]
    for module in model.modules():
        if isinstance(module, ShortConvolution):
            torch.nn.init.normal_(module.weight)
    with torch.no_grad(), streaming(model, 2):
        cache = KACache(model.config) if arm(name).mixer == "ka" else DynamicCache()
        step(model, ids[:, :-2], 0, cache)
        step(model, ids[:, -2:-1], LENGTH - 2, cache)
        found = step(model, ids[:, -1:], LENGTH - 1, cache)
    whole = model(input_ids=ids, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "full-gated",
        "canon",
        "3to1-ka-head-w4-gated",
        "3to1-softmax-w1",
        "3to1-ka-w2+4",
        "3to1-conv",
        "all-ka-w8",
        "3to1-gdn",
    ],
)
def test_a_step_that_is_repeated_is_one_after_the_same_tokens(name):
    model, ids = build(arm(name), SETTINGS, LENGTH, 0).eval(), tokens()[:, :-1]
    with torch.no_grad(), streaming(model, 2):
        read_on = decoder(model, ids[:, :-1])
        found = [read_on(ids[:, -1:]) for _ in range(3 if arm(name).attends and name != "canon" else 1)]
    whole = model(input_ids=ids, use_cache=False).logits[:, -1:]
    for each in found:
        torch.testing.assert_close(each, whole, rtol=1e-4, atol=1e-5)


def test_state_bytes_are_counted():
    token = 2 * 64 * 2  # a key and a value, bfloat16
    assert state_bytes(arm("full"), SETTINGS, 100) == 4 * 100 * token
    assert state_bytes(arm("3to1-ka-w4"), SETTINGS, 100) == (100 + 3 * 3) * token
    assert state_bytes(arm("3to1-softmax-w4"), SETTINGS, 2) == 4 * 2 * token
    assert state_bytes(arm("3to1-ka-w1+4+8"), SETTINGS, 100) == (100 + 0 + 3 + 7) * token
    assert state_bytes(arm("3to1-none"), SETTINGS, 100) == 100 * token
    assert state_bytes(arm("3to1-conv"), SETTINGS, 100) == 100 * token + 3 * (KERNEL - 1) * 64 * 2
    assert state_bytes(arm("canon"), SETTINGS, 100) == 4 * 100 * token + 4 * (KERNEL - 1) * 64 * 2


def test_biases_of_queries_and_keys_weigh_distances_alone():
    model = build(arm("full-bias"), SETTINGS, LENGTH, 0).double()
    attention, h = model.model.layers[0].self_attn, torch.randn(1, LENGTH, 64).double()
    angles = model.model.rotary_emb(h, position_ids=torch.arange(LENGTH)[None])
    for projection in (attention.q_proj, attention.k_proj):
        assert not projection.bias.any()
        torch.nn.init.normal_(projection.bias)
        torch.nn.init.zeros_(projection.weight)
    q, k, _ = attention.before(h, *angles)
    scores = q @ k.mT
    torch.testing.assert_close(scores[..., 1:, 1:], scores[..., :-1, :-1], rtol=1e-4, atol=1e-4)
    assert scores[0, 0, -1].std() > 0.1


def test_norms_of_queries_and_keys_take_away_their_size_alone():
    """Whatever a token's input is multiplied by, q and k stay as they are, of norm √D; weights scale them.

    Llama's RMSNorm computes in float32, whatever the model's dtype.
    """
    model = build(arm("full-normed"), SETTINGS, LENGTH, 0).double()
    attention, h = model.model.layers[0].self_attn, torch.randn(1, LENGTH, 64).double()
    attention.on_qk[0].variance_epsilon = attention.on_qk[1].variance_epsilon = 0.0
    angles = model.model.rotary_emb(h, position_ids=torch.arange(LENGTH)[None])
    q, k, v = attention.before(h, *angles)
    sizes = torch.rand(1, LENGTH, 1).double() + 0.5
    for found, want in zip(attention.before(h * sizes, *angles), (q, k, v * sizes[:, None]), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    for x in (q, k):
        torch.testing.assert_close(x.norm(dim=-1), torch.full_like(x[..., 0], 16**0.5), rtol=1e-6, atol=0)
    attention.on_qk[0].weight.data.fill_(3.0)
    torch.testing.assert_close(attention.before(h, *angles)[0], 3 * q)
    assert torch.equal(attention.before(h, *angles)[1], k)
    with torch.autocast("cpu", torch.bfloat16):
        assert {x.dtype for x in attention.float().before(h.float(), *angles)} == {torch.bfloat16}


def test_a_convolution_starts_as_the_identity_and_reads_no_token_after():
    convolution, x = ShortConvolution(8), torch.randn(1, 10, 8)
    assert torch.equal(convolution(x), x)
    torch.nn.init.normal_(convolution.weight)
    later = x.clone()
    later[:, 6:] += 1
    assert torch.equal(convolution(x)[:, :6], convolution(later)[:, :6])
    want = sum(convolution.weight[i] * x[:, 5 - i] for i in range(KERNEL))
    torch.testing.assert_close(convolution(x)[:, 5], want)
