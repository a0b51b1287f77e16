"""The price of an adaptation: times come from a clock of the test's own, sizes from files."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from glare import price as prices
from glare.comparison import Price
from glare.intervals import Estimate
from glare.price import Meter, inference_overhead, median_interval, peak_memory_bytes, price, stored_bytes
from glare.run_folder import RunFolder

IMAGES = torch.zeros(1, 3, 4, 4)


class Machine:
    """A clock that only the models of a test move on; ``slow`` multiplies the time of each pass in turn."""

    def __init__(self, slow: Iterator[float] | None = None) -> None:
        self.now = 100.0
        self.slow = itertools.repeat(1.0) if slow is None else slow
        self.passes: list[str] = []

    def model(self, name: str, seconds: float) -> nn.Module:
        machine = self

        class Timed(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                assert torch.is_inference_mode_enabled()
                machine.now += seconds * next(machine.slow)
                machine.passes.append(name)
                return images

        return Timed()

    def overhead(self, base: float, adapted: float, *, repeats: int = 10) -> Estimate:
        models = self.model("base", base), self.model("adapted", adapted)
        return inference_overhead(*models, IMAGES, repeats=repeats, clock=lambda: self.now)


def test_a_quiet_machine_gives_the_ratio_alone() -> None:
    estimate = Machine().overhead(2.0, 2.5)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.25, 0.25, 0.25))
    assert estimate.image_variance == pytest.approx(0, abs=1e-20) and estimate.seed_variance == 0
    assert (estimate.images, estimate.seeds) == (10, 1)
    assert Machine().overhead(2.0, 1.0).value == pytest.approx(-0.5)


def test_the_models_take_turns_after_a_pass_each_that_does_not_count() -> None:
    machine = Machine(itertools.chain([50.0, 70.0], itertools.repeat(1.0)))
    assert machine.overhead(1.0, 1.1, repeats=3).value == pytest.approx(0.1)
    assert machine.passes == ["base", "adapted", *("base", "adapted"), *("adapted", "base"), *("base", "adapted")]


def test_a_busy_neighbour_does_not_change_the_ratio() -> None:
    slower = Machine(itertools.chain([1.0] * 12, itertools.repeat(3.0))).overhead(1.0, 1.2)
    assert (slower.value, slower.low, slower.high) == pytest.approx((0.2, 0.2, 0.2))
    interrupted = Machine(itertools.chain([1.0] * 7, [40.0], itertools.repeat(1.0))).overhead(1.0, 1.2)
    assert (interrupted.value, interrupted.low, interrupted.high) == pytest.approx((0.2, 0.2, 0.2))


def test_what_the_second_pass_of_a_pair_gains_falls_on_both_models() -> None:
    estimate = Machine(itertools.cycle([1.0, 0.9])).overhead(1.0, 1.2)
    assert estimate.value == pytest.approx((1.2 * 0.9 + 1.2 / 0.9) / 2 - 1)
    assert estimate.low == pytest.approx(1.2 * 0.9 - 1) and estimate.high == pytest.approx(1.2 / 0.9 - 1)
    standard_error = (estimate.high - estimate.low) / 2 / 1.96
    assert estimate.image_variance == pytest.approx(standard_error**2)


@pytest.mark.parametrize("n", range(1, 13))
def test_the_interval_of_the_median_covers_it_as_often_as_it_says(n: int) -> None:
    values = [float(place) for place in range(n)]
    low, high = median_interval(values[::-1])
    assert low + high == n - 1

    # a sample covers the median unless too many of its values lie on one side of it; all 2^n patterns are as likely
    def covered(k: int) -> float:
        sides = itertools.product([0, 1], repeat=n)
        return sum(k <= sum(above) <= n - k for above in sides) / 2**n

    k = int(low) + 1
    assert covered(k) >= 0.95 or (k == 1 and n < 6)
    assert k + 1 > n / 2 or covered(k + 1) < 0.95


def write(path: Path, size: int = 0, text: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"0" * size if text is None else text.encode())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder without adapters whose weights are in two files."""
    write(tmp_path / "run" / "recipe.yaml", text="seed: 0\n")
    write(tmp_path / "run" / "model" / "config.json", text='{"model_type": "glare", "adapter_config": null}')
    write(tmp_path / "run" / "model" / "model-00001-of-00002.safetensors", 700)
    write(tmp_path / "run" / "model" / "model-00002-of-00002.safetensors", 77)
    return tmp_path / "run"


