"""Tables through `datasets`: what is downloaded is measured before it is unpacked."""

from pathlib import Path
from typing import Any

import datasets
from datasets.utils.py_utils import NestedDataStructure

from glare.data.opening import check_archive


class MeasuredDownloads(datasets.DownloadManager):  # type: ignore[misc]
    """Downloads as ever, but for archives that unpack to too much: they raise what `check_archive` does."""

    def download(self, url_or_urls: Any) -> Any:
        """The files of some addresses, in the same structure; those of this machine are not looked at."""
        downloaded = super().download(url_or_urls)
        addresses, files = (NestedDataStructure(part).flatten() for part in (url_or_urls, downloaded))
        for address, file in zip(addresses, files, strict=True):
            if "://" in address:
                check_archive(Path(file))
        return downloaded


def load(place: str, *, streaming: bool = False, **chosen: Any) -> Any:
    """The splits of a data set of the Hub, or of the files ``chosen`` for one of the builders of `datasets`.

    ``streaming`` leaves them where they are, unmeasured. Raises whatever `datasets` does, and as `check_archive`.
    """
    builder = datasets.load_dataset_builder(place, **chosen)
    if streaming:
        return builder.as_streaming_dataset()
    config = datasets.DownloadConfig(use_etag=False)  # as `datasets.load_dataset` has it
    downloads = MeasuredDownloads(builder.dataset_name, download_config=config, base_path=builder.base_path)
    builder.download_and_prepare(dl_manager=downloads)
    return builder.as_dataset()
