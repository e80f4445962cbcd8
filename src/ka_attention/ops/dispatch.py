"""The operator pair `ka_attention::forward` and `ka_attention::backward`, which every backend but the reference serves.

As library operators they are opaque to torch.compile and to autocast: one node in a graph, computed in the dtype given.
"""

import functools
import inspect
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ka_attention.ops import private
from ka_attention.ops.inputs import Options, Tensors

# torch.compile keeps graphs on disk and finds them again by operators and arguments, not by the shapes that an operator
# returns. An argument that changes with this folder's code keeps a graph of another version from being found.
_SOURCES = sorted(Path(__file__).parent.rglob("*.py"))
REVISION = f"{zlib.crc32(b''.join(file.read_bytes() for file in _SOURCES)):08x}"

_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


@functools.cache
def load(backend: str) -> ModuleType:
    match backend:
        case "reference":
            from ka_attention.ops import reference

            return reference
        case "blocked":
            from ka_attention.ops import blocked

            return blocked
        case "triton":
            from ka_attention.ops import triton

            return triton
    raise ValueError(f"no backend {backend!r}")


def without_autocast(q: Tensor, backend: str):
    """For PyTorch's operators; kernels of our own do not know autocast."""
    if backend == "triton" or not torch.is_autocast_enabled(q.device.type):
        return nullcontext()
    return torch.autocast(q.device.type, enabled=False)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    k_past: Tensor | None,
    u_past: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    save: bool,
    backend: str,
    revision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(A [B, Hq, T, D], log-sum-exp [B, Hq, T], with `save` what the backend wants back in `_backward`, else empty).

    `Tensors` and `Options` laid out flat, as library operators want it; `revision` is REVISION.
    """
    with without_autocast(q, backend):
        return load(backend).forward(
            q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale=scale, window=window, softcap=softcap, save=save
        )


def _backward(
    da: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    k_past: Tensor | None,
    u_past: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    a: Tensor,
    lse: Tensor,
    saved: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> list[Tensor]:
    """Gradients of those of q, k, v, gate, k_past, u_past that are present, in this order."""
    tensors = da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, saved
    return [grad for grad in _gradients(*tensors, scale, window, softcap, backend) if grad is not None]


def _gradients(da, *arguments) -> list[Tensor | None]:
    """Of q, k, v, gate, k_past, u_past."""
    *tensors, scale, window, softcap, backend = arguments
    with without_autocast(da, backend):
        grads = load(backend).backward(da, *tensors, scale=scale, window=window, softcap=softcap)
    return [None if grad is None else grad.contiguous() for grad in grads]


_ARGUMENTS = len(inspect.signature(_forward).parameters)


def _save(ctx, inputs, output):
    *tensors, scale, window, softcap, _, backend, _ = inputs
    ctx.options = scale, window, softcap, backend
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # the gradient of lse would be a tensor of zeros


def _setup(ctx, inputs, output):
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, da, *_):
    if da is None:
        return (None,) * _ARGUMENTS
    *tensors, a, lse, saved = ctx.saved_tensors
    arguments = (da, *tensors, a, lse, saved, *ctx.options)
    if torch.is_grad_enabled() or traced(da):  # the library operator refuses a second derivative
        present = iter(backward(*arguments))
        grads = [None if x is None else next(present) for x in Tensors(*tensors).differentiable()]
    else:
        grads = _gradients(*arguments)
    return *grads, *(None,) * (_ARGUMENTS - len(grads))


class _Eager(torch.autograd.Function):
    backward = staticmethod(_differentiate)

    @staticmethod
    def forward(ctx, *inputs):  # with setup_context, PyTorch binds the arguments to the signature at every call
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output[:1]


_apply = private.apply_of(_Eager)
forward = torch.library.custom_op("ka_attention::forward", _forward, mutates_args=())
forward.register_autograd(_differentiate, setup_context=_setup)
backward = torch.library.custom_op("ka_attention::backward", _backward, mutates_args=())


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError("KA-attention has a second derivative with backend='reference' only")


backward.register_autograd(_refuse_second_derivative)


@forward.register_fake
def _(q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale, window, softcap, save, backend, revision):
    return load(backend).outputs(q, save, window)


@backward.register_fake
def _(da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, saved, scale, window, softcap, backend):
    return [x.new_empty(x.shape) for x in (q, k, v, gate, k_past, u_past) if x is not None]


def attend(tensors: Tensors, options: Options, backend: str) -> Tensor:
    """A of `forward`. Plain eager calls skip the library operator, which costs the processor 100 µs a call, and
    autograd too where no gradient is asked for.
    """
    library = traced(tensors.q, tensors.k, tensors.v, tensors.gate)
    leaves = tensors.differentiable()
    if not torch.compiler.is_compiling() and (private.takes_derivatives_of_func() or private.has_tangent(*leaves)):
        raise RuntimeError(  # without this, forward mode would find zeros
            "torch.func.grad, vjp, jvp and forward-mode derivatives need backend='reference'; the others have the "
            "derivative of torch.autograd and run under torch.vmap"
        )
    save = tensors.may_train() or (library and torch.is_grad_enabled())
    run: Callable = forward if library else _apply if save else _forward
    return run(*tensors, options["scale"], options["window"], options["softcap"], save, backend, REVISION)[0]


def traced(q: Tensor, *others: Tensor | None) -> bool:
    """Whether someone else is to see the operator: compilers, dispatch modes, functorch, shapes, subclasses."""
    return (
        torch.compiler.is_compiling()
        or private.observed()
        or q.is_meta
        or not _PLAIN.issuperset(map(type, (q, *others)))
    )
