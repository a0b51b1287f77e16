"""JSON files of objects, whoever wrote them."""

import json
from pathlib import Path
from typing import Any

from glare.errors import UserError, first_line


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file. Raises UserError where there is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}); write it again, or remove it") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no JSON object; write it again, or remove it")
    return values
