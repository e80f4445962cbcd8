"""PEFT: adapters of KA models are made for them, and load onto nothing else."""

import pytest
import torch
from conftest import ka_model, logits, softmax_model

from ka_attention.hf import KAConfig, attach, attention_modules, is_attached, load_adapter, save_adapter

peft = pytest.importorskip("peft", reason="make test-versions has an environment with PEFT")


def adapted(model, **settings):
    """A model with a LoRA that does something."""
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    return model


def test_default_target_modules_are_those_of_the_model_type():
    model = adapted(ka_model())
    names = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert names == {"q_proj", "v_proj"}
    assert peft.get_peft_model(softmax_model(), peft.IA3Config(task_type="CAUSAL_LM"))
    assert peft.get_peft_model(ka_model(), peft.IA3Config(task_type="CAUSAL_LM"))


def test_an_adapter_of_a_saved_ka_model_loads_with_it(folder, tmp_path):
    model = adapted(ka_model().from_pretrained(folder))
    model.save_pretrained(tmp_path / "lora")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()
    assert is_attached(again)
    assert torch.equal(logits(again), logits(model))


def test_an_adapter_of_an_attached_model_does_not_load_onto_the_softmax_model(tmp_path):
    softmax_model().save_pretrained(tmp_path / "base")
    base = type(softmax_model()).from_pretrained(tmp_path / "base").eval()
    model = adapted(attach(base, KAConfig()))
    model.save_pretrained(tmp_path / "lora")
    with pytest.raises(OSError, match=r"attach it, then PeftModel\.from_pretrained"):
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    base = attach(type(softmax_model()).from_pretrained(tmp_path / "base").eval(), KAConfig())
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()), logits(model))


def test_gates_that_peft_trains_are_saved(tmp_path):
    model = adapted(ka_model(), modules_to_save=["ka_gate"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.fill_(0.25)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.zero_()  # the LoRA is saved by PEFT
    save_adapter(model, tmp_path / "gates")
    again = load_adapter(softmax_model(), tmp_path / "gates")
    assert all((m.ka_gate.bias == 0.25).all() for m in again.modules() if hasattr(m, "ka_gate"))
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    with pytest.raises(ValueError, match="gate of layer 0 is wrapped in a ModulesToSaveWrapper"):
        model.base_model.model.save_pretrained(tmp_path / "whole")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(type(merged).from_pretrained(tmp_path / "merged").eval()), logits(model), atol=1e-5)


@pytest.mark.parametrize("change", [attach, lambda model: load_adapter(model, "anywhere")], ids=["attach", "load"])
def test_a_wrapped_model_is_refused_and_left_alone(change, tmp_path):
    model = adapted(softmax_model())
    before, config = logits(model), model.config
    with pytest.raises(ValueError, match=r"got a PeftModelForCausalLM; attach first|is no KA adapter"):
        change(model)
    assert not is_attached(model)
    assert model.config is config
    assert torch.equal(logits(model), before)


def test_lora_and_gates_are_trained_saved_merged_and_generate(tmp_path):
    ka, ids = KAConfig(gate="head", gate_init=0.5), torch.arange(4, 16)[None]
    settings = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["ka_gate"]}
    model, losses = adapted(attach(softmax_model(), ka), r=2, **settings), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(4):
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 1e-3
    trained = logits(model)
    written = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(attach(softmax_model(), ka), tmp_path).eval()
    merged = model.merge_and_unload()
    for each in (again, merged):
        assert torch.allclose(logits(each), trained, atol=1e-5)
        assert torch.equal(each.generate(ids, max_new_tokens=4, do_sample=False), written)


def convolved():
    return attach(softmax_model(), KAConfig(window=3, convolution=4)).eval()


def test_a_projection_is_convolved_with_its_adapter(tmp_path):
    model = adapted(convolved(), target_modules=["q_proj", "k_proj", "v_proj"])
    found, ids = logits(model), torch.arange(4, 16)[None]
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(convolved()))
    assert (found - logits(convolved())).abs().max() > 0.1
    written = (model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (False, True))
    assert torch.equal(*written)
    model(ids, use_cache=False, labels=ids).loss.backward()
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "lora" in name)
    model.save_pretrained(tmp_path / "lora")
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(convolved(), tmp_path / "lora").eval()), found)
    merged = model.merge_and_unload()  # its projections are single ones, which are convolved as a whole
    assert torch.allclose(logits(merged), found, atol=1e-5)
    assert all(len(m.q_proj._forward_hooks) == 1 for m in attention_modules(merged))


@pytest.mark.parametrize(("part", "ka"), [
    ("ka_convolution", KAConfig(window=3, convolution=4)), ("ka_output_gate", KAConfig(window=3, output_gate=True)),
])  # fmt: skip
def test_parts_of_a_ka_model_are_trained_beside_an_adapter(part, ka):
    model, ids = attach(softmax_model(), ka), torch.arange(4, 16)[None]
    want = logits(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=[part])).eval()
    assert torch.equal(logits(model), want)
    model(ids, use_cache=False, labels=ids).loss.backward()
    trained = [p for name, p in model.named_parameters() if p.requires_grad and part in name]
    assert len(trained) == 2
    assert all(p.grad.abs().sum() > 0 for p in trained)
