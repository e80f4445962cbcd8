"""PEFT: adapters of KA models are made for them, and load onto nothing else."""

import pytest
import torch
from conftest import ka_model, logits, softmax_model

from ka_attention.hf import KAConfig, attach, is_attached, load_adapter, save_adapter

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
