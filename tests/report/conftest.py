"""A small comparison as compare writes it: four arms with plausible figures, for any number of seeds."""

import json
import math

import pytest
from transformers import GPTNeoXConfig

from ka_attention.evaluations import memory
from ka_attention.hf.config import KAConfig

ARMS = {  # name: (label, configuration, PPL, own cache, PPL under the other cache)
    "softmax": ("Softmax", None, 108.5, "kv", 300.1),
    "ka": ("KA", KAConfig(), 110.2, "ka", 145.8),
    "softmax-w16": ("Softmax, window 16", KAConfig(window=16, gate_init=0.0), 117.9, "kv", 262.4),
    "ka-w16": ("KA, window 16", KAConfig(window=16), 111.0, "ka", 171.3),
}
MODEL = GPTNeoXConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=2048)


def _seed(number: int, ka: KAConfig | None, ppl: float, own: str, other: float) -> dict:
    wobble = 1 + 0.01 * math.sin(number)
    ppl, other = ppl * wobble, other * wobble
    told = {
        group: {
            "forward_ppl": forward * ppl,
            "backward_ppl": backward * ppl,
            "forward_shuffled_ppl": 1.01 * forward * ppl,
            "backward_shuffled_ppl": 0.99 * backward * ppl,
            "ratio": forward / backward,
        }
        for group, forward, backward in (("all", 8.1, 8.8), ("real", 7.7, 8.3), ("fictitious", 8.5, 9.3))
    }
    sizes = memory.evaluate(MODEL, ka, length=128)
    caches = {
        kind: {
            "own": kind == own,
            "loss": math.log(ppl if kind == own else other),
            "ppl": ppl if kind == own else other,
            "tokens": 8192,
            "seconds": 6.1 if kind == "kv" else 6.4,
            "tokens_per_s": 8192 / (6.1 if kind == "kv" else 6.4),
            **{
                f"bytes_per_{unit}_{how}": sizes[kind][f"bytes_per_{unit}"]
                for unit in ("token", "sequence")
                for how in ("measured", "computed")
            },
        }
        for kind in ("kv", "ka")
    }
    return {
        "training": {
            "epochs": [{"epoch": 1, "train_ppl": 300.0, "val_ppl": ppl, "seconds": 20.0, "best": True}],
            "best_epoch": 1,
            "best_val_ppl": ppl,
            "seconds_per_epoch": 20.0,
            "parameters": 1_317_376,
        },
        "perplexity": {
            "loss": math.log(ppl),
            "ppl": ppl,
            "tokens": 32_512,
            "by_position": [
                {"first": start, "last": min(start + 15, 126), "ppl": ppl * (1 + 1.5 / (1 + start / 8))}
                for start in range(0, 127, 16)
            ],
        },
        "caches": caches,
        "reversal": {**told["all"], "sentences": 48, "own": own, "by_cache": {"kv": told, "ka": told}},
        "memory": sizes,
    }


@pytest.fixture
def example():
    """``example(seeds)``: the results of a comparison with that many seeds."""

    def build(seeds: int) -> dict:
        arms = {
            name: {"label": label, "seeds": [_seed(number, *figures) for number in range(seeds)]}
            for name, (label, *figures) in ARMS.items()
        }
        return json.loads(json.dumps({"recipe": {"name": "quick"}, "arms": arms}))

    return build
