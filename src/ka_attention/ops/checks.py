"""What the operator asks of its arguments, with errors that name them."""

import math

from torch import Tensor


def check_tensor(name: str, x: Tensor, q: Tensor, shape: tuple[int | None, ...] | None) -> None:
    """4-D, floating point, of q's dtype and device, and of `shape`, in which None is any size."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.element_size() < 2:
        raise TypeError(f"{name} must be a floating-point tensor of 16 to 64 bits, got {kind_of(x)}")
    if x.ndim != 4:
        raise ValueError(f"{name} must be [B, H, T, D], got {list(x.shape)}")
    if x.dtype != q.dtype:
        raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    if shape in (None, x.shape):
        return
    if any(want not in (None, size) for size, want in zip(x.shape, shape, strict=True)):
        wanted = ["any" if want is None else want for want in shape]
        raise ValueError(f"{name} must be {wanted} for q {list(q.shape)}, got {list(x.shape)}")


def number(name: str, x: float, above: float = -math.inf) -> float:
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name} must be None or a number, got {kind_of(x)}")
    if not finite(x) or x <= above:
        raise ValueError(f"{name} must be finite{'' if above < 0 else ' and above 0'}, got {x}")
    return float(x)


def finite(x: float) -> bool:
    return x - x == 0  # math.isfinite is no symbol to torch.compile


def kind_of(x: object) -> str:
    return f"a {x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
