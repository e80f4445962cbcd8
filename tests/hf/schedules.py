"""Random schedules of requests, each served in batches and by `generate` alone: python tests/hf/schedules.py 200"""

import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from zoo import make

from ka_attention.hf import KAConfig, attach

KINDS = [
    ("llama", {}),
    ("llama", {"window": 3, "gate_init": 0.5}),
    ("llama", {"pattern": "1:1", "window": (1, 6), "gate": "head", "gate_init": 0.7, "output_gate": True}),
    ("gpt_neox", {"gate": "token", "gate_init": 0.6}),
    ("mistral", {"layers": (0, 2)}),
    ("gemma2", {"window": 4}),
    ("qwen3", {"layers": (1, 2), "gate_range": (-1, 1), "gate_init": -0.4}),
    ("llama", {"gate_init": 0.0, "window": 5}),
    ("llama", {"pattern": "1:1", "window": 3, "gate_init": 0.6}),  # rings in the room of V
    ("llama", {"pattern": "2:1", "window": 2, "gate_init": 0.6}),  # two in a page, in transformers 5.17
]


def settings(page=4, **changes):
    """Settings of transformers' batches, small enough that prompts come in chunks and requests wait."""
    fields = ContinuousBatchingConfig.__dataclass_fields__
    sizes = {"page_size" if "page_size" in fields else "block_size": page, "num_blocks": 64, "max_batch_tokens": 16}
    return ContinuousBatchingConfig(**{**sizes, "return_logprobs": True, "max_memory_percent": 0.5, **changes})


def greedy(**changes):
    return GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, **changes)


def alone(model, prompt, count):
    """(tokens, their log-probabilities) of ``count`` greedy steps of `generate`."""
    found = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    chosen = [x[0].log_softmax(-1).max().item() for x in found.logits]
    return found.sequences[0, len(prompt) :].tolist(), chosen


def check(model, prompt, count, result, whole=True):
    """The result of one request is what `generate` gives, or how that begins."""
    assert result.error is None or not whole, result.error
    expected, chances = alone(model, prompt, count)
    got = result.generated_tokens
    if whole:
        assert len(got) == count
    assert got == expected[: len(got)]
    assert torch.allclose(torch.tensor(result.logprobs), torch.tensor(chances)[: len(result.logprobs)], atol=2e-6)


def schedule(seed):
    """Serve some requests that come, grow and are cancelled at random; how many tokens there were."""
    rng = random.Random(seed)
    family, ka = KINDS[seed % len(KINDS)]
    model = attach(make(family, seed=seed), KAConfig(**ka))
    shared = [rng.randrange(2, 97) for _ in range(rng.choice((0, 4, 9)))]
    requests = {
        f"r{i}": (shared + [rng.randrange(2, 97) for _ in range(rng.choice((1, 2, 5, 17)))], rng.randrange(1, 9))
        for i in range(rng.randrange(2, 7))
    }
    cancelled = {name for name in requests if rng.random() < 0.2}
    limits = settings(
        page=rng.choice((4, 8)),
        num_blocks=rng.choice((12, 64)),  # few: requests are put off and computed again
        max_batch_tokens=rng.choice((5, 16, 64)),
        scheduler_type=rng.choice(("fifo", "prefill_first")),
    )
    manager = model.init_continuous_batching(greedy(), limits)
    manager.start()
    found = {}
    try:
        for name, (prompt, count) in requests.items():
            manager.add_request(prompt, request_id=name, max_new_tokens=count)
            if name in cancelled:
                time.sleep(rng.choice((0, 0.01, 0.03)))
                manager.cancel_request(name)
            if rng.random() < 0.4:
                time.sleep(rng.choice((0.005, 0.02)))
        end = time.monotonic() + 60
        while not requests.keys() - cancelled <= found.keys():
            assert time.monotonic() < end, f"{seed}: no result of {requests.keys() - cancelled - found.keys()}"
            if (result := manager.get_result(timeout=0.5)) is not None and result.is_finished():
                found[result.request_id] = result
    finally:
        manager.stop(block=True)
        manager.destroy()
    for name, result in found.items():
        check(model, *requests[name], result, whole=name not in cancelled)
    return sum(len(result.generated_tokens) for result in found.values())


if __name__ == "__main__":
    count = int(sys.argv[1])
    tokens = [schedule(seed) for seed in range(count)]
    print(f"{count} schedules, {sum(tokens)} tokens: none wrong")
