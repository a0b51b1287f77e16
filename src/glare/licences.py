"""Licences of what a model was made from, and the one that follows for the model.

Nothing is guessed: what no card states is unknown, and of something unknown no licence follows.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glare.errors import UserError
from glare.yaml_files import parse_yaml

PERMISSIVE = re.compile(
    r"apache-2\.0|mit|bsd(-[23]-clause.*)?|isc|zlib|unlicense|wtfpl|cc0-1\.0|cc-by-[234]\.[05]|pddl|odc-by"
    r"|cdla-permissive-[12]\.0"
)
"""Identifiers that ask for no more than naming the authors."""

LISTED = re.compile(
    r"cc-by-(nc|nd|sa|nc-nd|nc-sa)-[234]\.[05]|cc|[al]?gpl.*|mpl-2\.0|epl-[12]\.0|eupl-1\.[12]|odbl|gfdl"
    r"|cdla-sharing-1\.0|openrail.*|creativeml-openrail-m|bigscience-.*|osl-3\.0"
)
"""Further identifiers that the Hub accepts as ``license``; any other is written as ``other`` with a name."""

NON_COMMERCIAL = re.compile(r"(^|[^a-z])nc([^a-z]|$)|non-?\s?commercial", re.IGNORECASE)
MAX_LETTERS = 2**18  # of a README.md that are looked at
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Licence:
    """``id``: an identifier of the Hub, or any name of one it does not list; None where it is unknown.

    ``source`` says who states it; ``name`` and ``link`` belong to the identifier ``other``.
    """

    id: str | None
    source: str = ""
    name: str | None = None
    link: str | None = None

    @property
    def title(self) -> str:
        """What to call it."""
        return "unknown" if self.id is None else self.name or self.id

    @property
    def non_commercial(self) -> bool:
        """Whether it forbids commercial use, as far as its name tells."""
        return bool(NON_COMMERCIAL.search(self.title))

    @property
    def permissive(self) -> bool:
        """Whether it leaves the choice of a licence for what is made from it."""
        return self.id is not None and bool(PERMISSIVE.fullmatch(self.id))

    def metadata(self) -> dict[str, str]:
        """The fields of a card's front matter."""
        if self.id is None:
            return {"license": "unknown"}
        if self.permissive or LISTED.fullmatch(self.id):
            return {"license": self.id}
        slug = re.sub(r"[^a-z0-9.]+", "-", self.title.lower()).strip("-")
        return {"license": "other", "license_name": slug, **({"license_link": self.link} if self.link else {})}


UNKNOWN = Licence(None)
OURS = Licence("apache-2.0", "licence of glare-ssl, which makes it")

FAMILIES = {
    "facebook/dinov2-": Licence("apache-2.0", "https://huggingface.co/facebook/dinov2-small"),
    "facebook/dinov3-": Licence(
        "other",
        "https://huggingface.co/facebook/dinov3-vits16-pretrain-lvd1689m",
        name="dinov3-license",
        link="https://ai.meta.com/resources/models-and-libraries/dinov3-license",
    ),
    "facebook/dino-": Licence("apache-2.0", "https://huggingface.co/facebook/dino-vits16"),
}
"""How ids of well-known models begin -> their licence and the card that states it, for when no card can be read."""


def of_family(model_id: str) -> Licence:
    """The licence of a well-known model of the Hub, unknown for others."""
    return next((licence for start, licence in FAMILIES.items() if model_id.startswith(start)), UNKNOWN)


def stated(fields: Mapping[str, Any], source: str) -> Licence:
    """The licence in the front matter of a card; unknown where it has none."""
    values = fields.get("license")
    ids = [str(value).lower() for value in (values if isinstance(values, list) else [values]) if value]
    if not ids or ids == ["unknown"]:
        return UNKNOWN
    if len(ids) > 1:
        return combined([Licence(value, source) for value in ids])
    name, link = (None if fields.get(key) is None else str(fields[key]) for key in ("license_name", "license_link"))
    return Licence(ids[0], source, name=name, link=link)


def combined(parts: Sequence[Licence]) -> Licence:
    """The licence of what is made from ``parts``, the first of which is the base model.

    Each licence that restricts has to be kept: one of them holds for the whole, several are named together as
    ``other``. Where none does, the base model's holds. It is unknown as soon as one part's is.
    """
    if not parts or any(part.id is None for part in parts):
        return UNKNOWN
    strict = list({part.title: part for part in parts if not part.permissive}.values())
    if len(strict) < 2:
        return (strict or list(parts))[0]
    return Licence("other", "; ".join(part.source for part in strict), name=" and ".join(p.title for p in strict))


def front_matter(card: Path) -> dict[str, Any]:
    """The metadata of a ``README.md``; empty where there is no file, or nothing in it that can be read."""
    try:
        with card.open(encoding="utf-8") as file:
            found = FRONT_MATTER.match(file.read(MAX_LETTERS))
        fields = parse_yaml(found[1], str(card)) if found else None
    except (OSError, UnicodeDecodeError, UserError):
        return {}
    return fields if isinstance(fields, dict) else {}