def test_stored_are_the_adapters_or_else_all_weights(run: Path, tmp_path: Path) -> None:
    assert stored_bytes(run) == stored_bytes(run / "model") == 777
    write(run / "adapter" / "adapter_model.safetensors", 12)
    assert stored_bytes(run) == 12
    write(run / "model" / "config.json", text='{"model_type": "glare", "adapter_config": {"peft_type": "LORA"}}')
    assert stored_bytes(run / "model") is None
    write(tmp_path / "vit" / "config.json", text='{"model_type": "vit"}')
    assert stored_bytes(tmp_path / "vit") is None
    write(tmp_path / "vit" / "model.safetensors", 5)
    assert stored_bytes(tmp_path / "vit") == 5


def test_the_price_of_a_run_is_what_it_recorded(run: Path) -> None:
    overhead = Estimate(0.1, 0.0, 0.2, 0.0, 0.0, 10, 1)
    assert price(run, overhead=None) == Price(777, None, None, None, None, None)
    write(run / "adapter" / "adapter_model.safetensors", 12)
    recorded = {
        "parameters_trained": 3,
        "adapter_bytes": 12,
        "seconds": 61.5,
        "peak_memory_bytes": 1000,
        "device": "cpu, 2 threads",
        "steps": 60,
        "images": 45,
    }
    write(run / "price.json", text=json.dumps(recorded))
    for path in (run, str(run), run / "model"):
        assert price(path, overhead=overhead) == Price(12, 3, 61.5, 1000, "cpu, 2 threads", overhead)
    write(run / "price.json", text=json.dumps({**recorded, "seconds": None}))
    assert price(run, overhead=None).seconds is None
    assert price("someone/on-the-hub", overhead=overhead) == Price(None, None, None, None, None, overhead)


@pytest.mark.parametrize(("earlier", "seconds"), [(0.0, 90.0), (1000.0, 1090.0), (math.nan, None)])
def test_a_meter_writes_what_a_run_cost(
    run: Path, monkeypatch: pytest.MonkeyPatch, earlier: float, seconds: float | None
) -> None:
    meter = Meter(Accelerator(cpu=True))
    meter.earlier = earlier
    monkeypatch.setattr("glare.runtime.time.perf_counter", lambda: meter.clock.started + 90)
    model = nn.Linear(10, 3)
    model.bias.requires_grad_(False)
    meter.write(RunFolder(run, write=True), model, seconds=meter.seconds, steps=60, images=45)
    written = json.loads((run / "price.json").read_text())
    assert written.pop("peak_memory_bytes") > 10 * 2**20
    assert written == {
        "parameters_trained": 30,
        "adapter_bytes": 777,
        "seconds": None if seconds is None else pytest.approx(seconds),
        "device": f"cpu, {torch.get_num_threads()} threads",
        "steps": 60,
        "images": 45,
    }
    assert price(run, overhead=None).seconds == seconds


@pytest.mark.parametrize(("platform", "factor"), [("linux", 1024), ("darwin", 1)])
def test_the_resident_set_is_told_in_bytes(monkeypatch: pytest.MonkeyPatch, platform: str, factor: int) -> None:
    monkeypatch.setattr(prices, "STATUS", Path("absent"))
    monkeypatch.setattr(prices.sys, "platform", platform)
    monkeypatch.setattr(prices.resource, "getrusage", lambda _: type("Usage", (), {"ru_maxrss": 5000})())
    assert peak_memory_bytes(torch.device("cpu")) == 5000 * factor


def test_the_peak_of_the_process_that_started_this_one_is_not_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t 900000 kB\nVmHWM:\t    7000 kB\nVmRSS:\t    6000 kB\n")
    monkeypatch.setattr(prices, "STATUS", status)
    assert peak_memory_bytes(torch.device("cpu")) == 7000 * 1024
