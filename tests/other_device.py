"""A device that is not the CPU, pretended on the CPU, on which mixing up devices fails as it does on a GPU.

Inside ``other_device()`` the device ``OTHER`` holds tensors with values. Such a tensor says that it lies elsewhere and
keeps its values in an ordinary tensor of the CPU, on which every operation computes; so results equal the CPU's, and
``item()``, masks and ``nonzero`` work. What CUDA refuses is refused:

* an operation on tensors of both devices. Allowed are copies, pointwise operations with a 0-dimensional tensor of the
  CPU, and an index tensor of the CPU into a tensor of the device;
* a generator of the CPU that is to draw on the device;
* ``numpy()``, and products of matrices of integers.

The device of a tensor does not equal ``OTHER``, as ``torch.device("cuda")`` is not the ``cuda:0`` of a tensor on it. Autocast is that of the CPU and leaves tensors of the device as they are. What happens on CUDA alone (fused
kernels, pinned memory, a free share of memory) is not reached: ``device.type`` is not "cuda".
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

PLACE = torch.device("meta", 0)  # of the tensors; the one type of device that needs neither hardware nor a driver
OTHER = torch.device("meta", 1)  # "meta" without an index stays what it is, tensors without values

_aten = torch.ops.aten
COPIES = {_aten.copy_.default, _aten._to_copy.default}
INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._unsafe_index.Tensor}
PRODUCTS = {_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.mv.default, _aten.dot.default}
UNINITIALISED = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}


class WrongDevice(RuntimeError):
    """What CUDA would have refused."""


class Elsewhere(Tensor):
    """A tensor of the other device; ``inner`` has its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Elsewhere":
        """Say that ``inner`` lies elsewhere."""
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=PLACE
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            made = Elsewhere(self.inner.clone()).requires_grad_(self.requires_grad)
            made.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k != "inner"}, memo))
            memo[id(self)] = made
        return memo[id(self)]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the values inside."""
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    asked = kwargs.get("device")
    here = any(isinstance(value, Elsewhere) for value in given)
    if not here and not _is_other(asked):
        return func(*args, **kwargs)
    if here:
        _refuse_mixtures(func, args, given)
    to_cpu = asked is not None and torch.device(asked).type == "cpu"
    _refuse_generators(func, kwargs, on_device=not to_cpu)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        kwargs.pop("pin_memory", None)
    owners = {id(value.inner): value for value in given if isinstance(value, Elsewhere)}
    result = func(*tree_map(_values, args), **tree_map(_values, kwargs))
    if func.overloadpacket in UNINITIALISED:
        result.fill_(torch.nan if result.is_floating_point() else 100)
    if torch.Tag.inplace_view in func.tags:  # the shape that the outer tensor tells changes too
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)
        return args[0]
    in_cpu_place = func in COPIES and args and not isinstance(args[0], Elsewhere) and func is _aten.copy_.default
    if in_cpu_place:
        return args[0]
    if to_cpu:
        # a copy, as from a GPU
        return result.clone() if any(result is value.inner for value in owners.values()) else result
    return tree_map(lambda value: owners.get(id(value), _elsewhere(value)), result)


def _is_other(device: Any) -> bool:
    """Whether a device given as such or by its name is the pretended one."""
    return isinstance(device, torch.device | str) and torch.device(device) in (OTHER, PLACE)


def _values(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


def _elsewhere(value: Any) -> Any:
    return Elsewhere(value) if isinstance(value, Tensor) else value


def _refuse_mixtures(func: Any, args: Any, given: list[Tensor]) -> None:
    strangers = [value for value in given if not isinstance(value, Elsewhere)]
    if func in COPIES:
        return
    if func in INDEXED and isinstance(args[0], Elsewhere):
        strangers = [value for value in args[2:3] if isinstance(value, Tensor) and not isinstance(value, Elsewhere)]
    scalars = torch.Tag.pointwise in func.tags and _written_elsewhere(func, args)
    wrong = [value for value in strangers if value.dim() > 0 or not scalars]
    if wrong:
        shapes = ", ".join(str(tuple(value.shape)) for value in wrong)
        raise WrongDevice(f"{func}: expected all tensors to be on the same device, those of shape {shapes} are on the CPU")
    if func in PRODUCTS and not any(value.is_floating_point() or value.is_complex() for value in given):
        raise WrongDevice(f"{func} is not implemented for integers on the device")


def _written_elsewhere(func: Any, args: Any) -> bool:
    """Whether an operation in place, if it is one, writes into a tensor of the device."""
    return not func._schema.is_mutable or not isinstance(args[0], Tensor) or isinstance(args[0], Elsewhere)


def _refuse_generators(func: Any, kwargs: dict[str, Any], *, on_device: bool) -> None:
    if on_device and kwargs.get("generator") is not None:
        raise WrongDevice(f"{func}: expected a generator of the device, it is on the CPU")


class _Operations(TorchDispatchMode):
    """Operations that name the device alone reach the class above no other way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


MADE_OF_DATA = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


class _Functions(TorchFunctionMode):
    """Tensors made of Python's numbers would have no values there; and ``to`` is no copy where nothing is to be done."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in MADE_OF_DATA:
            return _made_of_data(func, args, kwargs)
        if func is Tensor.tolist:
            return func(_values(args[0]))
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(map(_listed, index)), *args[2:])
        if func is Tensor.to:
            args, kwargs = tree_map(_placed, args), tree_map(_placed, kwargs)
        return func(*args, **kwargs)


def _listed(value: Any) -> Any:
    return torch.tensor(value) if isinstance(value, list) else value


def _placed(value: Any) -> Any:
    return PLACE if isinstance(value, torch.device) and value == OTHER else value


def _made_of_data(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    owner = args[0] if func is Tensor.new_tensor else None
    data = args[1] if owner is not None else args[0]
    asked = kwargs.pop("device", owner.device if owner is not None else None)
    if isinstance(data, Tensor):
        made = data.to(dtype=kwargs.get("dtype")) if kwargs.get("dtype") else data
        made = made.detach().clone() if func in (torch.tensor, Tensor.new_tensor) else made
    elif owner is not None:
        made = torch.Tensor.new_tensor(torch.empty(0, dtype=owner.dtype), data, **kwargs)
    else:
        made = func(data, **kwargs)
    return made if asked is None else made.to(_placed(asked))


@contextmanager
def other_device() -> Iterator[torch.device]:
    """While open, the device exists."""
    autocast = torch.autocast
    torch.autocast = _autocast(autocast)  # type: ignore[assignment,misc]
    try:
        with _Functions(), _Operations():
            yield OTHER
    finally:
        torch.autocast = autocast  # type: ignore[misc]


def _autocast(real: Callable[..., Any]) -> Callable[..., Any]:
    def made(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return real("cpu" if device_type == OTHER.type else device_type, *args, **kwargs)

    return made
