"""The pretended device gives the CPU's numbers and refuses what a GPU refuses."""

from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from other_device import OTHER, WrongDeviceError, other_device
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def opened() -> Iterator[None]:
    with other_device():
        yield


def there(*shape: int) -> Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape).to(OTHER)


def here(*shape: int) -> Tensor:
    return there(*shape).cpu()


MISTAKES: dict[str, Callable[[], object]] = {
    "sum": lambda: there(3) + here(3),
    "sum, the other way": lambda: here(3) + there(3),
    "in place": lambda: there(3).mul_(here(3)),
    "number of the device": lambda: here(3) * there(),
    "cat": lambda: torch.cat([there(2), here(2)]),
    "stack of numbers": lambda: torch.stack([there(), here()]),
    "matrix product": lambda: nn.Linear(2, 2)(there(3, 2)),
    "index of the device": lambda: here(3)[there(3) > 1],
    "index_select": lambda: there(3).index_select(0, torch.tensor([0])),
    "gather": lambda: there(3, 2).gather(1, torch.zeros(3, 1, dtype=torch.int64)),
    "what an index puts": lambda: there(3).__setitem__(torch.tensor([0, 2]), here(2)),
    "index_copy": lambda: there(3, 2).index_copy(0, torch.tensor([0]).to(OTHER), here(1, 2)),
    "where": lambda: torch.where(here(3) > 1, there(3), there(3)),
    "masked_fill": lambda: there(3).masked_fill(here(3) > 1, 0),
    "arange": lambda: there(3) * torch.arange(3),
    "many at once": lambda: torch._foreach_lerp_([there(3)], [here(3)], 0.5),
    "generator": lambda: torch.rand(3, device=OTHER, generator=torch.Generator()),
    "generator, in place": lambda: there(3).normal_(generator=torch.Generator()),
    "product of integers": lambda: there(2, 2).long() @ there(2, 2).long(),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused(mistake: str) -> None:
    with pytest.raises(WrongDeviceError):
        MISTAKES[mistake]()


def test_no_numpy_array_without_a_copy() -> None:
    with pytest.raises((TypeError, RuntimeError), match="numpy"):
        there(3).numpy()
    assert there(3).cpu().numpy().tolist() == [1, 2, 3]


class Forgetful(torch.autograd.Function):
    """Its gradient comes back on the CPU."""

    @staticmethod
    def forward(_ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: object, upstream: Tensor) -> Tensor:
        return upstream.cpu()


def test_a_gradient_on_the_wrong_device_is_refused_where_it_is_used() -> None:
    weight = there(3).requires_grad_()
    Forgetful.apply(weight).sum().backward()
    with pytest.raises(WrongDeviceError):
        torch.optim.SGD([weight], lr=0.1).step()


ALLOWED: dict[str, tuple[Callable[[], Tensor], list[float]]] = {
    "number of the CPU": (lambda: there(3) * torch.tensor(2.0), [2, 4, 6]),
    "condition and a number": (lambda: torch.where(there(3) > 1, there(3), torch.tensor(0.0)), [0, 2, 3]),
    "index of the CPU": (lambda: there(3)[torch.tensor([2, 0])], [3, 1]),
    "mask of the CPU": (lambda: there(3)[torch.tensor([True, False, True])], [1, 3]),
    "list": (lambda: there(3)[[1, 2]], [2, 3]),
    "mask": (lambda: there(3)[there(3) > 1], [2, 3]),
    "made of data": (lambda: torch.tensor([1.0, 2.0], device=OTHER), [1, 2]),
    "made of data like another": (lambda: there(1).new_tensor([1, 2]), [1, 2]),
    "made there": (lambda: torch.ones(2, device=OTHER) + there(2), [2, 3]),
    "moved like another": (lambda: here(2).to(there(1)) + there(2), [2, 4]),
    "sum of a matrix and a row": (lambda: there(1, 2) @ there(2, 2), [7, 10]),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_a_gpu_does_is_done(case: str) -> None:
    make, expected = ALLOWED[case]
    made = make()
    assert made.device.type == OTHER.type
    assert made.flatten().tolist() == expected


def test_copies_go_both_ways() -> None:
    x, y = here(3), there(3)
    x[:2] = y[1:]
    y[0] = here(3)[2]
    y[1:].copy_(torch.zeros(2))
    assert x.tolist() == [2, 3, 3] and x.device.type == "cpu"
    assert y.tolist() == [3, 0, 0]
    copy = y.cpu()
    y += 1
    assert copy.tolist() == [3, 0, 0] and y.sum().item() == 6


def test_devices_compare_as_with_cuda() -> None:
    """``torch.device("cuda")`` is not the device of any tensor; moving there what is there changes nothing."""
    x = there(3)
    assert x.device != OTHER and x.device.type == OTHER.type
    assert x.to(OTHER) is x and x.to(x.device) is x


def test_memory_is_not_zero_before_it_is_written() -> None:
    assert torch.empty(2, device=OTHER).isnan().all() and there(1).new_empty(2).isnan().all()


def test_the_own_meta_device_stays_what_it_is() -> None:
    assert type(torch.ones(2, device="meta")) is Tensor and torch.ones(2).to("meta").is_meta


def test_a_layer_trains_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2), torch.rand(4, 3)
    moved = deepcopy(layer).to(OTHER)
    copied = deepcopy(moved)
    for part, rows in ((layer, x), (moved, x.to(OTHER))):
        optimizer = torch.optim.AdamW(part.parameters(), lr=0.1)
        with torch.autocast(rows.device.type, enabled=False):
            part(rows).square().sum().backward()
        optimizer.step()
    assert isinstance(moved.weight, nn.Parameter) and moved.weight.device.type == OTHER.type
    torch.testing.assert_close(moved.weight.cpu(), layer.weight)
    assert not torch.equal(copied.weight.cpu(), layer.weight)
    assert copied.to("cpu").weight.device.type == "cpu"


def test_the_device_is_gone_afterwards() -> None:
    autocast = torch.autocast
    with other_device():
        assert torch.autocast is not autocast
    assert torch.autocast is autocast
