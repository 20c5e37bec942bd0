"""The private parts of torch that the library relies on, a function for each need. USED: their names, by module."""

from __future__ import annotations

import weakref
from datetime import timedelta
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

USED = {
    "torch.nn.modules.module": ("_modules", "_parameters", "_buffers"),
    "torch._subclasses.fake_tensor": ("FakeTensor", "FakeTensorMode"),
    "torch.utils._python_dispatch": ("TorchDispatchMode",),
    "torch.utils._pytree": ("tree_leaves",),
    "torch._dynamo.config": ("disable",),
    "torch._inductor.cpp_builder": ("get_cpp_compiler",),
    "torch._inductor.exc": ("InvalidCxxCompiler",),
    "torch.utils._triton": ("has_triton",),
    "torch.distributed.distributed_c10d": ("_timeout",),
}
Module = TypeVar("Module", bound=nn.Module)


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own, by name, to be changed in place. torch/nn/modules/module.py"""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own, by name, to be changed in place. torch/nn/modules/module.py"""
    return module._buffers


def modules_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The module's own, by name, to be changed in place. torch/nn/modules/module.py"""
    return module._modules


def twin_of(module: Module) -> Module:
    """An object of the same class with all that the module has, whose submodules can be others.
    torch/nn/modules/module.py"""
    twin = object.__new__(type(module))
    twin.__dict__ = {**module.__dict__, "_modules": dict(module._modules)}
    return twin


def is_fake(tensor: Tensor) -> bool:
    """Whether the tensor has a shape alone. torch/_subclasses/fake_tensor.py"""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def fake_tensors() -> Any:
    """A context in which tensors have shapes alone. torch/_subclasses/fake_tensor.py"""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


class TensorBytes(TorchDispatchMode):
    """Bytes of the storages that operations within it have made and that are still there, and the most at any time;
    tensors may be fake. What a kernel takes and gives back by itself is not seen. torch/utils/_python_dispatch.py"""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(tensor.untyped_storage()) for tensor in tensors_in((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if id(storage) not in given and id(storage) not in self.known:
                self.known.add(id(storage))
                self.hold(storage.nbytes())
                weakref.finalize(storage, self.release, id(storage), storage.nbytes())
        return result

    def forget_peak(self) -> None:
        """The most is that of what follows."""
        self.peak = self.now

    def hold(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def compile_nothing() -> None:
    """Lets torch.compile do nothing in this process. torch/_dynamo/config.py"""
    from torch._dynamo import config

    config.disable = True


def has_triton() -> bool:
    """Whether GPUs' kernels can be compiled. torch/utils/_triton.py"""
    from torch.utils import _triton

    return _triton.has_triton()


def has_cpp_compiler() -> bool:
    """Whether a CPU's kernels can be compiled. torch/_inductor/cpp_builder.py"""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def set_timeout(options: Any, timeout: timedelta) -> None:
    """Of a process group's options. torch/distributed/distributed_c10d.py"""
    options._timeout = timeout
