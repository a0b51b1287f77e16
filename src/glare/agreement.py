"""Whether all processes of a run are about to do the same: they read data and recipe each for itself."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from glare.errors import UserError
from glare.recipes import to_dict
from glare.resuming import PLACES
from glare.typed_values import written
from glare.yaml_files import flatten

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

OWN = PLACES | {"num_workers", "output"}
"""Recipe keys that a process may have for itself."""


def check_agreement(accelerator: Accelerator, recipe: "DataclassInstance", *named: Sequence[str] | None) -> None:
    """Raise the same UserError on all processes where they have other images or resolved another recipe.

    ``named``: names of images, in their order, such as those to train and those to evaluate on. To be called on every
    process.
    """
    if accelerator.num_processes == 1:
        return
    keys = {key: value for key, value in flatten(to_dict(recipe)).items() if key not in OWN}
    images = [(len(names), _digest(names)) for names in named if names is not None]
    found: list[tuple[list[tuple[int, str]], dict[str, Any]]] = gather_object([(images, keys)])
    first_images, first_keys = found[0]
    for process, (other_images, other_keys) in enumerate(found):
        differ = [key for key in {**first_keys, **other_keys} if first_keys.get(key) != other_keys.get(key)]
        if other_images == first_images and not differ:
            continue
        said = [f"{key} is {written(first_keys.get(key))} and {written(other_keys.get(key))}" for key in differ]
        if other_images != first_images:
            said = [f"they have {_counted(first_images)} and {_counted(other_images)} images, or others", *said]
        raise UserError(
            f"processes 0 and {process} are not about to do the same: {'; '.join(said)}; "
            "give all of them the same data, readable everywhere, and the same recipe"
        )


def _counted(images: list[tuple[int, str]]) -> str:
    return "+".join(str(count) for count, _ in images)


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(names).encode(errors="surrogatepass")).hexdigest()
