"""Folders as they are found: odd names, loops of links, pipes and devices, bombs, and many files at once."""

import io
import os
import stat
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from glare.data.cache import pack
from glare.data.labelled import open_labelled
from glare.data.listing import image_files, image_names
from glare.data.opening import MAX_PIXELS, open_picture
from glare.data.sources import BadImage, Images, open_source, to_rgb8
from glare.errors import UserError
from glare.inference import ENDINGS, free_stem

NAMES = [
    "with space.png",
    "quo'te\".png",
    "new\nline.png",
    "tab\t.png",
    "東京.png",
    "Ü.png",
    "رسم.png",
    "😀.png",
    "not-utf8-\udcff\udcfe.png",
    "-option.png",
    "%s {x} $HOME `id`.png",
    "<script>alert(1)<script>&amp;.png",
    "back\\slash.png",
    "key=value.png",
    "..png.png",
]


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        stream = io.BytesIO()
        Image.new("RGB", (4, 3)).save(stream, "png")
        (folder / name).write_bytes(stream.getvalue())


def reason(source: Images, index: int = 0) -> str:
    with pytest.raises(BadImage) as caught:
        source.read(index)
    assert caught.value.name == source.name(index)
    return caught.value.reason


# names


def test_names_of_any_letters_are_listed_and_read(tmp_path: Path) -> None:
    shown = [name for name in NAMES if not name.startswith(".")]
    write(tmp_path, *NAMES)
    source = open_source(str(tmp_path))
    assert sorted(source.names) == sorted(name.encode("utf-8", "backslashreplace").decode() for name in shown)
    assert len(pack(source, strict=True).names) == len(shown)
    for name in shown:
        assert open_source(str(tmp_path / name)).read(0).size == (4, 3)


def test_names_of_any_letters_have_labels(tmp_path: Path) -> None:
    write(tmp_path, *(f"{place}/{name}" for place in ("images", "labels") for name in NAMES))
    for file in (tmp_path / "labels").iterdir():
        Image.new("L", (4, 3)).save(file, "png")
    (tmp_path / "classes.json").write_text('{"classes": ["a"]}')
    found = open_labelled(str(tmp_path))
    assert len(found) == len(NAMES) - 1
    assert all(found.read(index)[1].shape == (3, 4) for index in range(len(found)))
    (tmp_path / "labels" / "not-utf8-\udcff\udcfe.png").unlink()
    bad = next(index for index, name in enumerate(found.names) if "utf8" in name)
    with pytest.raises(BadImage, match="has no label") as caught:
        found.read(bad)
    str(caught.value).encode()  # it can be written anywhere


def test_predictions_have_names_that_a_file_can_have() -> None:
    taken: set[str] = set()
    for name in [*NAMES, "あ" * 80 + ".png", "x" * 250 + ".png"] * 2:
        stem = free_stem(name.encode("utf-8", "backslashreplace").decode(), taken)
        assert "/" not in stem and all(len(f".{stem}{ending}.partial".encode()) <= 255 for ending in ENDINGS)


def test_many_images_of_one_name_are_numbered_quickly() -> None:
    taken: set[str] = set()
    stems = [free_stem(f"{number}/image.png", taken) for number in range(20_000)]
    assert stems[:3] == ["image", "image_2", "image_3"] and len(set(stems)) == 20_000


# links


def test_a_link_to_a_folder_above_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path, "outside/0.png", "data/1.png", "data/deep/2.png")
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    (tmp_path / "data" / "deep" / "self").symlink_to("..")
    (tmp_path / "data" / "deep" / "root").symlink_to("/")
    assert image_names(tmp_path / "data") == ["1.png", "deep/2.png"]


def test_two_folders_that_lead_to_each_other_end(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
    assert image_names(tmp_path) == ["a/1.png", "a/b/2.png"]


def test_tables_in_a_folder_with_a_loop_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "sub" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 3))]})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "data" / "sub" / "x.parquet")
    assert len(open_source(str(tmp_path / "data"))) == 1


