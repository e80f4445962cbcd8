"""Random calls of the operator: any option with any other, any tensor in any layout, against the float64 token loop.

    python tests/ops/random_calls.py 2000 [backend [first seed]]

A call is its seed.
"""

import random
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ka_attention import ka_attention
from ka_attention.ops import reference
from ka_attention.ops.api import normalise

# Largest relative error. Half precision is rounded at the end; Triton's kernels also round weights to it.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SIZES = {"T": (0, 1, 1, 2, 3, 7, 17, 33, 64, 65, 130, 260), "P": (0, 0, 0, 1, 5, 40, 140), "D": (1, 2, 3, 8, 16)}
# Triton's interpreter is slow, and wrong in bfloat16.
SMALL, SMALL_DTYPES = {"T": (1, 2, 7, 17, 33, 40), "P": (0, 0, 1, 5, 20), "D": (8, 16)}, (torch.float32, torch.float16)


def laid_out(x: Tensor, choose: random.Random) -> Tensor:
    """x in another layout; where numbers share memory they become equal."""
    if x.ndim == 0:
        return x
    dim = choose.randrange(x.ndim)
    match choose.choice(("as it is", "permuted", "transposed", "strided", "part", "expanded", "one number", "offset")):
        case "permuted":
            order = choose.sample(range(x.ndim), x.ndim)
            return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])
        case "transposed" if x.ndim > 1:
            return x.mT.contiguous().mT
        case "strided":
            index = [slice(None)] * x.ndim
            index[dim] = slice(None, None, 2)
            return x.repeat_interleave(2, dim=dim)[tuple(index)]
        case "part":
            return torch.cat([x, x, x], dim=dim).narrow(dim, x.shape[dim], x.shape[dim])
        case "expanded" if x.shape[dim]:
            return x.narrow(dim, 0, 1).expand(x.shape)
        case "one number" if x.numel():
            return x.flatten()[:1].view([1] * x.ndim).expand(x.shape)
        case "offset":
            return torch.cat([x.flatten()[:1], x.flatten()])[min(1, x.numel()) :].view(x.shape)
    return x


