"""Models that KA-attention does not run in are refused with the reason, also those where it would silently not run."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from zoo import make, tokens

from ka_attention.hf import KACache, KAConfig, attach, check_supported, detach, is_attached, save_adapter

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
    "gptj": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}, "attention interface"),
    "mpt": ({"d_model": 32, "n_layers": 2, "n_heads": 2}, "attention interface"),
    "bloom": ({"n_layer": 2, "n_head": 2}, "attention interface"),
    "deepseek_v3": ({**MLA, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}, "latent"),
    "gpt_oss": ({"num_local_experts": 2, "num_experts_per_tok": 1}, "sinks"),
    "diffllama": ({}, "two attention maps"),
    "jetmoe": ({"kv_channels": 16, "num_local_experts": 2, "num_experts_per_tok": 1}, "repeat"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "no KA cache"),
    "mamba": ({}, "."),
}


@pytest.mark.parametrize("family", REFUSED)
def test_refused_with_the_reason(family):
    settings, reason = REFUSED[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **settings}))
    with pytest.raises(ValueError, match=reason):
        attach(model)
    assert not is_attached(model)


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
