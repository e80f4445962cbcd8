"""Attention seen from outside: the same outputs, the weights behind them, and everything as it was afterwards."""

import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from typer.testing import CliRunner

from ka_attention.cli import app
from ka_attention.commands.inspect import inspect
from ka_attention.errors import UserError
from ka_attention.harness.models import attending
from ka_attention.harness.models.saved import load_model_and_tokenizer
from ka_attention.harness.text import tokenizer as tokenizers
from ka_attention.hf import KAConfig, attach

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.3,
}
TEXT = "a b c d e f g h"


def neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)).eval()


def llama():
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)).eval()


def mistral():
    return MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=3)).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train([TEXT], 300)


@pytest.mark.parametrize("make", [neox, llama, mistral])
@pytest.mark.parametrize(
    "ka",
    [
        KAConfig(),
        KAConfig(layers=(1,), window=4),
        KAConfig(gate="token", gate_init=0.4),
        KAConfig(gate_init=0.0),
        KAConfig(gate_init=0.3),
    ],
)
def test_exact_is_what_the_model_computes(make, ka):
    model = attach(make(), ka)
    ids = torch.randint(300, (2, 9))
    with torch.no_grad():
        own = model(ids).logits
        with attending.attending(attending.exact):
            outside = model(ids).logits
        with pytest.raises(ZeroDivisionError), attending.attending(lambda call: 1 / 0):
            model(ids)
        after = model(ids).logits
    torch.testing.assert_close(outside, own, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after, own, atol=0, rtol=0)


def test_inspection_explains_the_outputs(tokenizer):
    model = attach(llama(), KAConfig(layers=(1,), window=5))
    seen = []
    with torch.no_grad(), attending.attending(lambda call: seen.append((call, attending.exact(call))) or seen[-1][1]):
        model(tokenizer(TEXT, return_tensors="pt")["input_ids"])
    found = inspect(model, tokenizer, TEXT, "tiny")
    assert "".join(found.tokens) == TEXT
    assert list(found.layers) == ["softmax", "KA, window 5"]
    for (call, output), sources in zip(seen, torch.tensor(found.sources), strict=True):
        torch.testing.assert_close(sources @ call.v[0].repeat_interleave(2, 0), output[0], atol=1e-5, rtol=1e-5)
    assert (found.sources[0] == found.weights[0]).all()  # a softmax layer reads values, so nothing is followed
    assert (found.weights[1, :, 7, 0] == 0).all()  # out of the window
    assert (found.sources[1, :, 7, 0] > 0).all()  # and yet reached


def test_softmax_model_is_shown_as_a_ka_cache_would_have_it(tokenizer):
    model = neox()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
        found = inspect(model, tokenizer, TEXT, "tiny")
        assert torch.equal(model(ids).logits, before)
    swapped = inspect(attach(model, KAConfig()), tokenizer, TEXT, "tiny")
    assert "softmax model" in found.note
    assert "softmax model" not in swapped.note
    # The first layer's inputs are the same in both.
    torch.testing.assert_close(found.sources[0], swapped.sources[0], atol=1e-6, rtol=1e-6)


def test_command(tokenizer, tmp_path):
    folder = tmp_path / "model"
    llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["inspect", str(folder), TEXT, "--out", str(page)])
    assert result.exit_code == 0, result.output
    assert "comes from" in page.read_text(encoding="utf-8")
    result = CliRunner().invoke(app, ["inspect", str(folder), "a"])
    assert result.exit_code == 2
    assert result.stderr == "ka: TEXT: expected 2 to 128 tokens, got 1\n"
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), TEXT])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"ka: MODEL: cannot load {tmp_path}")
    result = CliRunner().invoke(app, ["inspect", str(folder), TEXT, "--out", str(page / "page.html")])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"ka: --out: cannot write {page}")
    (folder / "model.safetensors").write_text("cut off")
    result = CliRunner().invoke(app, ["inspect", str(folder), TEXT])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"ka: MODEL: cannot load {folder}")


def test_missing_weights_are_not_made_up(tokenizer, tmp_path):
    from safetensors.torch import load_file, save_file

    llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the weights lm_head\.weight"):
        load_model_and_tokenizer(str(tmp_path))
