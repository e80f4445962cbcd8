from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from ka_attention import KAAttention, ka_attention

GATES = {"gate": 0.4, "learn_gate": True}
LAYERS = {
    "plain": {},
    "grouped, window": {"num_kv_heads": 2, "window": 3},
    "learned gate, window of one": {**GATES, "window": 1},
    "signed gate": {"gate": -0.5, "learn_gate": True, "gate_bounds": (-1.0, 1.0), "window": 5},
    "output gate": {"output_gate": True, "num_kv_heads": 1},
    "everything": {**GATES, "output_gate": True, "num_kv_heads": 2, "window": 4},
}


def rotary(T, R):
    angles = torch.arange(T)[:, None] / 100 ** (torch.arange(0, R, 2, dtype=torch.float64) / R)
    angles = torch.cat([angles, angles], dim=-1)[None]
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("positions", ["none", "pair", "part", "function"])
@pytest.mark.parametrize("name", LAYERS)
def test_cached_steps_equal_the_whole(name, positions):
    options = LAYERS[name]
    layer = KAAttention(32, 4, **options, dtype=torch.float64)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    cos, sin = rotary(9, 4 if positions == "part" else 8)

    def of(start, stop):
        match positions:
            case "none":
                return None
            case "function":
                return lambda q, k: (q * cos[:, None, start:stop], k + sin[:, None, start:stop])
        return cos[:, start:stop], sin[:, start:stop]

    past, steps = None, []
    for start, stop in pairwise((0, 1, 4, 5, 9)):
        out, past = layer.extend(x[:, start:stop], past, position_embeddings=of(start, stop))
        steps.append(out)
    torch.testing.assert_close(torch.cat(steps, dim=1), layer(x, position_embeddings=of(0, 9)))
    kept = 9 if "window" not in options else options["window"] - 1
    assert past[0].shape == (2, options.get("num_kv_heads", 4), kept, 8)
    assert past[1].shape == (2, 4, kept, 8)


def test_learned_gate_trains():
    layer = KAAttention(16, 2, gate=0.0, learn_gate=True)
    assert "gate" in dict(layer.named_parameters())
    layer(torch.randn(1, 5, 16)).square().sum().backward()
    assert layer.gate.grad.abs().max() > 0


def test_learned_gate_stays_in_its_bounds():
    """Beyond them it counts as the bound, and a gradient comes only where it leads back inside."""
    layer, bound = KAAttention(16, 2, learn_gate=True), KAAttention(16, 2, gate=1.0)
    bound.load_state_dict({name: x for name, x in layer.state_dict().items() if name != "gate"})
    x = torch.randn(1, 5, 16)
    layer.gate.data.fill_(1.7)
    torch.testing.assert_close(layer(x), bound(x))
    passed = []
    for sign in (1, -1):
        layer.gate.grad = None
        (sign * layer(x).sum()).backward()
        assert (layer.gate.grad >= 0).all()  # descent goes down, towards 1
        passed.append(layer.gate.grad > 0)
    assert (passed[0] ^ passed[1]).all()


def test_output_gate():
    layer, plain = KAAttention(16, 2, output_gate=True), KAAttention(16, 2)
    plain.load_state_dict({name: x for name, x in layer.state_dict().items() if name != "g_proj.weight"})
    plain.out_proj = torch.nn.Identity()
    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(layer(x), layer.out_proj(F.silu(x @ layer.g_proj.weight.T) * plain(x)))


def test_rotary_embeddings_are_those_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    layer = KAAttention(32, 4, num_kv_heads=2)
    x = torch.randn(2, 7, 32)
    config = llama.LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    cos, sin = llama.LlamaRotaryEmbedding(config)(x, torch.arange(7)[None])
    q, k, v = (proj(x).unflatten(-1, (-1, 8)).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    a = ka_attention(*llama.apply_rotary_pos_emb(q, k, cos, sin), v)
    truth = layer.out_proj(a.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, position_embeddings=(cos, sin)), truth)


@pytest.mark.parametrize("shape", [(7, 8), (2, 6, 8), (3, 7, 8), (1, 7, 7), (1, 7, 10)])
def test_position_embeddings_must_fit(shape):
    with pytest.raises(ValueError, match=r"position_embeddings must be \(cos, sin\), each .* got \["):
        KAAttention(32, 4)(torch.randn(2, 7, 32), position_embeddings=(torch.ones(shape), torch.ones(shape)))


def test_gate_zero_is_multi_head_attention():
    layer, other = KAAttention(16, 2, gate=0.0), torch.nn.MultiheadAttention(16, 2, batch_first=True)
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]))
        other.in_proj_bias.copy_(torch.cat([layer.q_proj.bias, layer.k_proj.bias, layer.v_proj.bias]))
        other.out_proj.load_state_dict(layer.out_proj.state_dict())
    x = torch.randn(2, 7, 16)
    hidden = torch.ones(7, 7).triu(1).bool()
    torch.testing.assert_close(layer(x), other(x, x, x, attn_mask=hidden)[0])


def test_masks_pass_through():
    layer = KAAttention(16, 2)
    x = torch.randn(1, 7, 16)
    real = torch.tensor([[False, False, True, True, True, True, True]])
    torch.testing.assert_close(layer(x, attn_mask=real)[:, 2:], layer(x[:, 2:]))
    packed = layer(x, cu_seqlens=torch.tensor([0, 2, 7], dtype=torch.int32))
    torch.testing.assert_close(packed[:, 2:], layer(x[:, 2:]))


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((30, 4), {}, "embed_dim must be"),
        ((32, 4, 3), {}, "num_heads must be"),
        ((32, 4), {"gate": 1.5}, "gate must be between -1 and 1"),
        ((32, 4), {"gate": -0.5, "learn_gate": True}, r"gate must be between 0.0 and 1.0, .* got -0.5"),
        ((32, 4), {"gate": 1.0, "learn_gate": True, "gate_bounds": (0, 2)}, r"which lie in \[-1, 1\]"),
    ],
)
def test_arguments_must_fit(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        KAAttention(*sizes, **options)
