"""Models that KA-attention does not run in are refused with the reason, also those where it would silently not run."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, MllamaForCausalLM
from zoo import make, tokens

from ka_attention.hf import (
    KACache,
    KAConfig,
    attach,
    attention_modules,
    check_supported,
    detach,
    is_attached,
    save_adapter,
)

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
REFUSED = {
    "falcon": ({}, "attention interface"),
    "gptj": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}, "interface"),
    "mpt": ({"d_model": 32, "n_layers": 2, "n_heads": 2}, "attention interface"),
    "bloom": ({"n_layer": 2, "n_head": 2}, "attention interface"),
    "deepseek_v3": ({**MLA, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}, "latent"),
    "gpt_oss": ({"num_local_experts": 2, "num_experts_per_tok": 1}, "sinks"),
    "diffllama": ({}, "two attention maps"),
    "jetmoe": ({"kv_channels": 16, "num_local_experts": 2, "num_experts_per_tok": 1}, "repeat"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "no KA cache"),
    "jamba": ({}, "self-attention"),
    "bert": ({}, "not causal"),
}
WITHOUT_ATTENTION = {
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "falcon_mamba": {},
    "xlstm": {"num_heads": 4},
}


@pytest.mark.parametrize("family", REFUSED)
def test_refused_with_the_reason(family):
    settings, reason = REFUSED[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **settings}))
    with pytest.raises(ValueError, match=reason):
        attach(model)
    assert not is_attached(model)


def test_layers_that_attend_to_images_are_no_self_attention():
    config = AutoConfig.for_model("mllama_text_model", **SMALL, cross_attention_layers=[1])
    with pytest.raises(ValueError, match="1 of its 2 layers have causal self-attention"):
        attach(MllamaForCausalLM(config))


def test_attention_sinks_are_refused_by_whatever_model_has_them():
    model = make("llama")
    attention_modules(model)[1].sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="attention sinks"):
        attach(model)


@pytest.mark.parametrize("family", WITHOUT_ATTENTION)
def test_models_without_attention_are_refused(family):
    """Their configurations have no number of attention heads to ask for."""
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50, **WITHOUT_ATTENTION[family]}
    with pytest.raises(ValueError, match="none of its layers has self-attention"):
        attach(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)))


def test_a_bert_that_is_a_decoder_is_a_ka_model():
    config = AutoConfig.for_model("bert", **SMALL, is_decoder=True, attention_probs_dropout_prob=0.0)
    model, ids = AutoModelForCausalLM.from_config(config).double().eval(), tokens() % 50
    with torch.no_grad():
        before, after = model(ids).logits, attach(model)(ids, use_cache=False).logits
    assert (after[:, :2] - before[:, :2]).abs().max() < 1e-11  # nothing has been fed back yet
    assert (after[:, 2:] - before[:, 2:]).abs().max() > 1e-6


def test_encoder_decoders_are_refused():
    config = AutoConfig.for_model("bart", d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=50,
                                  encoder_attention_heads=2, decoder_attention_heads=2)  # fmt: skip
    with pytest.raises(ValueError, match="encoder-decoder"):
        check_supported(AutoModelForSeq2SeqLM.from_config(config))


def test_a_subclass_of_an_unsupported_model_is_refused():
    config = AutoConfig.for_model("falcon", **SMALL)
    base = type(AutoModelForCausalLM.from_config(config))

    class Mine(base):
        pass

    with pytest.raises(ValueError, match="attention interface"):
        attach(Mine(config))


@pytest.mark.parametrize("family", ["opt", "phi", "qwen2", "smollm3", "mixtral"])
def test_more_families_decode_with_the_cache(family):
    extra = {"word_embed_proj_dim": 32, "ffn_dim": 32} if family == "opt" else {}
    extra |= {"num_local_experts": 2, "num_experts_per_tok": 1} if family == "mixtral" else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **extra, "initializer_range": 0.3})
    config._experts_implementation = "eager"  # grouped matmuls know no float64
    model = attach(AutoModelForCausalLM.from_config(config).double().eval(), KAConfig(window=4))
    ids, cache = tokens() % 50, KACache(model.config)
    with torch.no_grad():
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(12)]
        assert (torch.cat(steps, 1) - model(ids, use_cache=False).logits).abs().max() < 1e-11


def test_only_the_language_part_of_a_vision_language_model_changes(tmp_path):
    text = {**make("gemma3_text").config.to_dict(), "vocab_size": 97}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    ids = tokens()
    with torch.no_grad():
        before = model(ids).logits
        attach(model, KAConfig(window=4))
        assert model.config.vision_config._attn_implementation == "sdpa"
        cache, want = KACache(model.config), model(ids, use_cache=False).logits
        steps = [model(chunk, past_key_values=cache).logits for chunk in ids.split([5, 1, 6], 1)]
        assert (torch.cat(steps, 1) - want).abs().max() < 1e-11
        assert (want - before).abs().max() > 1e-3
        with pytest.raises(ValueError, match="would load as a softmax model"):
            model.save_pretrained(tmp_path)
        save_adapter(model, tmp_path)
        assert torch.equal(detach(model)(ids).logits, before)
