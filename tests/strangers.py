"""An interpreter that has what this one has, except this package: the environment of somebody who never heard of it."""

import subprocess
import sys
import sysconfig
from pathlib import Path

OURS = ("glare", "__editable__")


def stranger(folder: Path) -> Path:
    """Make a virtual environment in ``folder``; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site_packages = next((folder / "lib").glob("python*/site-packages"))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(OURS):
            (site_packages / entry.name).symlink_to(entry)
    return folder / "bin" / "python"
