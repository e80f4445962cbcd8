"""Random calls with pasts in pages: lengths, pages in any order, rings, layouts, against each sequence by itself."""

import random

import torch

from ka_attention import ka_attention


class PagedCall:
    """The call of a seed. ``options`` and ``tensors`` are those of the operator, ``expected()`` what it gives."""

    def __init__(
        self, seed, dtype=torch.float64, page=(1, 2, 4, 16), most=40, head_dim=(4, 8), sequences=None,
        windows=(None, None, 1, 2, 5, 16, 100),
    ):  # fmt: skip
        choose = random.Random(seed)
        torch.manual_seed(seed)
        Hkv, groups, D, S = (
            choose.choice((1, 2)),
            choose.choice((1, 1, 3)),
            choose.choice(head_dim),
            choose.choice(page),
        )
        H, N = Hkv * groups, sequences or choose.randrange(1, 6)
        new = [choose.choice((0, 1, 1, 2, 7, most)) for _ in range(N)]
        pasts = [choose.choice((0, 1, 3, S, 2 * S + 1, most)) for _ in range(N)]
        window = choose.choice(windows)
        kind = choose.choice(("one", "zero", "values", "number", "head", "token"))
        shape = {"number": 0.4, "head": torch.rand(H), "token": torch.rand(1, H, sum(new))}
        self.gate = {"one": 1.0, "zero": 0, "values": 0}.get(kind, shape.get(kind))
        heads = Hkv if kind == "values" else H
        if isinstance(self.gate, torch.Tensor):
            self.gate = self.gate.to(dtype)

        def normal(*size, layout=(0, 1, 2, 3)):
            x = torch.randn([size[i] for i in layout]).to(dtype)
            return x.permute([layout.index(i) for i in range(4)])

        self.new = [
            normal(1, h, sum(new), D, layout=choose.choice(((0, 1, 2, 3), (0, 2, 1, 3)))) for h in (H, Hkv, Hkv)
        ]
        self.pasts = [(normal(1, Hkv, p, D), normal(1, heads, p, D)) for p in pasts]
        longest = max(pasts)
        if window is not None and choose.random() < 0.7:
            longest = min(longest, window - 1)  # a ring
        width = -(-longest // S) + choose.randrange(2)
        pages = list(range(N * width + 2))
        choose.shuffle(pages)
        layout = choose.choice(((0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3)))
        pool = [normal(len(pages), h, S, D, layout=layout) for h in (Hkv, heads)]
        for x in pool:
            x.fill_(torch.nan)
        table = torch.full((N, width), -7, dtype=torch.int32)
        for n, (past, length) in enumerate(zip(self.pasts, pasts, strict=True)):
            for p in range(0 if window is None else max(0, length - window + 1), length):
                if table[n, p // S % width] < 0:
                    table[n, p // S % width] = pages.pop()
                for x, own in zip(pool, past, strict=True):
                    x[table[n, p // S % width], :, p % S] = own[0, :, p]
        self.ends = [0, *torch.tensor(new).cumsum(0).tolist()]
        self.options = {
            "gate": self.gate,
            "window": window,
            "scale": choose.choice((None, 0.7)),
            "softcap": choose.choice((None, None, 1.5)),
        }
        self.tables = {
            "past": tuple(pool),
            "cu_seqlens": torch.tensor(self.ends, dtype=torch.int32),
            "block_table": table,
            "cache_seqlens": torch.tensor(pasts, dtype=torch.int32),
        }

    def __call__(self, device="cpu", **changes):
        def there(x):
            return x.to(device) if isinstance(x, torch.Tensor) else x

        options = {name: there(x) for name, x in {**self.options, **self.tables}.items()}
        options["past"] = tuple(map(there, self.tables["past"]))
        return ka_attention(*map(there, self.new), **{**options, **changes}).cpu()

    def expected(self):
        """Each sequence by itself, in float64, by the token loop's equal, the dense solve."""
        parts = []
        for (start, stop), past in zip(zip(self.ends, self.ends[1:], strict=False), self.pasts, strict=True):
            q, k, v = (x[:, :, start:stop].double() for x in self.new)
            past = past[0].double(), past[1].double().repeat_interleave(q.shape[1] // past[1].shape[1], dim=1)
            gate = self.gate
            if isinstance(gate, torch.Tensor):
                gate = (gate if gate.ndim == 1 else gate[:, :, start:stop]).double()
            parts.append(ka_attention(q, k, v, past=past, backend="reference", **{**self.options, "gate": gate}))
        return torch.cat(parts, dim=2)
