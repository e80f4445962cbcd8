"""A small comparison as compare finds it: four arms with plausible figures, for any number of seeds."""

import math

import pytest
from transformers import GPTNeoXConfig

from ka_attention.evaluations import memory
from ka_attention.evaluations.caches import Caches, Decoded
from ka_attention.evaluations.reversal import Reversal, Told
from ka_attention.harness.models.arms import ArmResults, arm
from ka_attention.harness.training.perplexity import Perplexity, Run
from ka_attention.harness.training.trainer import Epoch, Training
from ka_attention.studies.compare.report import Answers

ARMS = {"softmax": (108.5, 300.1), "ka": (110.2, 145.8), "softmax-w16": (117.9, 262.4), "ka-w16": (111.0, 171.3)}
MODEL = GPTNeoXConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=2048)


def _seed(number: int, name: str) -> Answers:
    own, wobble = arm(name).own_cache, 1 + 0.01 * math.sin(number)
    ppl, other = (wobble * figure for figure in ARMS[name])
    told = {
        group: Told(
            forward_ppl=forward * ppl,
            forward_shuffled_ppl=1.01 * forward * ppl,
            backward_ppl=backward * ppl,
            backward_shuffled_ppl=0.99 * backward * ppl,
            ratio=forward / backward,
        )
        for group, forward, backward in (("all", 8.1, 8.8), ("real", 7.7, 8.3), ("fictitious", 8.5, 9.3))
    }
    sizes = memory.evaluate(MODEL, arm(name).ka, length=128)
    caches = {
        kind: Decoded(
            own=kind == own,
            loss=math.log(ppl if kind == own else other),
            ppl=ppl if kind == own else other,
            tokens=8192,
            seconds=6.1 if kind == "kv" else 6.4,
            tokens_per_s=8192 / (6.1 if kind == "kv" else 6.4),
            bytes_per_token_measured=float(weight.bytes_per_token),
            bytes_per_token_computed=weight.bytes_per_token,
            bytes_per_sequence_measured=float(weight.bytes_per_sequence),
            bytes_per_sequence_computed=weight.bytes_per_sequence,
        )
        for kind, weight in (("kv", sizes.kv), ("ka", sizes.ka))
    }
    runs = tuple(Run(start, min(start + 15, 126), ppl * (1 + 1.5 / (1 + start / 8))) for start in range(0, 127, 16))
    return Answers(
        training=Training((Epoch(1, 300.0, ppl, 20.0, True),), 1, ppl, 20.0, 1_317_376),
        caches=Caches(caches),
        perplexity=Perplexity(math.log(ppl), ppl, 32_512, runs),
        memory=sizes,
        reversal=Reversal(48, own, {"kv": told, "ka": told}),
    )


@pytest.fixture
def example():
    """``example(seeds)``: the arms of a comparison with that many seeds."""

    def build(seeds: int) -> list[ArmResults[Answers]]:
        return [ArmResults(arm(name), tuple(_seed(number, name) for number in range(seeds))) for name in ARMS]

    return build
