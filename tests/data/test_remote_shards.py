"""Shards behind an address: downloaded once, or streamed."""

import io
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest
from PIL import Image

from glare.data.sources import open_source
from glare.data.tables import open_table
from glare.errors import UserError


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a server with val.parquet and 0.tar, two pictures of the levels 1 and 2 in each."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # which is about this machine, too
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "downloads"))
    datasets.disable_progress_bars()
    served = tmp_path / "served"
    served.mkdir()
    pictures = []
    with tarfile.open(served / "0.tar", "w") as tar:
        for level in (1, 2):
            picture = io.BytesIO()
            Image.new("RGB", (4, 3), (level, level, level)).save(picture, "png")
            pictures.append(picture.getvalue())
            member = tarfile.TarInfo(f"{level}.png")
            member.size = len(pictures[-1])
            tar.addfile(member, io.BytesIO(pictures[-1]))
    features = datasets.Features({"image": datasets.Image()})
    cells = {"image": [{"bytes": picture, "path": None} for picture in pictures]}
    datasets.Dataset.from_dict(cells, features=features).to_parquet(served / "val.parquet")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(served)))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["val.parquet", "val.parquet?download=true", "0.tar", "0.tar?download=true"])
def test_a_shard_behind_an_address_with_or_without_a_query(name: str, address: str) -> None:
    images = open_source(f"{address}/{name}")
    assert [images.read(index).getpixel((0, 0)) for index in range(len(images))] == [(1, 1, 1), (2, 2, 2)]
    table = open_table(f"{address}/{name}", streaming=True)
    assert [table.open(row).getpixel((0, 0)) for row in table.rows] == [(1, 1, 1), (2, 2, 2)]


def test_what_is_not_there_is_no_matter_of_repair(address: str) -> None:
    with pytest.raises(UserError, match=r"missing.tar' cannot be read \(.*\); check the address and the connection"):
        open_source(f"{address}/missing.tar")
    with pytest.raises(UserError, match=r"0\.zip' is no table by its name; give one that ends in \.parquet or \.tar"):
        open_source(f"{address}/0.zip")
    with pytest.raises(UserError, match="has no split 'train'; it has val"):
        open_source(f"{address}/val.parquet?download=true", split="train")
