"""The launch configurations are what ``accelerate launch`` accepts, and mean what their names say."""

from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

FOLDER = Path(__file__).parents[1] / "training" / "accelerate"


@pytest.mark.parametrize(
    ("name", "extra", "expected"),
    [
        ("cpu", [], (False, True, 1, 1)),
        ("one_gpu", [], (False, False, 1, 1)),
        ("eight_gpus", [], (True, False, 8, 1)),
        ("multi_node", ["--machine_rank", "1", "--main_process_ip", "10.0.0.1"], (True, False, 16, 2)),
    ],
)
def test_launch_configurations_are_what_accelerate_accepts(
    name: str, extra: list[str], expected: tuple[bool, bool, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = FOLDER / f"{name}.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(file), *extra, "training/pretrain.py"])
    launched, _, _ = _validate_launch_command(arguments)
    assert (launched.multi_gpu, launched.use_cpu, launched.num_processes, launched.num_machines) == expected
    assert launched.mixed_precision == "no"


def test_no_configuration_goes_untested() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {
        "cpu.yaml",
        "one_gpu.yaml",
        "eight_gpus.yaml",
        "multi_node.yaml",
    }
