"""Random scripts of decoding: chunks, steps, padding, crops, beams and more, on caches of every kind.

``python tests/hf/scripts.py 500`` runs as many, each from its own seed, and says what the first wrong one was; the test
suite runs a few. Logits are compared with a float64 forward pass without a cache.
"""

import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a command
from zoo import make

from ka_attention.hf import KACache, KAConfig, KAStaticCache, attach, attention_modules

FAMILIES = ("gpt_neox", "llama", "mistral", "gemma2", "gemma3_text", "qwen3", "gpt2")
CONVOLVED = ("llama", "mistral", "gemma2", "gemma3_text", "qwen3")
LONGEST = 40


def random_config(pick: random.Random, family: str) -> KAConfig:
    layers = pick.choice([{}, {}, {"layers": (1,)}, {"layers": (0, 2)}, {"pattern": "2:1"}, {"layers": ()}])
    count = {(): 3}.get(tuple(layers), 2 if "pattern" in layers else len(layers.get("layers", ())))
    window = pick.choice([None, 1, 2, 3, 5, 8, 33, "each"])
    if window == "each":
        window = tuple(pick.choice([None, 1, 2, 4, 7]) for _ in range(count)) or None
    gate = pick.choice(["fixed", "fixed", "head", "token"])
    low = pick.choice([0.0, -1.0])
    gate_init = pick.choice([0.0, 0.5, 1.0, 1.0, tuple(pick.choice([0.0, 0.3, 1.0]) for _ in range(4))])
    output_gate = pick.choice([False, False, True, "ka"])
    convolution = pick.choice([None, None, 2, 4, 6]) if family in CONVOLVED else None
    gates = {"gate": gate, "gate_init": gate_init, "gate_range": (low, 1.0), "output_gate": output_gate}
    narrow = 5 if family != "llama" and convolution == 6 else convolution  # than the model's own window
    return KAConfig(**layers, window=window, convolution=narrow, **gates)


def run_script(seed: int) -> tuple[float, str]:
    """(largest difference of logits, what was done) of one script."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    family = pick.choice(FAMILIES)
    ka = random_config(pick, family)
    model = attach(make(family, seed=seed % 7), ka).double()
    for module in attention_modules(model):
        for name in ("ka_gate", "ka_output_gate"):
            if hasattr(module, name):
                for parameter in getattr(module, name).parameters():
                    parameter.data += 0.5 * torch.randn_like(parameter)
    static = pick.random() < 0.4
    recording = not static and pick.random() < 0.4
    cache = KAStaticCache(model.config, LONGEST) if static else KACache(model.config)
    can_crop = all(not layer.is_ring for layer in cache.layers) if static else recording or not any(cache.is_sliding)
    can_crop &= recording or ka.convolution is None
    if recording:
        cache.activate_past_recording()
    rows = pick.choice([1, 2, 3])
    pads = [pick.choice([0, 0, 1, 4]) for _ in range(rows)] if pick.random() < 0.4 else [0] * rows
    pads[pick.randrange(rows)] = 0  # as a tokenizer pads: to the longest
    done = [f"{family} {ka} {'static' if static else 'recording' if recording else 'growing'} pads {pads}"]
    ids = torch.zeros(rows, 0, dtype=torch.long)
    mask = torch.zeros(rows, 0, dtype=torch.long)
    worst = 0.0
    modes = [torch.no_grad, torch.no_grad, torch.inference_mode, torch.enable_grad]
    if static:  # its buffers are written in place, in one mode
        modes = [pick.choice(modes[1:3])]
    for _ in range(pick.randint(4, 16)):
        left, length = LONGEST - ids.shape[1], ids.shape[1]
        what = (
            pick.choice(["steps", "steps", "steps", "chunk", "chunk", "crop", "rows", "reset"]) if length else "chunk"
        )
        if what in ("steps", "chunk") and left:
            sizes = [1] * pick.randint(1, min(left, 9)) if what == "steps" else [pick.randint(1, min(left, 12))]
            if not length:  # padding is on the left of the first chunk
                sizes = [min(left, max(sizes[0], max(pads) + 1))]
            mode = pick.choice(modes)
            done.append(f"{mode.__name__} {sizes}")
            for size in sizes:
                new = torch.randint(2, 97, (ids.shape[0], size))
                real = torch.ones_like(new)
                if not ids.shape[1]:
                    for row, count in enumerate(pads):
                        real[row, :count] = 0
                ids, mask = torch.cat([ids, new], 1), torch.cat([mask, real], 1)
                with mode():
                    got = model(new, past_key_values=cache, **inputs(mask, size, any(pads))).logits.detach()
                with torch.no_grad():
                    want = model(ids, use_cache=False, **inputs(mask, ids.shape[1], any(pads))).logits[:, -size:]
                worst = max(worst, (got - want)[mask[:, -size:].bool()].abs().max().item())
        elif what == "crop" and can_crop and length > max(pads) + 1:
            count = pick.randint(1, min(length - max(pads) - 1, 5))
            kept = [layer.keys.shape[2] - layer.kept for layer in cache.layers if recording and hasattr(layer, "kept")]
            if (
                kept
                and min(min(kept), length) < count
                and any(
                    layer.cumulative_length > layer.keys.shape[2] and layer.keys.shape[2] - count < layer.kept
                    for layer in cache.layers
                    if hasattr(layer, "kept")
                )
            ):
                continue  # nothing so old was recorded
            if ka.convolution and cache.layers[0].tails[0].shape[1] - ka.convolution + 1 < count:
                continue
            done.append(f"crop {count}")
            cache.crop(-count)
            ids, mask = ids[:, :-count], mask[:, :-count]
        elif what == "rows":
            order = torch.tensor([pick.randrange(ids.shape[0]) for _ in range(pick.choice([1, 2, 3, 4]))])
            kind = pick.choice(["select", "repeat"] + ["reorder"] * (len(order) == ids.shape[0]))
            done.append(f"{kind} {order.tolist()}")
            if kind == "reorder":
                cache.reorder_cache(order)
            elif kind == "select":
                cache.batch_select_indices(order)
            elif ids.shape[0] < 4:
                cache.batch_repeat_interleave(2)
                order = torch.arange(ids.shape[0]).repeat_interleave(2)
            else:
                continue
            ids, mask, pads = ids[order], mask[order], [pads[i] for i in order]
        elif what == "reset" and pick.random() < 0.3:
            done.append("reset")
            with modes[0]():
                cache.reset()
            if static and ids.shape[0] != rows:
                break
            ids, mask = ids[:, :0], mask[:, :0]
    return worst, "; ".join(done)


def inputs(mask: torch.Tensor, size: int, padded: bool) -> dict:
    """What a caller gives besides the last ``size`` tokens."""
    if not padded:
        return {}
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -size:]}


def main(count: int, first: int = 0) -> None:
    began, worst = time.time(), 0.0
    for seed in range(first, first + count):
        try:
            error, done = run_script(seed)
        except Exception:
            print(f"script {seed} failed", flush=True)
            raise
        worst = max(worst, error)
        if not error < 1e-10:
            raise SystemExit(f"script {seed} is off by {error:.2g}: {done}")
    print(f"{count} scripts, largest difference {worst:.2g}, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
