"""Which of the allowed words somebody meant."""

from collections.abc import Sequence
from difflib import SequenceMatcher

LONGEST = 64  # letters of a word that are looked at


def nearest(name: str, candidates: Sequence[str]) -> str:
    """The candidate most like ``name``: in full, by its part after the last dot, or by its initials."""

    def likeness(candidate: str) -> float:
        last = candidate.rsplit(".")[-1]
        forms = (candidate, last, "".join(word[:1] for word in last.split("_")))
        return max(SequenceMatcher(None, name[:LONGEST].lower(), form.lower()).ratio() for form in forms)

    return max(candidates, key=likeness)
