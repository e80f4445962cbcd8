"""Gated DeltaNet and Mamba-2 as PyTorch operations: nothing to install, nothing to tune, any device.

Both keep a matrix S a head, ``S_t = e^{a_t} S_{t−1} + k_t u_tᵀ``, and read ``S_tᵀ q_t`` from it. A compiler fuses what
stands between the matrix products; kernels made for one of them are faster, so times of these layers say little.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ka_attention.harness.models.mixers import Mixer, Remembering, ShortConvolution

CHUNK = 64  # tokens that meet each other directly; all before them by way of S
STEPS = (0.001, 0.1)  # between which the steps of a new layer are drawn, evenly in the logarithm (Mamba's)
RATES = (1.0, 16.0)  # the same of decays a step
EPSILON = 1e-6


def scan(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None = None, *, chunk: int = CHUNK) -> Tensor:
    """``S_tᵀ q_t`` for q, k ``[B, H, T, K]``, v ``[B, H, T, V]``, a = ``decay`` ``[B, H, T]``, not above 0.

    u_t is v_t or, with ``beta`` ``[B, H, T]``, the delta rule's ``β_t (v_t − e^{a_t} S_{t−1}ᵀ k_t)``: within a chunk
    the solution of a triangular system (arXiv 2412.06464, section 3.3).
    """
    length, exact = q.shape[2], torch.promote_types(v.dtype, torch.float32)

    def chunks(x: Tensor) -> Tensor:
        rest = -length % chunk
        return F.pad(x, (0, 0) * (x.ndim - 3) + (0, rest)).unflatten(2, (-1, chunk))

    q, k, v, decay = chunks(q), chunks(k), chunks(v), chunks(decay.to(exact)).cumsum(-1)
    fade = faded(decay[..., :, None] - decay[..., None, :], 0)
    since = decay.exp()[..., None]  # how much of S before the chunk is left
    kept = (k * (decay[..., -1:] - decay).exp()[..., None]).to(k.dtype).mT
    if beta is None:
        total = decay[..., -1].cumsum(-1)
        weight = faded((total - decay[..., -1])[..., :, None] - total[..., None, :], -1)
        u, states = v, (weight.to(v.dtype) @ (kept @ v).flatten(-2)).unflatten(-1, (k.shape[-1], v.shape[-1]))
    else:
        weight = chunks(beta.to(exact))
        solution = inverse((weight[..., None] * (k @ k.mT) * fade).tril(-1)) * weight[..., None, :]
        w = (solution * since.mT).to(k.dtype) @ k
        states, u = chunk_states(solution.to(v.dtype) @ v, w, kept, since[..., -1, 0])
    out = (q * since).to(q.dtype) @ states + (q @ k.mT * fade).to(v.dtype) @ u
    return out.flatten(2, 3)[:, :, :length]


def faded(exponents: Tensor, diagonal: int) -> Tensor:
    """Their exponentials where a row may see a column: up to this diagonal."""
    seen = torch.ones(exponents.shape[-2:], dtype=torch.bool, device=exponents.device).tril(diagonal)
    return exponents.masked_fill(~seen, -torch.inf).exp()


def _chunk_states(u: Tensor, w: Tensor, kept: Tensor, fade: Tensor) -> tuple[Tensor, Tensor]:
    """S before each chunk n, and ``x_n = u_n − w_n S_n``, where ``S_{n+1} = fade_n S_n + kept_n x_n`` and S_0 = 0.

    u ``[B, H, N, C, V]``, w ``[B, H, N, C, K]``, kept ``[B, H, N, K, C]``, fade ``[B, H, N]``. An operator of its own:
    a compiler would unroll the chunks for a minute, and keep a copy of all of them for each one's gradient.
    """
    states, found = u.new_empty(*kept.shape[:4], u.shape[-1]), u.new_empty(u.shape)
    state = fade.new_zeros(*kept.shape[:2], kept.shape[3], u.shape[-1])
    for n in range(u.shape[2]):
        states[:, :, n] = state
        found[:, :, n] = u[:, :, n] - w[:, :, n] @ states[:, :, n]
        state = (fade[:, :, n, None, None] * state).add_(kept[:, :, n] @ found[:, :, n])
    return states, found


def _chunk_states_backward(
    by_states: Tensor, by_found: Tensor, w: Tensor, kept: Tensor, fade: Tensor, states: Tensor, found: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients by u, w, kept and fade."""
    later, by_u = states.new_empty(states.shape), found.new_empty(found.shape)
    by_state = fade.new_zeros(*kept.shape[:2], kept.shape[3], found.shape[-1])
    for n in reversed(range(found.shape[2])):
        later[:, :, n] = by_state
        by_u[:, :, n] = by_found[:, :, n] + kept[:, :, n].mT @ later[:, :, n]
        by_state = (fade[:, :, n, None, None] * by_state).add_(by_states[:, :, n])
        by_state -= w[:, :, n].mT @ by_u[:, :, n]
    by_fade = (later.to(fade.dtype) * states).sum((-1, -2))
    return by_u, -by_u @ states.mT, later @ found.mT, by_fade


