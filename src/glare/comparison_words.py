"""What a comparison found, in the words of its report, for the card of a model."""

from pathlib import Path

from glare.errors import UserError
from glare.json_files import read_json
from glare.lineage import looks_like_hub_id, public_name
from glare.report_tables import escape


def verdicts_in(folder: Path) -> str:
    """The words of ``compare.md``, without the paths of this machine."""
    values, report = folder / "compare.json", folder / "compare.md"
    if not values.is_file() or not report.is_file():
        raise UserError(f"{folder} holds no comparison (compare.json and compare.md); give the output of glare compare")
    result, text = read_json(values), report.read_text(encoding="utf-8", errors="replace")
    try:
        models = [str(model["path"]) for model in result["models"]]
        places = {str(result["base"]), *(str(data["data"]) for data in result["data"]), *models}
    except (KeyError, TypeError) as error:
        raise UserError(f"{values} is not as glare compare writes it ({error!r}); give its output folder") from None
    for place in sorted((place for place in places if "/" in place or ":" in place), key=len, reverse=True):
        if not looks_like_hub_id(place) or place in models:
            text = text.replace(escape(place), escape(public_name(place))).replace(place, public_name(place))
    return text.strip()