def test_links_that_lead_nowhere_are_bad_images(tmp_path: Path) -> None:
    (tmp_path / "dangling.png").symlink_to(tmp_path / "absent.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    source = open_source(str(tmp_path))
    assert source.names == ["dangling.png", "loop.png"]
    assert "No such file" in reason(source, 0) and "symbolic links" in reason(source, 1)


# what is no file


def test_pipes_devices_and_folders_named_like_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    write(tmp_path, "folder.png/inside.png")
    source = open_source(str(tmp_path))
    assert source.names == ["device.png", "folder.png/inside.png", "pipe.png"]
    assert "no regular file" in reason(source, 0) and "no regular file" in reason(source, 2)
    assert source.read(1).size == (4, 3)
    with pytest.raises(UserError, match="neither an existing path"):
        open_source(str(tmp_path / "pipe.png"))
    with pytest.raises(ValueError, match="no regular file"):
        open_picture(tmp_path / "folder.png")


def test_what_may_not_be_read_says_so(tmp_path: Path) -> None:
    write(tmp_path, "secret.png", "closed/1.png", "gone.png")
    source = open_source(str(tmp_path))
    (tmp_path / "gone.png").unlink()
    (tmp_path / "secret.png").chmod(0)
    (tmp_path / "closed").chmod(0)
    try:
        assert "No such file" in reason(source, source.names.index("gone.png"))
        if os.geteuid() != 0:  # root may read everything
            assert "Permission denied" in reason(source, source.names.index("secret.png"))
            with pytest.raises(UserError, match="cannot be listed"):
                open_source(str(tmp_path))
    finally:
        (tmp_path / "closed").chmod(stat.S_IRWXU)


def test_programs_are_not_started_for_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert reason(open_source(str(tmp_path))) == "not an image, or of a format that Pillow cannot read"


@pytest.mark.parametrize("name", ["~nobody/x", "a\0b", "x" * 5000, "x/" * 3000, "\udcff"])
def test_names_that_no_path_has(name: str) -> None:
    with pytest.raises(UserError, match=r"neither an existing path|is not a folder"):
        open_source(name)
    with pytest.raises(UserError, match="is not a folder"):
        open_labelled(name)


# bombs


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb(side: int) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def tiff_bomb(side: int, bits: int) -> bytes:
    def entry(tag: int, kind: int, value: int) -> bytes:
        return struct.pack("<HHII", tag, kind, 1, value)

    tags = [(256, 4, side), (257, 4, side), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 4, side), (279, 4, 100)]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(entry(*tag) for tag in tags) + bytes(200)


def gif_bomb(side: int) -> bytes:
    """An animation whose screen is small and whose first frame is huge."""
    screen = b"GIF89a" + struct.pack("<HH", 10, 10) + b"\x80\0\0" + bytes(6)
    frame = b"\x2c" + struct.pack("<HHHH", 0, 0, side, side) + b"\0\x02\x02\x44\x01\0"
    return screen + frame + frame + b";"


def jp2_bomb(side: int) -> bytes:
    header = struct.pack(">IIHBBBB", side, side, 3, 7, 7, 0, 0)
    box = struct.pack(">I4s", 8 + 8 + len(header), b"jp2h") + struct.pack(">I4s", 8 + len(header), b"ihdr") + header
    return b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 \0\0\0\0jp2 " + box + bytes(100)


def webp_bomb(side: int) -> bytes:
    bits = (side - 1) | (side - 1) << 14
    body = b"\x2f" + struct.pack("<I", bits) + bytes(101)
    return b"RIFF" + struct.pack("<I", 12 + len(body)) + b"WEBPVP8L" + struct.pack("<I", len(body)) + body


BOMBS = {
    "png": png_bomb(20_000),
    "16-bit.tiff": tiff_bomb(20_000, 16),
    "8-bit.tif": tiff_bomb(60_000, 8),
    "gif": gif_bomb(60_000),
    "webp": webp_bomb(16_383),
    "jp2": jp2_bomb(20_000),
    "bmp": b"BM" + struct.pack("<IIIIiiHH", 60, 0, 54, 40, 20_000, 20_000, 1, 24) + bytes(30),
    "ppm": b"P6 20000 20000 255\n" + bytes(100),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_are_decoded(name: str, tmp_path: Path) -> None:
    (tmp_path / f"bomb.{name}").write_bytes(BOMBS[name])
    tracemalloc.start()
    said = reason(open_source(str(tmp_path)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if name.endswith(("tif", "tiff")):  # would be read by windows
        assert "damaged or cut off" in said or "pip install 'glare-ssl[geotiff]'" in said
    else:
        assert f"exceeds limit of {MAX_PIXELS} pixels. Cut it into tiles" in said
    assert peak < 2**24


def test_the_limit_holds_where_pillows_own_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    bomb = Images(["it"], lambda _: open_picture(io.BytesIO(BOMBS["png"])))
    assert "Image size (400000000 pixels) exceeds limit of 178956970 pixels. Cut it into tiles" in reason(bomb)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_bombs_in_shards_are_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    file = tmp_path / f"x.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_dict({"image": [{"bytes": BOMBS["png"], "path": None}]}).to_parquet(file)
    else:
        with tarfile.open(file, "w") as tar:
            member = tarfile.TarInfo("a.png")
            member.size = len(BOMBS["png"])
            tar.addfile(member, io.BytesIO(BOMBS["png"]))
    assert "exceeds limit" in reason(open_source(str(file)))


def test_deep_grey_and_transparent_pictures_take_little_more_memory_than_they_have() -> None:
    deep = Image.fromarray(np.zeros((2000, 3000), np.uint16))
    clear = Image.new("RGBA", (3000, 2000))
    for picture in (deep, clear):
        tracemalloc.start()
        to_rgb8(picture)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 64 * 2**20  # 6 million pixels; as float64 they would take 48 MB three times


# many files


def test_many_files_take_little_memory(tmp_path: Path) -> None:
    count = 20_000
    write(tmp_path, "scene_0.png")
    for number in range(1, count):
        os.link(tmp_path / "scene_0.png", tmp_path / f"scene_{number}.png")
    tracemalloc.start()
    source = open_source(str(tmp_path))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == count and source.name(count - 1) == f"scene_{count - 1}.png"
    assert held < 250 * count and peak < 400 * count
    assert image_files(tmp_path)[2] == tmp_path / "scene_2.png"
