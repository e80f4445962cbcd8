import pytest
import torch

from ka_attention import KAAttention


@pytest.mark.parametrize(
    "options", [{}, {"num_kv_heads": 2, "window": 3}, {"gate": 0.4, "learn_gate": True, "window": 1}]
)
def test_cached_steps_equal_the_whole(options):
    layer = KAAttention(32, 4, **options, dtype=torch.float64)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    past, steps = None, []
    for chunk in x.split([1, 3, 1, 4], dim=1):
        out, past = layer.extend(chunk, past)
        steps.append(out)
    torch.testing.assert_close(torch.cat(steps, dim=1), layer(x))
    kept = 9 if "window" not in options else options["window"] - 1
    assert past[0].shape == (2, options.get("num_kv_heads", 4), kept, 8)
    assert past[1].shape == (2, 4, kept, 8)


def test_learned_gate_trains():
    layer = KAAttention(16, 2, gate=0.0, learn_gate=True)
    assert "gate" in dict(layer.named_parameters())
    layer(torch.randn(1, 5, 16)).square().sum().backward()
    assert layer.gate.grad.abs().min() > 0


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


@pytest.mark.parametrize(("sizes", "message"), [((30, 4), "embed_dim must be"), ((32, 4, 3), "num_heads must be")])
def test_sizes_must_divide(sizes, message):
    with pytest.raises(ValueError, match=message):
        KAAttention(*sizes)
