"""Recurrent peers: equal parameters and stated states; with flash-linear-attention there, its layers and their sums."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ka_attention.errors import UserError
from ka_attention.harness.models.arms import arm, build
from ka_attention.harness.run.settings import ModelSettings
from ka_attention.studies.window import peers
from ka_attention.studies.window.recipes import window_arm

SETTINGS = ModelSettings(vocab_size=512, hidden_size=64, layers=2, heads=4, intermediate_size=256)


def peer(name):
    return peers.Peer(name, peers.KINDS[name], mixer=name)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


class Sums(nn.Module):
    """A stand-in of a recurrent layer, called as flash-linear-attention's are."""

    def __init__(self, size, width):
        super().__init__()
        self.up, self.down = nn.Linear(size, width), nn.Linear(width, size)

    def forward(self, x):
        return self.down(self.up(x).cumsum(1)), None, None


@pytest.mark.parametrize("width", [8, 200])  # layers smaller and larger than attention
def test_mlps_make_up_for_the_parameters_of_other_layers(monkeypatch, width):
    monkeypatch.setattr(peers, "_mixer", lambda name, size, heads: peers.Mixer(Sums(size, width)))
    softmax = build(arm("softmax"), SETTINGS, 0)
    before = copy.deepcopy(softmax)
    model = peer("deltanet").install(softmax)
    assert abs(parameters(model) / parameters(before) - 1) < 0.02
    assert torch.equal(model.get_input_embeddings().weight, before.get_input_embeddings().weight)
    for layer in model.gpt_neox.layers:
        assert layer.mlp.dense_h_to_4h.out_features == model.config.intermediate_size
        assert 0.015 < layer.attention.layer.up.weight.std() < 0.025  # initialised as the rest is
        assert layer.attention.layer.up.bias.count_nonzero() == 0
    ids = torch.arange(20).view(1, 20)
    logits = model(input_ids=ids, use_cache=False).logits
    ids = ids.clone()
    ids[0, 10] += 1
    changed = (model(input_ids=ids, use_cache=False).logits != logits).any(-1)[0]
    assert changed.tolist() == [False] * 10 + [True] * 10


def test_a_layer_that_leaves_nothing_to_the_mlps_is_refused(monkeypatch):
    monkeypatch.setattr(peers, "_mixer", lambda name, size, heads: peers.Mixer(Sums(size, 2000)))
    with pytest.raises(UserError, match="--set intermediate_size: expected more than"):
        build(peer("gla"), SETTINGS, 0)


def test_a_recurrent_state_weighs_as_much_as_half_a_head_of_cached_tokens():
    config = SETTINGS.config()
    tokens = config.hidden_size // config.num_attention_heads // 2
    cached = 2 * tokens * config.hidden_size * 4 * config.num_hidden_layers  # keys and values, float32
    assert peer("gla").state_bytes(config) == cached
    assert cached < peer("mamba2").state_bytes(config) < peer("deltanet").state_bytes(config)


def test_peers_need_their_library_and_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--set arms: mamba2 needs a CUDA device and flash-linear-attention"):
        window_arm("mamba2", 2)


@pytest.mark.parametrize("name", peers.KINDS)
def test_the_layers_of_the_library_are_counted_right(name):
    pytest.importorskip("fla.layers", reason="flash-linear-attention is not installed")
    softmax = parameters(build(arm("softmax"), SETTINGS, 0))
    model = peer(name).install(build(arm("softmax"), SETTINGS, 0))
    assert abs(parameters(model) / softmax - 1) < 0.02
    layer = model.gpt_neox.layers[0].attention.layer
    convolved = sum(m.in_channels for m in layer.modules() if isinstance(m, nn.Conv1d))
    size, heads = SETTINGS.hidden_size, SETTINGS.heads
    numbers = size * size // heads + convolved * (peers.KERNEL - 1)
    assert peer(name).state_bytes(model.config) == 4 * SETTINGS.layers * numbers


def test_mamba2_is_computed_as_its_layer_computes_it(monkeypatch):
    ops = pytest.importorskip("fla.ops.simple_gla", reason="flash-linear-attention is not installed")
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    class Norm(nn.Module):
        def forward(self, x, gate):
            return F.normalize(x * F.silu(gate), dim=-1)

    monkeypatch.setattr(
        ops, "fused_recurrent_simple_gla", lambda q, k, v, g, scale: naive_recurrent_simple_gla(q, k, v, g, scale)
    )
    mixer = peers._mixer("mamba2", 64, 2)
    mixer.layer.norm, mixer.layer.act, mixer.layer.chunk_size = Norm(), F.silu, 16
    x = torch.randn(2, 50, 64)
    torch.testing.assert_close(mixer.mix(x), mixer.layer.torch_forward(x)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", peers.KINDS)
def test_peers_are_causal_and_learn(name):
    pytest.importorskip("fla.layers", reason="flash-linear-attention is not installed")
    model = peer(name).install(build(arm("softmax"), SETTINGS, 0)).cuda()
    ids = torch.randint(512, (2, 128), device="cuda")
    changed = ids.clone()
    changed[:, 100] = (ids[:, 100] + 1) % 512
    with torch.no_grad():
        a, b = (model(input_ids=x, use_cache=False).logits for x in (ids, changed))
    assert torch.equal(a[:, :100], b[:, :100])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