@dataclass
class Call:
    """The call of a seed: its tensors by name, `da` among them, and its options."""

    seed: int
    sizes: dict = field(default_factory=lambda: SIZES)
    dtypes: tuple = tuple(TOLERANCE)

    def __post_init__(self):
        choose = self.choose = random.Random(self.seed)
        torch.manual_seed(self.seed)
        self.dtype = choose.choice((self.dtypes[0], *self.dtypes))
        B, Hkv, groups = choose.choice((1, 1, 2, 3)), choose.choice((1, 2, 3)), choose.choice((1, 1, 2, 3))
        T, D, P = (choose.choice(self.sizes[name]) for name in ("T", "D", "P"))
        H, ends = Hkv * groups, None
        if T and choose.random() < 0.2:
            B, P = 1, 0
            ends = torch.tensor([0, *sorted(choose.choices(range(T + 1), k=choose.randrange(4))), T])
        shape = {"q": (B, H, T, D), "k": (B, Hkv, T, D), "v": (B, Hkv, T, D), "da": (B, H, T, D)}
        if P:
            shape |= {"k_past": (B, Hkv, P, D), "u_past": (B, H, P, D)}
        self.tensors = {name: laid_out(torch.randn(size).to(self.dtype), choose) for name, size in shape.items()}
        self.options = {
            "scale": choose.choice((None, None, 0.0, 0.7, -0.4)),
            "softcap": choose.choice((None, None, None, 1.5, 20.0)),
            "window": choose.choice((None, None, 1, 2, 5, 16, 40, 70, 400)),
            "attn_mask": None if ends is not None else self._mask(B, H, T, P),
            "cu_seqlens": None if ends is None else choose.choice((ends.int(), ends.int().repeat_interleave(2)[::2])),
        }
        self.number = choose.choice((1.0, 1, 0, 0.3, -0.8))
        kind = choose.choice(("number", "number", "head", "token"))
        if kind != "number":
            gate = 2 * torch.rand((H,) if kind == "head" else (B, H, T)) - 1
            gate = gate.abs() if choose.random() < 0.5 else gate
            self.tensors["gate"] = laid_out(gate.to(choose.choice((torch.float32, torch.float64, self.dtype))), choose)

    def _mask(self, B: int, H: int, T: int, P: int) -> Tensor | None:
        choose = self.choose
        kind = choose.choice(("none", "none", "pads", "any", "full"))
        if kind == "none":
            return None
        if kind == "pads":
            pads = torch.arange(B)[:, None] * choose.randrange(1 + (P + T) // 2)
            return laid_out(torch.arange(P + T) >= pads, choose)
        full = (B, P + T) if kind == "any" else (B, H, T, P + T)
        size = full if kind == "any" else [choose.choice((1, whole)) for whole in full]
        return laid_out(torch.rand(size) < choose.choice((0.3, 0.7, 0.95)), choose)

    def results(self, backend: str | None, exactly: bool = False) -> dict[str, Tensor]:
        """Output and gradients by name; `exactly`, by the token loop in float64."""
        plain = {"dtype": torch.float64, "memory_format": torch.contiguous_format, "copy": True} if exactly else {}
        leaves = {name: x.detach().to(**plain) if plain else x.detach() for name, x in self.tensors.items()}
        da = leaves.pop("da")
        for x in leaves.values():
            x.requires_grad_()
        past = (leaves["k_past"], leaves["u_past"]) if "k_past" in leaves else None
        gate = leaves.get("gate", self.number)
        if exactly:
            o = self.options
            call = normalise(leaves["q"], leaves["k"], leaves["v"], gate, o["scale"], o["window"], past,
                             o["attn_mask"], o["cu_seqlens"], o["softcap"])  # fmt: skip
            out = reference.token_loop(*call.tensors, **call.options) if da.numel() else leaves["q"] * 1
        else:
            out = ka_attention(
                leaves["q"], leaves["k"], leaves["v"], gate=gate, past=past, backend=backend, **self.options
            )
        grads = torch.autograd.grad(out, list(leaves.values()), da, allow_unused=exactly, materialize_grads=exactly)
        return {"a": out.detach(), **{f"d{name}": x for name, x in zip(leaves, grads, strict=True)}}

    def check(self, backend: str | None) -> None:
        truth, got = self.results(backend, exactly=True), self.results(backend)
        largest = max([1.0, *(float(x.abs().max()) for x in self.tensors.values() if x.numel())])
        scale = (1 + self.tensors["da"].double().norm()) * largest  # gradients are differences of products with A
        for name, want in truth.items():
            found = got[name]
            like = self.tensors["q" if name == "a" else name[1:]]
            assert found is not None, f"{self}: {name} is None"
            assert (found.shape, found.dtype) == (like.shape, like.dtype), f"{self}: {name} is like {found.shape}"
            error = (found.double() - want).norm() / (want.norm() + 0.1 * scale)
            budget = max(TOLERANCE[self.dtype], 2 * torch.finfo(like.dtype).eps)  # a gate has a dtype of its own
            assert error <= budget, f"{self} {backend}: relative error of {name} is {error:.2g}"

    def __str__(self) -> str:
        tensors = ", ".join(f"{name} {list(x.shape)}/{x.stride()}" for name, x in self.tensors.items())
        options = {name: list(x.shape) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        return f"seed {self.seed}: {self.dtype} {tensors} {options} gate {self.number}"


def main(count: int, backend: str = "blocked", first: int = 0) -> int:
    wrong, limits = 0, (SMALL, SMALL_DTYPES) if backend == "triton" else (SIZES, tuple(TOLERANCE))
    for seed in range(first, first + count):
        try:
            Call(seed, *limits).check(None if backend == "None" else backend)
        except Exception as error:
            wrong += 1
            print(f"{type(error).__name__}: {error}".splitlines()[0], f"(seed {seed})")
    print(f"{count} random calls of {backend}: {wrong} wrong")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:3], *map(int, sys.argv[3:4])))
