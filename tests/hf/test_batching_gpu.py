"""Many requests at once on a GPU: what is generated is what the model in float64 would have generated, to rounding."""

import pytest
import torch
from schedules import greedy, settings
from transformers import LlamaConfig, LlamaForCausalLM

from ka_attention.hf import KAConfig, attach

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ARMS = {
    "softmax": KAConfig(gate_init=0.0),
    "KA": KAConfig(gate="head", gate_init=0.5),
    "KA window": KAConfig(window=8, gate="head", gate_init=0.5),
    "hybrid": KAConfig(window=8, gate="head", gate_init=0.5, pattern="3:1"),
}
SIZE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.2}  # of log-probabilities; `generate` is held to the same


def test_graphs_and_asynchronous_batches_are_chosen_as_for_flash_attention():
    model = attach(LlamaForCausalLM(LlamaConfig(vocab_size=97, **SIZE)), ARMS["hybrid"]).to("cuda")
    chosen = model.init_continuous_batching(greedy(), settings()).continuous_batching_config
    assert chosen.use_async_batching
    assert all(chosen.cuda_graph_booleans)


@pytest.mark.parametrize("graphs", [False, None], ids=["", "CUDA graphs"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("arm", ARMS)
def test_batches_generate_what_one_by_one_is_generated(arm, dtype, graphs):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, num_key_value_heads=2, initializer_range=0.1, **SIZE)
    exact = attach(LlamaForCausalLM(config), ARMS[arm]).to(dtype).double().eval()
    model = attach(LlamaForCausalLM(config), ARMS[arm])
    model.load_state_dict(exact.state_dict())
    model = model.to("cuda", dtype).eval()
    prefix = torch.randint(2, 97, (140,)).tolist()  # shared where all layers keep all tokens
    lengths = (1, 5, 30, 64, 100, 300)
    prompts = [torch.randint(2, 97, (n,)).tolist() for n in lengths] + [[*prefix, i] for i in range(2, 8)]
    sizes = {"page": 16, "num_blocks": 256, "max_batch_tokens": 128, "max_requests_per_batch": 8}
    batches = settings(**sizes, use_cuda_graph=graphs, use_async_batching=graphs)
    results = model.generate_batch(prompts, greedy(max_new_tokens=24), batches)
    assert len(results) == len(prompts)
    for prompt, result in zip(prompts, results.values(), strict=True):
        assert result.error is None
        got = result.generated_tokens
        assert len(got) == 24
        one = model.generate(torch.tensor([prompt], device="cuda"), max_new_tokens=24, do_sample=False)[0].tolist()
        found, by_itself = lost(exact, prompt, got), lost(exact, prompt, one[len(prompt) :])
        assert found <= ROUNDING[dtype], (found, by_itself)
        chances = chance(exact, prompt, got).gather(1, torch.tensor(got)[:, None])[:, 0]
        error = (torch.tensor(result.logprobs) - chances).abs().max().item()
        print(f"{arm} {dtype} {len(prompt)}: lost {found:.2g}, alone {by_itself:.2g}, log-probabilities {error:.2g}")
        assert error <= ROUNDING[dtype]


@torch.no_grad()
def chance(exact, prompt, got):
    """Log-probabilities of all tokens, at each of the new ones."""
    logits = exact(torch.tensor([prompt + got])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)


def lost(exact, prompt, got):
    """By how much a token is less probable than the best one, at most."""
    chances = chance(exact, prompt, got)
    return (chances.max(1).values - chances.gather(1, torch.tensor(got)[:, None])[:, 0]).max().item()