chunk_states = torch.library.custom_op("ka_attention::chunk_states", _chunk_states, mutates_args=())
chunk_states_backward = torch.library.custom_op(
    "ka_attention::chunk_states_backward", _chunk_states_backward, mutates_args=()
)


@chunk_states.register_fake
def _(u: Tensor, w: Tensor, kept: Tensor, fade: Tensor) -> tuple[Tensor, Tensor]:
    return u.new_empty(*kept.shape[:4], u.shape[-1]), u.new_empty(u.shape)


@chunk_states_backward.register_fake
def _(
    by_states: Tensor, by_found: Tensor, w: Tensor, kept: Tensor, fade: Tensor, states: Tensor, found: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (found, w, kept, fade))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[1:], *output)


chunk_states.register_autograd(lambda ctx, *by: chunk_states_backward(*by, *ctx.saved_tensors), setup_context=_keep)


def inverse(below: Tensor) -> Tensor:
    """``(I + N)⁻¹`` of strictly lower triangular matrices N ``[…, C, C]``, C a power of 2, in their dtype."""
    size = below.shape[-1]
    place = torch.arange(size, device=below.device)
    with torch.autocast(below.device.type, enabled=False):
        with torch.no_grad():
            x = torch.eye(size, dtype=below.dtype, device=below.device).expand_as(below)
            for block in (1 << i for i in range(size.bit_length() - 1)):
                row, column = place[:, None] // block, place // block
                x = x - x @ (below * ((row == column + 1) & (row % 2 == 1))) @ x
        return 2 * x - x @ (x + below @ x)  # a step of Newton's, which keeps the value and has the gradient


def recur(state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None = None) -> Tensor:
    """What `scan` gives, token by token after those that left ``state`` ``[B, H, K, V]``, which is brought forward."""
    out = []
    for t in range(q.shape[2]):
        state *= decay[:, :, t, None, None].exp()
        u = v[:, :, t, None]
        if beta is not None:
            u = beta[:, :, t, None, None].to(v.dtype) * (u - k[:, :, t, None] @ state)
        state += k[:, :, t, :, None] * u
        out.append(q[:, :, t, None] @ state)
    return torch.cat(out, 2)


class Recurrent(Mixer, Remembering):
    """What the two share: decays ``a_t = −e^r softplus(h_t W + b)`` with r and b of each head. The past is S."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.rate, self.step = nn.Parameter(torch.zeros(heads)), nn.Parameter(torch.zeros(heads))

    def scan(self, *inputs: Tensor) -> Tensor:
        """Of a whole sequence, or of what comes after the past."""
        return scan(*inputs) if self.past is None else recur(self.past, *inputs)

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Rates and steps of a new layer."""
        between = [torch.rand(len(self.rate), generator=generator) for _ in range(2)]
        self.rate.copy_((RATES[0] + (RATES[1] - RATES[0]) * between[0]).log())
        steps = STEPS[0] * (STEPS[1] / STEPS[0]) ** between[1]
        self.step.copy_(steps.expm1().log())  # softplus of this is the step


