"""Adapters: the closed form is least squares, the identity is the swap, fitting lowers what it minimises."""

import pytest
import torch
import zoo

from ka_attention.conversion.fitting import LeastSquares, fit_gradient, fit_ridge, new_adapters, states
from ka_attention.errors import UserError
from ka_attention.hf import KAConfig, attention_modules, load_adapter, save_adapter, use
from ka_attention.hf.adapters import LinearAdapter, MLPAdapter


@pytest.fixture
def model():
    return zoo.make("llama")


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_ridge_solves_the_normal_equations(strength):
    """At the solution the gradient of Σ ‖M x + b c − y‖² + λ ‖M − I‖² is 0, here by autograd in float64."""
    x, y = torch.randn(2, 3, 7, 4).double(), torch.randn(2, 3, 7, 4).double()
    c = torch.rand(2, 3, 7, 1).double()
    problem = LeastSquares()
    for half in range(2):  # pieces add up to the whole
        problem.add(x[half, None], c[half, None], y[half, None])
    M, b = (t.requires_grad_() for t in problem.solve(strength))
    penalty = strength * x.square().sum((0, 2)).mean(-1)[:, None, None]
    error = torch.einsum("hed,bhtd->bhte", M, x) + b[:, None] * c - y
    (error.square().sum() + (penalty * (M - torch.eye(4)).square()).sum()).backward()
    assert M.grad.abs().max() < 1e-10
    assert b.grad.abs().max() < 1e-10


def test_states_are_the_models_own(model):
    ids, seen = zoo.tokens(), {}
    expected = logits(model, ids)
    with states(model, lambda layer, w, v, a: seen.update({layer: (w, v, a)})):
        found = logits(model, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert sorted(seen) == [0, 1, 2]
    w, v, a = seen[0]
    assert w.shape == (2, 4, 12, 12)
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 4, 12).double())
    torch.testing.assert_close(w @ v, a)
    assert logits(model, ids).equal(expected)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_fresh_adapter_is_the_swap(model, kind):
    ids = zoo.tokens()
    with use(model):
        swap = logits(model, ids)
    with use(model, adapter=new_adapters(model, kind)):
        torch.testing.assert_close(logits(model, ids), swap, rtol=0, atol=1e-10)


def test_every_token_has_its_own_gate(model):
    """An adapter that changes nothing leaves the token loop with what the operator computes from the same gates."""
    ids, found = zoo.tokens(), []
    for adapter in (None, lambda layer: torch.nn.Identity()):
        with use(model, gate="token", gate_init=0.5, adapter=adapter), torch.no_grad():
            for module in attention_modules(model):
                torch.manual_seed(module.layer_idx)
                module.ka_gate.weight.normal_()
            found.append(logits(model, ids))
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


def test_an_adapter_that_knows_the_value_is_softmax(model):
    """With a window of 1 each output is its token's value, so the identity repairs everything, and ridge finds it."""
    found = {}
    for module in attention_modules(model):
        module.q_proj.weight.data *= 100
        module.k_proj.weight.data = module.q_proj.weight.data[: module.k_proj.weight.shape[0]].clone()
    adapters = fit_ridge(model, zoo.tokens(8, 12), loss="value", strength=1e-9)
    with states(model, lambda layer, w, v, a: found.update({layer: (adapters[layer](a) - v, a - v)})):
        logits(model, zoo.tokens(8, 12))
    for fitted, swapped in found.values():
        assert fitted.square().sum() <= swapped.square().sum() * (1 + 1e-9)


@pytest.mark.parametrize("loss", ["value", "output"])
def test_ridge_is_the_least_error_on_its_own_text(model, loss):
    """No gradient step from the closed form without penalty lowers its loss; from the swap it does."""
    ids = zoo.tokens(16, 12)
    best = fit_ridge(model, ids, loss=loss, strength=0.0)

    def error(adapters):
        total = []

        def visit(layer, w, v, a):
            left = adapters[layer](a) - v
            total.append((w.tril(-1) @ left if loss == "output" else left).square().sum())

        with states(model, visit):
            logits(model, ids)
        return torch.stack(total)

    swap = new_adapters(model, "linear")
    assert (error(best) < error(swap)).all()
    for adapter in best.values():
        adapter.weight.data += 1e-2 * torch.randn_like(adapter.weight)
    least = error(fit_ridge(model, ids, loss=loss, strength=0.0))
    assert (least < error(best)).all()


