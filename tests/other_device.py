"""A device that is not the CPU, pretended on the CPU, on which mixing up devices fails as it does on a GPU.

Inside ``other_device()`` the device ``OTHER`` holds tensors with values. Such a tensor says that it lies elsewhere and
keeps its values in an ordinary tensor of the CPU, on which every operation computes; so results equal the CPU's, and
``item()``, masks and ``nonzero`` work. What CUDA refuses is refused:

* an operation on tensors of both devices. Allowed are copies, pointwise operations with a 0-dimensional tensor of the
  CPU, and an index tensor of the CPU into a tensor of the device;
* a generator of the CPU that is to draw on the device;
* ``numpy()``, and products of matrices of integers.

Memory that nothing was written to holds NaN. The device of a tensor does not equal ``OTHER``, as
``torch.device("cuda")`` is not the ``cuda:0`` of a tensor on it. Autocast is that of the CPU and leaves tensors of the
device as they are. What happens on CUDA alone (fused kernels, pinned memory, a share of the free memory) is not
reached: ``device.type`` is not "cuda".
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PLACE = torch.device("meta", 0)  # of the tensors; the one type of device that needs neither hardware nor a driver
OTHER = torch.device("meta", 1)  # "meta" without an index stays what it is, tensors without values

_aten = torch.ops.aten
COPIES = {_aten.copy_.default, _aten._to_copy.default}
INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
PRODUCTS = {_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.mv.default, _aten.dot.default}
UNINITIALISED = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
MADE_OF_DATA = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


class WrongDeviceError(RuntimeError):
    """What CUDA would have refused."""


class Elsewhere(Tensor):
    """A tensor of the other device; ``inner`` has its values."""

    inner: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, inner: Tensor) -> Self:
        made: Self = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=PLACE
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            made = Elsewhere(self.inner.clone()).requires_grad_(self.requires_grad)
            others = {name: value for name, value in vars(self).items() if name != "inner"}  # such as "is a parameter"
            vars(made).update(copy.deepcopy(others, memo))
            memo[id(self)] = made
        found: Tensor = memo[id(self)]
        return found


@contextmanager
def other_device() -> Iterator[torch.device]:
    """While open, the device exists."""
    autocast, synchronize = torch.autocast, torch.accelerator.synchronize
    torch.autocast = _autocast(autocast)  # type: ignore[assignment,misc]
    torch.accelerator.synchronize = lambda *_: None
    try:
        with _Functions(), _Operations():
            yield OTHER
    finally:
        torch.autocast, torch.accelerator.synchronize = autocast, synchronize  # type: ignore[misc]


def _autocast(real: Callable[..., Any]) -> Callable[..., Any]:
    def made(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return real("cpu" if device_type == OTHER.type else device_type, *args, **kwargs)

    return made


# --- operations ----------------------------------------------------------------------------------------------------


class _Operations(TorchDispatchMode):
    """Operations that name the device and have no tensor of it yet."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the values, its results on the device unless it copies them to the CPU."""
    given: list[Tensor] = []
    _each((args, *kwargs.values()), given.append)
    asked, here = kwargs.get("device"), any(isinstance(value, Elsewhere) for value in given)
    if not here and asked not in (OTHER, PLACE):
        return func(*args, **kwargs)
    if func._can_decompose():  # without gradients an operation made of others arrives whole
        with _Operations():
            return func.decompose(*args, **kwargs)
    to_cpu = asked is not None and asked.type == "cpu"
    _refuse(func, args, kwargs, given, to_cpu=to_cpu)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
    if func is _aten._to_copy.default:
        kwargs.pop("pin_memory", None)
    owners = {id(value.inner): value for value in given if isinstance(value, Elsewhere)}
    with torch.inference_mode(False):  # a view of an ordinary tensor is to be an ordinary one
        return _result(func, args, kwargs, owners, to_cpu=to_cpu)


def _result(func: Any, args: Any, kwargs: dict[str, Any], owners: dict[int, Tensor], *, to_cpu: bool) -> Any:
    """``owners``: the tensors of the device among the arguments, by the identity of what they hold."""
    result = func(*_each(args, _values), **{name: _each(value, _values) for name, value in kwargs.items()})
    if func.overloadpacket in UNINITIALISED:
        result.fill_(torch.nan if result.is_floating_point() else 100)
    if torch.Tag.inplace_view in func.tags:  # the shape that the outer tensor tells changes too
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)
        return args[0]
    if to_cpu or (func is _aten.copy_.default and not isinstance(args[0], Elsewhere)):
        return result
    return _each(result, lambda value: owners[id(value)] if id(value) in owners else Elsewhere(value))


def _each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Arguments or results with all tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_each(part, change) for part in value) if type(value) in (tuple, list) else value


def _values(value: Tensor) -> Tensor:
    return value.inner if isinstance(value, Elsewhere) else value


def _refuse(func: Any, args: Any, kwargs: dict[str, Any], given: list[Tensor], *, to_cpu: bool) -> None:
    """Raise WrongDeviceError for what CUDA does not do."""
    if not to_cpu and kwargs.get("generator") is not None:
        raise WrongDeviceError(f"{func}: expected a generator of the device, it is on the CPU")
    wrong = [] if func in COPIES else [value for value in given if not isinstance(value, Elsewhere)]
    if func in INDEXED and isinstance(args[0], Elsewhere):
        wrong = [value for value in args[2:3] if not isinstance(value, Elsewhere)]  # what is written
    if torch.Tag.pointwise in func.tags and (isinstance(args[0], Elsewhere) or not func._schema.is_mutable):
        wrong = [value for value in wrong if value.dim()]
    if wrong:
        shapes = ", ".join(str(tuple(value.shape)) for value in wrong)
        raise WrongDeviceError(f"{func}: expected all tensors on one device, those of shape {shapes} are on the CPU")
    if func in PRODUCTS and not any(value.is_floating_point() for value in given):
        raise WrongDeviceError(f"{func} is not implemented for integers on the device")


# --- functions -----------------------------------------------------------------------------------------------------


class _Functions(TorchFunctionMode):
    """What torch does in Python or C++ before there is an operation and would do otherwise on its own "meta"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in MADE_OF_DATA:  # would have no values
            return _made_of_data(func, args, kwargs)
        if func is Tensor.tolist:
            return func(_values(args[0]))
        if func in (Tensor.__getitem__, Tensor.__setitem__):  # would make tensors without values of lists
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.tensor(part) if isinstance(part, list) else part for part in index), *args[2:])
        if func is Tensor.to:  # is no copy where nothing is to be done
            args, kwargs = tuple(map(_placed, args)), {name: _placed(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _placed(value: Any) -> Any:
    return PLACE if isinstance(value, torch.device) and value == OTHER else value


def _made_of_data(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """A tensor of numbers, or of another tensor, made on the CPU and moved to where it belongs."""
    owner, data = args if func is Tensor.new_tensor else (None, args[0])
    place = kwargs.pop("device", owner.device if owner is not None else None)
    if isinstance(data, Tensor):
        made = data.detach().to(dtype=kwargs.get("dtype"), copy=func in (torch.tensor, Tensor.new_tensor))
    elif owner is not None:
        made = torch.empty(0, dtype=owner.dtype).new_tensor(data, **kwargs)
    else:
        made = func(data, **kwargs)
    return made if place is None else made.to(_placed(place))