class GatedDeltaNet(Recurrent):
    """``o_proj(norm(scan(q, k, v, a, β)) · silu(W_g h))`` (arXiv 2412.06464), with half as many heads as attention.

    q, k and v pass a `ShortConvolution` and silu, q and k have length 1 (q then 1/√D), β is a sigmoid of h.
    """

    def __init__(self, size: int, heads: int, *, output_gate: bool) -> None:
        heads = max(1, heads // 2)
        super().__init__(heads)
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size, bias=False) for _ in range(4))
        self.a_proj, self.b_proj = (nn.Linear(size, heads, bias=False) for _ in range(2))
        self.convolutions = nn.ModuleList(ShortConvolution(size, identity=False, drawn=True) for _ in range(3))
        self.out_gate = nn.Linear(size, size, bias=False) if output_gate else None
        self.weight = nn.Parameter(torch.ones(size // heads))

    def nothing(self, batch: int) -> Tensor:
        size = len(self.weight)
        return self.weight.new_zeros(batch, self.heads, size, size)

    def before(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        projections = self.q_proj, self.k_proj, self.v_proj
        mixed = [F.silu(convolve(p(h))) for p, convolve in zip(projections, self.convolutions, strict=True)]
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in mixed)
        q, k = (x * (x * x).sum(-1, keepdim=True, dtype=self.rate.dtype).add(EPSILON).rsqrt() for x in (q, k))
        decay = -self.rate.exp() * F.softplus(self.a_proj(h) + self.step)
        beta = self.b_proj(h).sigmoid()
        q, k = (q * v.shape[-1] ** -0.5).to(v.dtype), k.to(v.dtype)
        out = self.scan(q, k, v, decay.mT, beta.mT).transpose(1, 2)
        return (out,) if self.out_gate is None else (out, self.out_gate(h))

    def after(self, *tensors: Tensor) -> Tensor:
        a, *gates = tensors
        a = normalised(a, self.weight).flatten(2)
        return self.o_proj(F.silu(gates[0]) * a if gates else a)


class Mamba2(Recurrent):
    """``o_proj(norm(y · silu(z)))``, y = scan(c, b, Δ x, −e^r Δ) + d x (arXiv 2405.21060): twice the model's size wide.

    Heads are of attention's size D, S of D / 2 × D; x, b and c pass a `ShortConvolution` and silu, b and c are those of
    all heads.
    """

    def __init__(self, size: int, heads: int) -> None:
        super().__init__(2 * heads)
        self.inner, self.head, self.state = 2 * size, size // heads, max(1, size // heads // 2)
        self.in_proj = nn.Linear(size, 2 * self.inner + 2 * self.state + 2 * heads, bias=False)
        self.convolution = ShortConvolution(self.inner + 2 * self.state, identity=False, drawn=True)
        self.skip = nn.Parameter(torch.ones(2 * heads))
        self.weight = nn.Parameter(torch.ones(self.inner))
        self.o_proj = nn.Linear(self.inner, size, bias=False)

    def nothing(self, batch: int) -> Tensor:
        return self.weight.new_zeros(batch, len(self.rate), self.state, self.head)

    def before(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        z, mixed, step = self.in_proj(h).split([self.inner, self.inner + 2 * self.state, len(self.rate)], -1)
        x, b, c = F.silu(self.convolution(mixed)).split([self.inner, self.state, self.state], -1)
        x = x.unflatten(-1, (-1, self.head))
        b, c = (y[:, None].expand(-1, len(self.rate), -1, -1) for y in (b, c))
        step = F.softplus(step + self.step)
        decay = -self.rate.exp() * step
        out = self.scan(c, b, (x * step[..., None]).to(x.dtype).transpose(1, 2), decay.mT).transpose(1, 2)
        return (out + (x * self.skip[:, None]).to(x.dtype)).flatten(2), z

    def after(self, *tensors: Tensor) -> Tensor:
        y, z = tensors
        return self.o_proj(normalised(y * F.silu(z), self.weight))


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    """Root mean square 1, times ``weight``, in x's dtype."""
    exact = x.to(weight.dtype)
    return (exact * (exact * exact).mean(-1, keepdim=True).add(EPSILON).rsqrt() * weight).to(x.dtype)
