"""`generate()` with the KA cache: the tokens that the model without a cache would choose, in every decoding mode."""

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria
from zoo import FAMILIES, make, tokens

from ka_attention.hf import KACache, KAConfig, KAStaticCache, attach, detach, use

NEW = 9
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def expected(model, ids):
    """Greedy continuation and its logits without any cache."""
    logits = []
    with torch.no_grad():
        for _ in range(NEW):
            logits.append(model(ids, use_cache=False).logits[:, -1])
            ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
    return ids, torch.stack(logits, 1)


def check(model, ids, want, **settings):
    out = model.generate(ids, attention_mask=(ids != 0).long(), **{**GREEDY, **settings})
    assert torch.equal(out.sequences[:, -NEW:], want[0][:, -NEW:])
    assert (torch.stack(out.logits, 1) - want[1]).abs().max() < 2e-6  # generate() rounds logits to float32
    return out


@pytest.mark.parametrize("ka", [KAConfig(), KAConfig(layers=(0, 2), window=4)], ids=["all", "some"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_in_every_family(family, ka):
    model, ids = attach(make(family), ka), tokens()
    want = expected(model, ids)
    out = check(model, ids, want)
    assert isinstance(out.past_key_values, KACache)
    check(model, torch.nn.functional.pad(ids, (4, 0)), want)
    check(model, ids, want, prefill_chunk_size=5)
    out = check(model, ids, want, cache_implementation="static", disable_compile=True)
    assert isinstance(out.past_key_values, KAStaticCache)
    check(model, ids, want, use_cache=False)


def test_a_model_built_with_the_implementation_takes_the_cache_by_hand():
    model, ids = make("llama", attention="ka", ka_config={"window": 5}), tokens()
    want = expected(attach(make("llama"), KAConfig(window=5)), ids)
    check(model, ids, want, past_key_values=KACache(model.config))
    with pytest.raises(RuntimeError, match="plain cache"):
        model.generate(ids, max_new_tokens=3)


def test_a_conversation_goes_on_with_the_same_cache():
    model, ids = attach(make("llama"), KAConfig(window=6)), tokens(1)
    first = check(model, ids, expected(model, ids), past_key_values=KACache(model.config))
    longer = torch.cat([first.sequences, tokens(1, 3, seed=4)], 1)
    check(model, longer, expected(model, longer), past_key_values=first.past_key_values)


@pytest.mark.parametrize("family", ["gpt_neox", "gemma3_text"])
@pytest.mark.parametrize("window", [None, 4])
def test_assisted_and_prompt_lookup_decoding_take_tokens_back(family, window, monkeypatch):
    model = attach(make(family), KAConfig(window=window))
    # A noisy draft and no confidence threshold, or every proposal is right or none is made and nothing is taken back.
    draft = attach(make(family), KAConfig(layers=()))  # a softmax model
    torch.manual_seed(0)
    for parameter in draft.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    draft.generation_config.assistant_confidence_threshold = 0
    taken_back = []
    right = KACache.crop
    monkeypatch.setattr(KACache, "crop", lambda self, n: (taken_back.append(n), right(self, n))[1])
    for i in range(2):
        ids = tokens(1, seed=i)
        ids = torch.cat([ids, ids[:, :6]], 1)
        want = expected(model, ids)
        check(model, ids, want, assistant_model=draft)
        check(model, ids, want, prompt_lookup_num_tokens=3)
    assert min(taken_back) < 0


def test_an_attached_assistant_drafts_with_its_own_cache():
    model, ids = attach(make("llama")), tokens(1)
    draft = attach(make("llama"), KAConfig(window=4))
    draft.generation_config.assistant_confidence_threshold = 0
    check(model, ids, expected(model, ids), assistant_model=draft)


def test_beams_equal_those_without_a_cache():
    model, ids = attach(make("gpt_neox"), KAConfig(window=5)), tokens()
    settings = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 4, "num_return_sequences": 2}
    outs = [
        model.generate(
            ids, attention_mask=torch.ones_like(ids), use_cache=cached, return_dict_in_generate=True,
            output_scores=True, **settings,
        )
        for cached in (True, False)
    ]  # fmt: skip
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert (outs[0].sequences_scores - outs[1].sequences_scores).abs().max() < 1e-11


def test_sampling_equals_sampling_without_a_cache():
    model, ids = attach(make("llama")), tokens()
    outs = []
    for cached in (True, False):
        torch.manual_seed(3)
        outs.append(
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_p=0.9, max_new_tokens=NEW,
                num_return_sequences=3, use_cache=cached,
            )
        )  # fmt: skip
    assert torch.equal(*outs)


def test_use_is_reversible_and_chooses_the_cache_by_itself():
    model, ids = make("llama"), tokens()
    before = expected(model, ids)
    with use(model, layers=(1,), gate=0.5):
        out = check(model, ids, expected(model, ids))
        assert isinstance(out.past_key_values, KACache)
        assert (torch.stack(out.logits, 1) - before[1]).abs().max() > 0.1
    out = check(model, ids, before)
    assert type(out.past_key_values) is DynamicCache
    with pytest.raises(ZeroDivisionError), use(model):
        1 / 0  # noqa: B018
    check(model, ids, before)


@pytest.mark.parametrize("kind", ["quantized", "offloaded", "offloaded_static"])
def test_caches_that_cannot_hold_outputs_are_refused(kind):
    model = attach(make("llama"))
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(tokens(), max_new_tokens=2, cache_implementation=kind)
    detach(model)


class Aborted(StoppingCriteria):
    def __call__(self, ids, scores, **kwargs):
        raise KeyboardInterrupt


def test_an_interrupted_generation_leaves_the_model_usable():
    model, ids = attach(make("llama")), tokens()
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=3, stopping_criteria=[Aborted()])
    check(model, ids, expected(model, ids))


@pytest.mark.parametrize("ka", [KAConfig(), KAConfig(window=4, gate="head", output_gate=True)], ids=["full", "window"])
def test_decoding_compiles_as_one_graph_that_is_not_made_again(ka):
    """With a window, beyond the length of its cache too."""
    model, ids = attach(make("llama", num_hidden_layers=1), ka).double(), tokens()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = KAStaticCache(model.config, 12 if ka.window is None else 8)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        outs = [model(ids[:, :4], past_key_values=cache).logits, compiled(ids[:, 4:5], past_key_values=cache).logits]
        with torch.compiler.set_stance("fail_on_recompile"):
            outs += [compiled(ids[:, i : i + 1], past_key_values=cache).logits for i in range(5, 12)]
    assert (torch.cat(outs, 1) - want).abs().max() < 1e-11
