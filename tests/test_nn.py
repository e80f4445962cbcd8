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
    "convolution": {"convolution": 4, "num_kv_heads": 2},
    "convolution of two, window of one": {"convolution": 2, "window": 1},
    "norms": {"qk_norm": True, "num_kv_heads": 2},
    "everything": {**GATES, "output_gate": True, "num_kv_heads": 2, "window": 4, "convolution": 3, "qk_norm": True},
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


def test_a_convolution_is_that_of_pytorch_on_each_channel():
    layer, plain = KAAttention(16, 2, convolution=3).double(), KAAttention(16, 2).double()
    plain.load_state_dict({name: x for name, x in layer.state_dict().items() if name != "convolution"})
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    joined = torch.cat([proj(x) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)], -1)
    weight = layer.convolution.flip(0).T[:, None]  # PyTorch's last weight is that of the present token
    q, k, v = F.conv1d(F.pad(joined.mT, (2, 0)), weight, groups=48).unflatten(1, (3, 2, 8)).unbind(1)
    truth = layer.out_proj(ka_attention(q.mT, k.mT, v.mT).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), truth)
    layer.convolution.data[1:], layer.convolution.data[0] = 0, 1
    torch.testing.assert_close(layer(x), plain(x))


def test_a_convolution_stays_in_its_packed_sequence():
    layer = KAAttention(16, 2, convolution=4).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([0, 1, 1, 3, 9], dtype=torch.int32)  # shorter than it reads, and one without tokens
    apart = torch.cat([layer(x[:, a:b]) for a, b in pairwise(ends.tolist()) if a < b], 1)
    packed = layer(x, cu_seqlens=ends)
    torch.testing.assert_close(packed, apart)
    of_packed, of_apart = (torch.autograd.grad(y.sin().sum(), (x, layer.convolution)) for y in (packed, apart))
    torch.testing.assert_close(of_packed, of_apart)


def test_a_convolution_takes_no_mask_and_its_own_cache_alone():
    layer, plain = KAAttention(16, 2, convolution=2), KAAttention(16, 2)
    x = torch.randn(1, 3, 16)
    for call in (layer, layer.extend):
        with pytest.raises(ValueError, match="attn_mask must be None with a convolution"):
            call(x, attn_mask=torch.ones(1, 3, dtype=torch.bool))
    for one, other in ((layer, plain), (plain, layer)):
        with pytest.raises(ValueError, match="past must be what extend returned"):
            one.extend(x, other.extend(x)[1])
    with pytest.raises(ValueError, match="convolution must be None or at least 2 tokens, got 1"):
        KAAttention(16, 2, convolution=1)


@pytest.mark.parametrize("normed", [False, True])
def test_it_is_the_attention_of_the_hybrids_with_convolutions_and_norms(normed):
    mixers = pytest.importorskip("ka_attention.harness.models.mixers")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=32, num_attention_heads=4, attn_implementation="ka")
    config.ka_config = {"window": 3, "gate_init": 0.7}
    studied = mixers.HybridAttention(config, 0, output_gate=False, convolution="qkv", normed=normed)
    layer = KAAttention(32, 4, gate=0.7, window=3, convolution=mixers.KERNEL, qk_norm=normed, bias=False)
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer, name).weight.copy_(getattr(studied, name).weight)
        layer.out_proj.weight.copy_(studied.o_proj.weight)
        layer.convolution.copy_(torch.cat([each.weight for each in studied.on_qkv], 1))
        if normed:  # weights other than 1: rotations would leave no trace of an order
            for norm, own in zip(studied.on_qk, (layer.q_norm, layer.k_norm), strict=True):
                own.weight.copy_(norm.weight.uniform_(0.5, 2))
    x = torch.randn(2, 7, 32)
    positions = llama.LlamaRotaryEmbedding(config)(x, torch.arange(7)[None])
    truth = studied.after(*studied.mix(*studied.before(x, *positions)))
    torch.testing.assert_close(layer(x, position_embeddings=positions), truth)


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


def test_gate_zero_with_norms_is_pytorch_attention_of_normed_queries_and_keys():
    layer = KAAttention(32, 4, num_kv_heads=2, gate=0.0, qk_norm=True, dtype=torch.float64)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    q, k, v = (proj(x).unflatten(-1, (-1, 8)).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    normed = []
    for y, norm in ((q, layer.q_norm), (k, layer.k_norm)):
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
        normed.append(y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight)
    a = F.scaled_dot_product_attention(*normed, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(layer(x), layer.out_proj(a.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_norms_train_and_keep_the_dtype_of_autocast(device):
    layer, seen = KAAttention(32, 2, qk_norm=True, device=device), []
    with torch.autocast(device, torch.bfloat16):
        y = layer(torch.randn(1, 5, 32, device=device), position_embeddings=lambda *qk: seen.extend(qk) or qk)
    assert {each.dtype for each in (y, *seen)} == {torch.bfloat16}
    y.float().square().sum().backward()
    assert all(norm.weight.grad.abs().max() > 0 for norm in (layer.q_norm, layer.k_norm))


def test_norms_in_float32_leave_queries_and_keys_in_the_dtype_of_values(monkeypatch):
    """As under autocast on CUDA, which a CPU does otherwise."""
    norm = torch.nn.RMSNorm.forward
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: norm(self, x).float())
    layer, seen = KAAttention(32, 2, qk_norm=True, dtype=torch.bfloat16), []
    layer(torch.randn(1, 5, 32).bfloat16(), position_embeddings=lambda *qk: seen.extend(qk) or qk)
    assert [each.dtype for each in seen] == [torch.bfloat16] * 2


def test_all_parameters_are_where_and_of_the_dtype_that_was_asked_for():
    layer = KAAttention(32, 4, **LAYERS["everything"], device="meta", dtype=torch.bfloat16)
    assert {(each.device.type, each.dtype) for each in layer.parameters()} == {("meta", torch.bfloat16)}


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
