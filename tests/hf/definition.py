"""The definition, token by token, as an attention implementation of its own: what the integration is compared with."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ka_attention.hf import KAConfig


def install(ka: KAConfig, gate: float = 1.0) -> str:
    """Register the definition for ``ka`` with one fixed gate, and return the name of the implementation."""

    def attend(module, q, k, v, mask, scaling=None, softcap=None, **kwargs):
        i, (_, H, n, D) = module.layer_idx, q.shape
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * (scaling or D**-0.5)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        distance = torch.arange(n)[:, None] - torch.arange(n)
        allowed = (distance >= 0) & (distance < (ka.window if ka.window and ka.enabled(i) else n))
        allowed = allowed if mask is None else allowed & mask
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0)
        g = gate if ka.caches_outputs(i) else 0.0
        read, out = v.clone(), []
        for t in range(n):
            a = weights[:, :, t : t + 1] @ torch.cat([read[:, :, :t], v[:, :, t:]], dim=2)
            read[:, :, t : t + 1] += g * (a - v[:, :, t : t + 1])
            out.append(a)
        return torch.cat(out, dim=2).transpose(1, 2), None

    AttentionInterface.register("definition", attend)
    AttentionMaskInterface.register("definition", sdpa_mask)
    return "definition"
