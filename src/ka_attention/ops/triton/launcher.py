"""Launching a kernel: the public way, and a faster one past what Triton does at every call.

All private names of Triton are in this file. They are those of the versions below; with any other version, or where one
is missing, every launch is `kernel[grid](…)`.
"""

from collections.abc import Callable
from functools import reduce
from operator import or_

import triton
from torch import Tensor

VERSIONS = ("3.5", "3.6", "3.7", "3.8")


def private_names() -> tuple | None:
    """(the class of compiled kernels, Triton's driver), or None where they are not what `_bare` knows."""
    if ".".join(triton.__version__.split(".")[:2]) not in VERSIONS:
        return None
    try:
        from triton.compiler import CompiledKernel
        from triton.runtime import driver
    except ImportError:
        return None
    return CompiledKernel, driver


class Launch:
    """One kernel on one grid with everything fixed but its tensors, and of those the dtypes and which are absent.

    `kernel[grid](…)` looks at all arguments to find the compiled kernel, which takes the processor longer than short
    sequences take the GPU. What it looks at is fixed here, but for one thing: whether pointers are multiples of 16. So
    once they all were, that compiled kernel is kept, and launched with bare pointers whenever they all are again.
    """

    def __init__(self, kernel, grid: tuple[int, ...], *numbers, **constants):
        self.kernel, self.numbers, self.constants = kernel, numbers, constants
        self.grid = (*grid, 1, 1)[:3]
        self.launch: Callable | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        aligned = reduce(or_, pointers) % 16 == 0
        if aligned and self.launch is not None:
            return self.launch(pointers)
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
        if aligned and (private := private_names()) is not None:
            self.launch = self._bare(compiled, *private)

    def _bare(self, compiled, compiled_class, driver) -> Callable | None:
        """A launch of `compiled` on the current device, given pointers: `compiled[grid]` without what that does for the
        hooks of profilers, unless there are any. None for the interpreter, which compiles nothing, and where a name is
        missing.
        """
        if not isinstance(compiled, compiled_class):
            return None
        try:
            names = self.kernel.arg_names
            run, active = compiled.run, driver.active
            stream, device = active.get_current_stream, active.get_current_device()
            fixed = compiled.function, compiled.packed_metadata, None, None, None  # no launch metadata, no hooks
        except AttributeError:
            return None
        observed, grid = compiled[self.grid], self.grid  # holds compiled, whose end unloads the kernel from 3.8 on
        rest = *self.numbers, *(self.constants[name] for name in names if name in self.constants)

        def launch(pointers: list[int]) -> None:
            hooks = triton.knobs.runtime
            if getattr(hooks.launch_enter_hook, "calls", True) or getattr(hooks.launch_exit_hook, "calls", True):
                observed(*pointers, *rest)
            else:
                run(*grid, stream(device), *fixed, *pointers, *rest)

        return launch
