"""The operator alone: how far a token reaches through a window of two.

python examples/reach.py
"""

import torch

from ka_attention import ka_attention

torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1, 64, 16).unbind()  # [batch, heads, tokens, head dimension]
v.requires_grad_()

for name, gate in (("softmax attention", 0.0), ("KA-attention", 1.0)):
    out = ka_attention(q, k, v, gate=gate, window=2)
    (reach,) = torch.autograd.grad(out[0, 0, -1].sum(), v)
    print(f"{name}: the last token depends on {int((reach.abs().sum(-1) > 0).sum())} of 64 tokens")