@pytest.mark.parametrize(("kind", "loss"), [("linear", "value"), ("mlp", "output"), ("linear", "lm")])
def test_training_lowers_the_loss_and_leaves_the_model_alone(model, kind, loss):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters = new_adapters(model, kind)
    ids = zoo.tokens(4, 10)
    history = fit_gradient(model, ids, adapters, loss=loss, steps=12, batch_size=4, learning_rate=3e-2)
    assert history[-1] < 0.95 * history[0]
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_trained_adapter_is_saved_and_loaded(model, tmp_path):
    ids = zoo.tokens()
    adapters = fit_ridge(model, ids)
    with use(model, adapter=adapters):
        expected = logits(model, ids)
        save_adapter(model, tmp_path)
    load_adapter(model, tmp_path)
    # Saved in float32, whatever the model's precision is.
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)


def test_a_mask_of_heads_runs_from_softmax_to_ka(model):
    from ka_attention.conversion.raising import set_gates

    ids = zoo.tokens()
    softmax = logits(model, ids)
    with use(model):
        swap = logits(model, ids)
    with use(model, KAConfig(gate="head", gate_init=0.0)):
        torch.testing.assert_close(logits(model, ids), softmax, rtol=0, atol=1e-10)
        set_gates(model, 1.0)
        torch.testing.assert_close(logits(model, ids), swap, rtol=0, atol=1e-10)
        gates = torch.zeros(3, 4)
        gates[1, 2] = 1.0
        set_gates(model, gates)
        one = logits(model, ids)
        assert not torch.allclose(one, softmax)
        assert [m.ka_gate(None).tolist() for m in attention_modules(model)] == gates.tolist()
    with use(model, layers=(1,), gate="head", gate_init=0.0):
        attention_modules(model)[1].ka_gate.bias.data[2] = 1.0
        torch.testing.assert_close(logits(model, ids), one, rtol=0, atol=1e-10)


def test_wrong_requests_name_what_is_allowed(model):
    with pytest.raises(ValueError, match=r"unknown kind 'cubic', known are \['linear', 'mlp'\]"):
        new_adapters(model, "cubic")
    with pytest.raises(ValueError, match="loss: expected 'value' or 'output' for the closed form, got 'lm'"):
        fit_ridge(model, zoo.tokens(), loss="lm")


@pytest.mark.parametrize("adapter", [LinearAdapter(2, 4), MLPAdapter(2, 4, 3)])
def test_an_adapter_keeps_shape_and_dtype_and_treats_tokens_alone(adapter):
    for parameter in adapter.parameters():
        parameter.data.normal_()
    a = torch.randn(1, 2, 5, 4)
    assert adapter(a.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(adapter(a)[:, :, 3:4], adapter(a[:, :, 3:4]))


def test_a_fit_that_is_not_finite_stops_with_the_adapters_of_the_step_before(model):
    adapters = new_adapters(model, "linear")
    good = {i: {name: p.clone() for name, p in a.named_parameters()} for i, a in adapters.items()}
    attention_modules(model)[1].v_proj.weight.data.fill_(torch.nan)
    with pytest.raises(
        UserError, match=r"^adapt: the loss is not finite \(nan\) in step 1, .* try a learning rate below"
    ):
        fit_gradient(model, zoo.tokens(8), adapters, steps=2, batch_size=4)
    assert all(p.equal(good[i][name]) for i, a in adapters.items() for name, p in a.named_parameters())
    with pytest.raises(UserError, match=r"^adapt: layer 1 has no finite solution"):
        fit_ridge(model, zoo.tokens(8))
