"""A Llama of 47 M parameters on one GPU: steps of training, and of decoding against context.

`python -m benchmarks.models [--json FILE]`; `python -m benchmarks.goals FILE` judges the figures. All layers narrow or
three of four, KA or softmax with the same window (the operator with its gate at 0), beside full softmax; KA in three
of four with short convolutions too. Decoding is a replayed CUDA graph of one step of the model through a cache of fixed
size, so the GPU's time alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache, set_seed

from benchmarks.goals import Record, section_table
from benchmarks.harness import device_type, machine, medians, print_tables
from ka_attention.hf import KAConfig, KAStaticCache, attach, cache_bytes

LLAMA = {
    "vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 1 << 17, "tie_word_embeddings": True,
}  # fmt: skip
ARMS: dict[str, KAConfig | None] = {
    "softmax": None,
    "softmax window 8": KAConfig(window=8, gate_init=0.0),
    "KA window 8": KAConfig(window=8, gate="head", gate_init=0.5),
    "softmax window 3:1": KAConfig(window=8, gate_init=0.0, pattern="3:1"),
    "KA 3:1": KAConfig(window=8, gate="head", gate_init=0.5, pattern="3:1"),
    "KA 3:1, convolutions": KAConfig(window=8, gate="head", gate_init=0.5, pattern="3:1", convolution=4),
}
TRAINED = [(16, 2048), (4, 8192)]  # sequences and tokens of a step
CONTEXTS = (128, 2048, 8192, 65536)
DECODED = [(batch, context) for batch in (1, 32, 128) for context in CONTEXTS if batch * context < 1 << 22]


def build(name: str, **sizes: int) -> Any:
    """A model in float32 with random weights, the same for all arms."""
    set_seed(0)
    settings: dict[str, Any] = {**LLAMA, **sizes}
    config: Any = LlamaConfig(**settings)
    config._attn_implementation = "sdpa"
    model: Any = LlamaForCausalLM(config)
    arm = ARMS[name]
    return model if arm is None else attach(model, arm)


def training(shapes: Sequence[tuple[int, int]] = TRAINED, seconds: float = 6.0, **sizes: int) -> Iterator[Record]:
    """Steps of all arms, in turns: forward under bfloat16 autocast, backward, clipping, AdamW, zeroing."""
    for batch, length in shapes:
        took = medians({name: step(name, batch, length, **sizes) for name in ARMS}, seconds)
        yield {"section": "models, training", "case": "a step", "shape": [batch, length], "pass": "step", "ms": took}


def step(name: str, batch: int, length: int, **sizes: int) -> Callable[[], Tensor]:
    """A call that trains a fresh model one step further, always on the same tokens, and returns the loss."""
    device = device_type()
    model = build(name, **sizes).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(model.config.vocab_size, (batch, length), device=device)

    def call() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        return loss.detach()

    return call


@torch.no_grad()
def decoding(shapes: Sequence[tuple[int, int]] = DECODED, **sizes: int) -> Iterator[Record]:
    """Milliseconds of one token more, and the bytes of the cache, after a context of random keys and values."""
    from benchmarks.timing import replayed  # needs Triton

    models = {name: build(name, **sizes).to(device_type(), torch.bfloat16).eval() for name in ARMS}
    for batch, context in shapes:
        took, held = {}, {}
        for name, model in models.items():
            call, cache = decode(model, batch, context)
            took[name], held[name] = replayed(call), float(cache_bytes(cache))
            del call, cache
        row = {"section": "models, decoding", "case": "a token", "shape": [batch, context], "pass": "decode"}
        yield row | {"ms": took, "bytes": held}


def decode(model: Any, batch: int, context: int) -> tuple[Callable[[], Tensor], Any]:
    """A call that decodes one token after `context` random ones and can be repeated, and its cache."""
    config, device = model.config, model.device
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    is_ka = getattr(config, "ka_config", None) is not None
    convolution = KAConfig.of(config).convolution if is_ka else None
    cache: Any = (KAStaticCache if is_ka else StaticCache)(config=config, max_cache_len=context + 8)
    for i in range(config.num_hidden_layers):
        k, v = (torch.randn(batch, heads, context, size, device=device, dtype=model.dtype) for _ in range(2))
        if convolution is not None:
            for part, x in enumerate((k, k, v)):
                cache.layers[i].past(part, x.transpose(1, 2).flatten(2))
        _, state = cache.update(k, v, i)
        if not isinstance(state, Tensor):
            state.commit(v)
    counters = torch.full((len(cache.layers),), context, device=device)  # one tensor: setting them back is one kernel
    for counter, layer in zip(counters, cache.layers, strict=True):
        layer.cumulative_length = counter
    token = torch.randint(config.vocab_size, (batch, 1), device=device)
    position = torch.full((batch, 1), context, device=device)

    def call() -> Tensor:
        counters.fill_(context)
        return model(input_ids=token, past_key_values=cache, position_ids=position, use_cache=True).logits

    again = torch.no_grad()(call)
    if convolution is not None:  # a call gives the tails this token; when they hold it alone, calls repeat
        for _ in range((convolution - 1) * config.num_hidden_layers):
            again()
    return again, cache


def run(path: Path | None = None) -> Iterator[str]:
    """The tables, each as soon as it is there; ``path`` gets all figures so far with each of them."""
    records: list[Record] = []
    for section in (decoding, training):
        found = []
        for record in section():
            found.append(record)
            if path:
                path.write_text(json.dumps({"machine": machine(), "records": records + found}))
        records += found
        yield section_table(found)


if __name__ == "__main__":
    print_tables(__doc__, run)
