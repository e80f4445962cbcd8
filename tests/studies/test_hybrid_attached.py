"""The study's best hybrids are transformers models as users attach them: the same weights give the same logits."""

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen3ForCausalLM

from ka_attention.hf import KAConfig, attach
from ka_attention.studies.hybrid.models import LlamaSettings, arm, build

# Weights so large that softmax is far from a mean.
SETTINGS = LlamaSettings(vocab_size=2048, hidden_size=64, layers=4, heads=4, intermediate_size=160, initial_sd=0.3)
LENGTH = 24
BEST = KAConfig(pattern="3:1", window=4, gate="head", gate_init=0.0, output_gate=True, convolution=4)
SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
)


def renamed(weights):
    """The study's names of weights as those of an attached model; the three convolutions of a layer are one there."""
    found = {}
    for name, weight in weights.items():
        if ".on_qkv." in name:
            name = name.partition("on_qkv")[0] + "ka_convolution.weight"
            weight = torch.cat([found[name], weight], 1) if name in found else weight  # queries, keys, values
        found[name.replace("on_qk.0", "q_norm").replace("on_qk.1", "k_norm")] = weight
    return found


@pytest.mark.parametrize(("normed", "kind"), [("", LlamaForCausalLM), ("-normed", Qwen3ForCausalLM)])
def test_the_best_arm_is_a_model_of_transformers_attached(normed, kind):
    studied = build(arm(f"3to1-ka-head-w4-from0-gated-qkv{normed}"), SETTINGS, LENGTH, 0).double()
    with torch.no_grad():
        for name, weight in studied.named_parameters():
            if "ka_gate" in name:
                weight.uniform_(0, 1)
            elif "norm" in name or "on_qk." in name:
                weight.uniform_(0.5, 1.5)
    config = kind.config_class(**{name: getattr(studied.config, name) for name in SHARED})
    attached = attach(kind(config), BEST).double()
    attached.load_state_dict(renamed(studied.state_dict()))
    ids = torch.randint(SETTINGS.vocab_size, (2, LENGTH))
    with torch.no_grad():
        want, found = (model.eval()(input_ids=ids, use_cache=False).logits for model in (studied, attached))
    assert (found - want).abs().max() < 1e-5 * want.abs().max()
