"""Every private name of PyTorch that this package uses, each beside the public way.

The public way is taken where an installed PyTorch lacks the name, so that an update never breaks the import: it gives
the same results, later.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad


def _find(path: str) -> Any:
    """What this PyTorch has at torch.`path`, or None."""
    try:
        return operator.attrgetter(path)(torch)
    except AttributeError:
        return None


def _perhaps() -> bool:
    return True


# Whether autocast is on for some device. PyTorch's public question names the device, which takes seven times as long:
# where this answers True, it must be asked too.
any_autocast: Callable[[], bool] = _find("_C._is_any_autocast_enabled") or _perhaps

# Whether a TorchDispatchMode is to see operators, or a transform of torch.func is at work. Without these names every
# call goes through the library operator, which is what they all see.
_modes: Callable[[], int] = _find("_C._len_torch_dispatch_stack") or _perhaps
_transforms: Callable[[], bool] = _find("_C._are_functorch_transforms_active") or _perhaps


def observed() -> bool:
    """Whether someone may be looking on as operators are called."""
    return _modes() > 0 or _transforms()


_interpreters: Callable | None = _find("_C._functorch.get_interpreter_stack")
_vmap: Any = _find("_C._functorch.TransformType.Vmap")


def takes_derivatives_of_func() -> bool:
    """Whether a transform of torch.func other than vmap is at work.

    Where that cannot be known, grad and vjp are refused by PyTorch itself, and jvp is known by its tangents.
    """
    if _interpreters is None or _vmap is None:
        return False
    return any(each.key() != _vmap for each in _interpreters() or ())


_has_level = _find("autograd.forward_ad._current_level") is not None


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation is at work on one of the tensors."""
    if _has_level and forward_ad._current_level < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def apply_of(function: type[Function]) -> Callable:
    """`function.apply`, past the part of it that serves torch.func, which takes 5 µs a call."""
    below: Any = super(Function, function)
    return below.apply if _find("autograd.function._SingleLevelFunction.apply") else function.apply


_assert_async: Callable | None = _find("_assert_async")


def checked(x: Tensor, right: Tensor, message: str) -> Tensor:
    """x, with an error once the device finds `right`, a bool tensor without dimensions, to be False.

    The public way cannot give the message: it reads beyond the end of a tensor.
    """
    if _assert_async is not None:
        _assert_async(right, message)
        return x
    return x + x.new_zeros(1).index_select(0, (~right).long().view(1))


_has_version = _find("Tensor._version") is not None


def version(x: Tensor) -> int | None:
    """How often the contents of x changed, or None where that cannot be known."""
    return x._version if _has_version and not x.is_inference() else None


def mark_static_address(x: Tensor) -> None:
    """Tell torch.compile that x stays where it is, which spares CUDA graphs a copy."""
    mark = _find("_dynamo.mark_static_address")
    if mark is not None:
        mark(x)


# PyTorch's attention on a CPU with its log-sum-exp, and its backward; None where the backend must do it by itself.
flash: Any = _find("ops.aten._scaled_dot_product_flash_attention_for_cpu")
flash_backward: Any = _find("ops.aten._scaled_dot_product_flash_attention_for_cpu_backward")
if flash is None or flash_backward is None:
    flash = flash_backward = None


def allow_graphs(number: int) -> None:
    """Let torch.compile make so many graphs of one function; without the name PyTorch stops at its own limit."""
    if (config := _find("_dynamo.config")) is not None:
        config.recompile_limit = number
