"""The public operator: validate, choose a backend, run."""

import itertools
import math
import warnings
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ka_attention.ops import dispatch, paged, private, reference
from ka_attention.ops.checks import check_tensor, finite, kind_of, number
from ka_attention.ops.inputs import Call, Options, Tensors, repeat_heads
from ka_attention.ops.one import attend_one

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BACKENDS = ("reference", "blocked", "triton")
_checked = WeakTensorKeyDictionary()  # of each cu_seqlens that was right: its version and T then


def ka_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gate: float | Tensor = 1.0,
    scale: float | None = None,
    window: int | None = None,
    past: tuple[Tensor, Tensor] | None = None,
    attn_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
    group: "ProcessGroup | None" = None,
) -> Tensor:
    """Causal attention in which a past token contributes its attention output instead of its value.

        A_i = Σ_{j<i} W_ij U_j + W_ii V_i,    U_j = V_j + g_j (A_j − V_j),    W = causal_softmax(scale · Q Kᵀ)

    The system is unit lower-triangular, so it is solved exactly and in parallel (docs/maths.md). Gradients flow to all
    floating-point tensors. A row that may attend nothing gives 0 and has no gradient.

    Args:
        q: queries, [B, Hq, T, D]; float32, float64, bfloat16 or float16.
        k, v: keys and values, [B, Hkv, T, D] with Hq a multiple of Hkv: query head h reads key head h // (Hq // Hkv).
        gate: g in [-1, 1], a number, [Hq] or [B, Hq, T], any float dtype. 0 is softmax attention, 1 is KA-attention.
            Beyond 1 outputs may grow with every token: such a number is refused, such a tensor on a CPU warned of.
        scale: factor of the scores, D**-0.5 by default.
        window: token i attends to the last `window` positions only, itself included, the past counted in.
        past: cached prefix (k_past [B, Hkv, P, D], u_past [B, Hq, P, D]); `cache_values` makes the second.
        attn_mask: bool, True may be attended; [B, P + T] (real tokens, as in transformers) or 4-D, broadcastable to
            [B, Hq, T, P + T]. Causality applies besides.
        cu_seqlens: int32 [N + 1], ends of N packed sequences: 0, …, T; for B = 1, without attn_mask and, but for one in
            pages, without past. The values are checked, which waits for the device, once a tensor and not in every
            layer; under torch.compile and in CUDA graphs on the device, where wrong ones are a RuntimeError.
        block_table, cache_seqlens: with them each packed sequence continues a past of its own, which lies in pages of S
            tokens: past is (k_pages [M, Hkv, S, D], u_pages [M, Hq, S, D]), of any strides. int32 [N, width] and [N],
            as in flash_attn_with_kvcache: sequence n has a past of cache_seqlens[n] tokens, token p of it in place
            p % S of page block_table[n, p // S % width]. With a window a table of fewer pages is thus a ring, of
            window − 1 tokens or more; pages out of sight are not read. For inference alone: no gradient. With the
            number 0 as gate, u_pages may have k's heads, of V.
        softcap: scores become softcap · tanh(scores / softcap).
        dropout: only 0.0; attention that feeds itself has no established dropout.
        backend: "reference" (dense, any dtype), "blocked" (PyTorch, any device), "triton" (CUDA), or None to choose: by
            device, but for one token after a past PyTorch's own attention, which is the same then. A named backend that
            cannot serve the call raises RuntimeError.
        group: processes that hold one text together, each a contiguous share of T tokens in the order of their ranks.
            q, k, v, gate and the result are the share's, cu_seqlens those of the whole text. With a window ranks
            exchange messages whose size does not depend on T, and a share must hold window − 1 tokens; without one
            they share out the heads, whose numbers must be multiples of the group's size. Windows of more than D + 1
            tokens do so, too, where the numbers allow it. No past, no attn_mask.

    Returns:
        A, [B, Hq, T, D], in q's dtype. Half precision is computed with float32 softmax and accumulation.

    Raises:
        TypeError: an argument of the wrong type or dtype, by its name, before any work.
        ValueError: a shape or value that is not allowed, likewise; where shapes make sense as [B, T, H, D] alone, it
            says to transpose them.
        RuntimeError: a backend that cannot serve the call, or a derivative that it does not have.

    Any strides are right; heads and tokens may change places without a copy (`x.transpose(1, 2)`). NaN and infinity
    reach the rows that read them and no other, but for "triton", whose kernels may spread them over their sequence.

    Not supported: dropout. A second derivative, forward mode and torch.func's grad, vjp and jvp are RuntimeErrors, but
    for backend="reference", which has them all. torch.vmap works, forward and backward, one entry after another.
    torch.compile sees one operator a pass, of any size, and autocast leaves it alone: cast the inputs.

    Examples:
        Whole sequences. With gate 0 this is PyTorch's causal attention:

        >>> import torch
        >>> from ka_attention import cache_values, ka_attention
        >>> q, k, v = torch.randn(3, 2, 4, 10, 16).unbind()  # [B, H, T, D]
        >>> ka_attention(q, k, v).shape
        torch.Size([2, 4, 10, 16])
        >>> softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.allclose(ka_attention(q, k, v, gate=0.0), softmax, atol=1e-5)
        True

        A prompt of six tokens, then the rest after its cache of keys and U, where a token sees the last three:

        >>> first = ka_attention(q[:, :, :6], k[:, :, :6], v[:, :, :6], window=3)
        >>> past = k[:, :, :6], cache_values(v[:, :, :6], first)
        >>> rest = ka_attention(q[:, :, 6:], k[:, :, 6:], v[:, :, 6:], window=3, past=past)
        >>> torch.allclose(torch.cat([first, rest], 2), ka_attention(q, k, v, window=3), atol=1e-5)
        True

        Two packed sequences, grouped queries (four query heads, one key head) and a learned gate per head:

        >>> gate = torch.full((4,), 0.5, requires_grad=True)
        >>> ends = torch.tensor([0, 7, 10], dtype=torch.int32)
        >>> a = ka_attention(q[:1], k[:1, :1], v[:1, :1], gate=gate, cu_seqlens=ends)
        >>> a.sum().backward()
        >>> gate.grad.shape
        torch.Size([4])
    """
    if dropout != 0.0:
        raise ValueError(f"dropout must be 0.0 (KA-attention has none), got {dropout}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    if group is not None:
        if not past is attn_mask is block_table is cache_seqlens is None:
            raise ValueError("group cannot be combined with past or attn_mask; cu_seqlens keeps sequences apart")
        return _over_ranks(
            group, normalise(q, k, v, gate, scale, window, None, None, None, softcap), gate, cu_seqlens, backend
        )
    if block_table is not None or cache_seqlens is not None:
        if cu_seqlens is None or past is None or block_table is None or cache_seqlens is None:
            raise ValueError("block_table and cache_seqlens are given together, with cu_seqlens and past")
        if attn_mask is not None:
            raise ValueError("block_table cannot be combined with attn_mask")
        call = normalise(q, k, v, gate, scale, window, None, None, cu_seqlens, softcap)
        return paged.attend(call, gate, past, cu_seqlens, block_table, cache_seqlens, backend)
    call = normalise(q, k, v, gate, scale, window, past, attn_mask, cu_seqlens, softcap)
    if q.numel() == 0:  # every input has a gradient, of zeros
        return q + sum(0 * x.sum().to(q.dtype) for x in call.tensors.differentiable() if x is not None)
    if backend == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return reference.dense(*call.tensors, **call.options)
    if backend is None and _is_one_token_after_a_past(call):
        with torch.autocast(q.device.type, enabled=False):
            a = _one_token(*call.tensors, **call.options)
        if attn_mask is None or q.device.type != "cpu" or dispatch.traced(q) or math.isfinite(a.sum().item()):
            return a  # else a weight of 0 may have met what is not finite
    return dispatch.attend(*call, backend or _default(q))


def _over_ranks(group, call: Call, gate, cu_seqlens, backend) -> Tensor:
    from ka_attention.ops import ranks  # a PyTorch may be built without collectives

    q, k, v, *_ = call.tensors
    if ranks.share_heads(group, q, k, call.options["window"]):
        return ranks.by_heads(group, partial(ka_attention, **call.options, backend=backend), q, k, v, gate, cu_seqlens)
    return ranks.by_tokens(group, call, cu_seqlens, backend or _default(q))


def _is_one_token_after_a_past(call: Call) -> bool:
    """Whether `_one_token` serves the call."""
    x = call.tensors
    if x.q.shape[2] != 1 or x.k_past is None or call.options["softcap"] is not None:
        return False
    trains_gate = x.gate is not None and x.gate.requires_grad  # its gradient is 0 then, not absent
    return not trains_gate and (x.mask is None or not x.may_train())


def _default(q: Tensor) -> str:
    return "triton" if q.device.type == "cuda" else "blocked"


def _one_token(q, k, v, gate, k_past, u_past, mask, cu_seqlens, *, scale, window, softcap) -> Tensor:
    k, u = torch.cat([k_past, k], dim=2), torch.cat([u_past, repeat_heads(v, q)], dim=2)
    return attend_one(q, k, u, mask, scale, window)


def cache_values(v: Tensor, a: Tensor, gate: float | Tensor = 1.0) -> Tensor:
    """U = V + g (A − V), what a later token reads of each token and a cache stores: [B, Hq, T, D] in a's dtype.

    `v` is [B, Hkv, T, D], `a` the output [B, Hq, T, D] of `ka_attention` with the same `gate`.
    """
    if a.ndim != 4 or v.ndim != 4 or v.shape[:1] + v.shape[2:] != a.shape[:1] + a.shape[2:] or a.shape[1] % v.shape[1]:
        raise ValueError(f"v must be [B, Hkv, T, D] for a [B, Hq, T, D], got {list(v.shape)} and {list(a.shape)}")
    g = expand_gate(gate, a)
    if g is None:
        return a
    return torch.lerp(repeat_heads(v, a).to(g.dtype), a.to(g.dtype), g[..., None]).to(a.dtype)


def normalise(q, k, v, gate, scale, window, past, attn_mask, cu_seqlens, softcap) -> Call:
    """Check every argument of `ka_attention` and bring it to the form that backends take."""
    others = scale, window, attn_mask, cu_seqlens, softcap
    try:
        return _normalise(q, k, v, gate, past, *others)
    except ValueError as error:
        if torch.compiler.is_compiling() or not _fit_transposed(q, k, v, gate, past, others):
            raise
        raise ValueError(f"{error}; these look like [B, T, H, D]: transpose them, x.transpose(1, 2)") from None


def _fit_transposed(q, k, v, gate, past, others) -> bool:
    """Whether arguments that make no sense do so once tokens and heads have changed places."""
    try:
        q, k, v, *past = (x.transpose(1, 2) for x in (q, k, v, *(past or ())))
        _normalise(q, k, v, gate, tuple(past) or None, *others)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    return True


def _normalise(q, k, v, gate, past, scale, window, attn_mask, cu_seqlens, softcap) -> Call:
    check_tensor("q", q, q, None)
    B, Hq, T, D = q.shape
    check_tensor("k", k, q, (B, None, T, D))
    Hkv = k.shape[1]
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(f"q must have a multiple of k's heads, got {Hq} query heads and {Hkv} key heads")
    check_tensor("v", v, q, (B, Hkv, T, D))
    scale = max(D, 1) ** -0.5 if scale is None else number("scale", scale)
    softcap = None if softcap is None else number("softcap", softcap, above=0)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
        raise TypeError(f"window must be None or an int, got {type(window).__name__}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")

    k_past = u_past = None
    if past is not None:
        if not isinstance(past, (tuple, list)) or len(past) != 2:
            raise TypeError("past must be None or the pair (k_past, u_past)")
        k_past, u_past = past
        check_tensor("past[0] (k_past)", k_past, q, (B, Hkv, None, D))
        check_tensor("past[1] (u_past)", u_past, q, (B, Hq, k_past.shape[2], D))
        if k_past.shape[2] == 0:
            k_past = u_past = None
    P = 0 if k_past is None else k_past.shape[2]

    if cu_seqlens is not None:
        if past is not None or attn_mask is not None:
            raise ValueError(
                "cu_seqlens cannot be combined with past or attn_mask, but for a past in pages (block_table)"
            )
        cu_seqlens = _check_cu_seqlens(cu_seqlens, q).contiguous()
    mask = None if attn_mask is None else _expand_mask(attn_mask, q, P)
    g = expand_gate(gate, q)
    if isinstance(gate, Tensor):
        _warn_of_unstable(gate)
    elif not -1 <= gate <= 1:
        raise ValueError(f"gate must be between -1 and 1, got {gate}")
    tensors = Tensors(q, k, v, g, k_past, u_past, mask, cu_seqlens)
    options: Options = {"scale": scale, "window": window, "softcap": softcap}
    return Call(tensors, options)


def _warn_of_unstable(gate: Tensor) -> None:
    """Beyond 1 the walk gains weight at every hop. A tensor is looked at only where that keeps nobody waiting."""
    if gate.device.type != "cpu" or gate.numel() == 0 or dispatch.traced(gate):
        return
    low, high = gate.detach().aminmax()
    if low < -1 or high > 1:
        warnings.warn(
            f"gate goes from {low:.4g} to {high:.4g}: beyond [-1, 1] outputs may grow with every token, "
            "clamp it (ka_attention.ops.clamp_gate)",
            stacklevel=5,
        )


def expand_gate(gate: float | Tensor, q: Tensor) -> Tensor | None:
    """The gate as [B, Hq, T] in float32 (float64 for float64 queries); None for the number 1."""
    B, Hq, T, _ = q.shape
    if isinstance(gate, (int, float)) and not isinstance(gate, bool):
        if not finite(gate):
            raise ValueError(f"gate must be finite, got {gate}")
        if gate == 1:
            return None
        gate = torch.full((Hq,), float(gate), device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
    if not isinstance(gate, Tensor) or not gate.is_floating_point():
        raise TypeError(f"gate must be a number or a floating-point tensor, got {kind_of(gate)}")
    if gate.device != q.device:
        raise ValueError(f"gate must be on q's device {q.device}, got {gate.device}")
    if gate.shape not in ((Hq,), (B, Hq, T)):
        raise ValueError(f"gate must be a number, [Hq] = [{Hq}] or [B, Hq, T] = {[B, Hq, T]}, got {list(gate.shape)}")
    gate = gate.to(torch.promote_types(q.dtype, torch.float32))
    return gate.view(1, Hq, 1).expand(B, Hq, T) if gate.ndim == 1 else gate


def _expand_mask(mask: Tensor, q: Tensor, P: int) -> Tensor:
    B, Hq, T, _ = q.shape
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"attn_mask must be a bool tensor (True may be attended), got {kind_of(mask)}")
    if mask.device != q.device:
        raise ValueError(f"attn_mask must be on q's device {q.device}, got {mask.device}")
    full = (B, Hq, T, P + T)
    if mask.ndim == 2 and mask.shape == (B, P + T):
        return mask[:, None, None, :]
    if mask.ndim == 4 and all(size in (1, whole) for size, whole in zip(mask.shape, full, strict=True)):
        return mask
    raise ValueError(
        f"attn_mask must be [B, P + T] = {[B, P + T]} or 4-D, broadcastable to [B, Hq, T, P + T] = {list(full)}, "
        f"got {list(mask.shape)}"
    )


def _check_cu_seqlens(cu: Tensor, q: Tensor) -> Tensor:
    if not isinstance(cu, Tensor) or cu.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be an int32 tensor, got {kind_of(cu)}")
    if cu.device != q.device:
        raise ValueError(f"cu_seqlens must be on q's device {q.device}, got {cu.device}")
    if cu.ndim != 1 or len(cu) < 2 or q.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens must be [N + 1] with N ≥ 1 for a batch of 1, got {list(cu.shape)} for a batch of {q.shape[0]}"
        )
    wrong = f"cu_seqlens must rise from 0 to T = {q.shape[2]} without falling"
    if torch.compiler.is_compiling() or (cu.is_cuda and torch.cuda.is_current_stream_capturing()):
        # The values cannot be looked at here, so the device does.
        return private.checked(cu, (cu[0] == 0) & (cu[-1] == q.shape[2]) & (cu.diff() >= 0).all(), wrong)
    version = private.version(cu)
    if version is not None and _checked.get(cu) == (version, q.shape[2]):
        return cu
    ends = cu.tolist()
    if ends[0] != 0 or ends[-1] != q.shape[2] or any(b < a for a, b in itertools.pairwise(ends)):
        raise ValueError(f"{wrong}, got {ends}")
    if version is not None:
        _checked[cu] = version, q.shape[2]
    return cu
