# SPDX-License-Identifier: MIT
"""What strangers send as pictures: read as a person would see it, or refused in a sentence."""

from __future__ import annotations

import base64
import io
import itertools
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from candle_vllm.core.errors import ConfigError, InvalidParameterError
from candle_vllm.core.vision import pictures
from candle_vllm.core.vision.pictures import (
    PictureLimits,
    decode_picture,
    from_base64,
    from_data_url,
    part_picture,
    picture_of,
    require_pillow,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def stored(image: Image.Image = IMAGE, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_pixels_are_what_was_stored(format: str, options: dict[str, Any]) -> None:
    assert np.array_equal(decode_picture(stored(format=format, **options)).pixels, PIXELS)


def test_lossy_files_are_what_pillow_makes_of_them() -> None:
    for format in ("JPEG", "GIF"):
        data = stored(format=format)
        theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(decode_picture(data).pixels, theirs)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_turned_as_its_file_says(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = stored(exif=exif)
    theirs = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode_picture(data).pixels, theirs)


def test_transparent_pixels_are_white() -> None:
    clear = IMAGE.copy()
    clear.putalpha(0)
    assert (decode_picture(stored(clear)).pixels == 255).all()
    palette = Image.new("P", (4, 4))
    palette.putpalette([0, 0, 0] * 256)
    assert (decode_picture(stored(palette, transparency=0)).pixels == 255).all()
    half = Image.new("LA", (2, 2), (0, 128))
    assert (abs(decode_picture(stored(half)).pixels.astype(int) - 127) <= 1).all()


@pytest.mark.parametrize(("bits", "data"), [(1, b"\x40"), (2, b"\x18"), (4, b"\x01\x70"), (8, b"\x00\x01\x80")])
def test_one_level_of_grey_may_be_transparent(bits: int, data: bytes) -> None:
    """Of black, the level 1 and another."""
    greys = png(3, 1, b"\0" + data, before=chunk(b"tRNS", b"\0\1"), bits=bits, colours=0)
    levels = decode_picture(greys).pixels[0, :, 0].tolist()
    assert levels[:2] == [0, 255]
    assert levels[2] == {1: 0, 2: 170, 4: 119, 8: 128}[bits]
    short = png(3, 1, b"\0" + data, before=chunk(b"tRNS", b"\1"), bits=bits, colours=0)
    for bad in (short, greys.replace(b"tRNS\0\1", b"tRNS\0\0")):
        with pytest.raises(InvalidParameterError, match="damaged"):
            decode_picture(bad)


def test_sixteen_bits_become_their_upper_eight() -> None:
    wide = Image.fromarray(np.array([[0, 255, 256, 65535, 32768]], np.uint16))
    assert decode_picture(stored(wide)).pixels[0, :, 0].tolist() == [0, 0, 1, 255, 128]
    assert decode_picture(stored(wide, transparency=32768)).pixels[0, :, 0].tolist() == [0, 0, 1, 255, 255]
    assert decode_picture(stored(wide, transparency=255)).pixels[0, :, 0].tolist() == [0, 255, 1, 255, 128]
    colours = [0x0010, 0x2000, 0x3000], [0x0010, 0x2000, 0x4000], [0x0010, 0x0000, 0x0000]
    rows = b"\0" + struct.pack(">9H", *itertools.chain(*colours))
    data = png(3, 1, rows, before=chunk(b"tRNS", struct.pack(">3H", *colours[1])), bits=16)
    for image in (data, Image.open(io.BytesIO(data))):
        assert picture_of(image).pixels[0].tolist() == [[0, 0x20, 0x30], [255] * 3, [0] * 3]


def test_other_modes_are_colours() -> None:
    for mode in ("CMYK", "L"):
        image = IMAGE.convert(mode)
        data = stored(image, "JPEG" if mode == "CMYK" else "PNG")
        theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(decode_picture(data).pixels, theirs)


def test_of_many_frames_the_first_is_seen() -> None:
    frames = [Image.new("RGB", (3, 3), (shade, 0, 0)) for shade in (10, 200)]
    data = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_picture(data).pixels[0, 0, 0] == 10


def png(
    width: int, height: int, data: bytes = b"", before: bytes = b"", after: bytes = b"", interlaced: int = 0,
    bits: int = 8, colours: int = 2,
) -> bytes:  # fmt: skip
    """A PNG file whose header says this size, with further chunks before its pixels and behind them."""

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, interlaced))
    body = before + chunk(b"IDAT", zlib.compress(data)) + after + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


BROKEN = {
    "nothing": b"",
    "text": b"hello",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "bmp": stored(format="BMP"),
    "tiff": stored(format="TIFF"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "half a png": stored()[:60],
    "the head of a png": stored()[:33],
    "half a jpeg": stored(Image.new("RGB", (64, 64)), "JPEG")[:300],
    "half a webp": stored(format="WEBP")[:40],
    "half a gif": stored(format="GIF")[:20],
    "pixels missing": png(64, 64, b"\0" * 10),
    "of no size": png(0, 5),
    "a bomb": png(50_000, 50_000),
    "a line": png(100_000, 1),
    "beyond a number": png(0xFFFFFFFF, 0xFFFFFFFF),
    "wrong sums": stored()[:40] + b"\xff" * 8 + stored()[48:],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        decode_picture(BROKEN[name], name="messages.0")
    assert caught.value.param == "messages.0"
    assert "0x" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None
    known = BROKEN[name].startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8"))
    assert ("not an image in a supported format" in str(caught.value)) is not known


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_no_damage_does_more_than_that(format: str) -> None:
    whole, random = stored(Image.new("RGB", (40, 30), (9, 99, 200)), format), np.random.default_rng(1)
    for _ in range(150):
        data = bytearray(whole)
        for place in random.integers(0, len(data), 3):
            data[place] = random.integers(0, 256)
        try:
            picture = decode_picture(
                bytes(data[: random.integers(1, len(data) + 1)]), PictureLimits(max_image_pixels=10_000)
            )
        except InvalidParameterError:
            continue
        assert picture.pixels.size <= 30_000


def test_apples_form_of_png_is_refused_by_name() -> None:
    """Pillow reads its head, and fails at its pixels."""
    plain = stored()
    with pytest.raises(InvalidParameterError, match="Apple-optimised PNG \\(CgBI\\)"):
        decode_picture(plain[:8] + chunk(b"CgBI", b"P\0 \6") + plain[8:])


def test_limits_are_looked_at_before_pixels() -> None:
    with pytest.raises(InvalidParameterError, match=r"image: 7 x 5 pixels; at most 34"):
        decode_picture(stored(), PictureLimits(max_image_pixels=34))
    with pytest.raises(InvalidParameterError, match=r"bytes; an image may have at most 20"):
        decode_picture(stored(), PictureLimits(max_image_bytes=20))
    with pytest.raises(InvalidParameterError, match=r"at most 34"):
        picture_of(IMAGE, PictureLimits(max_image_pixels=34))


def test_equal_pixels_are_one_picture() -> None:
    first = picture_of(PIXELS)
    assert {picture_of(IMAGE).digest, decode_picture(stored()).digest, picture_of(stored()).digest} == {first.digest}
    turned = picture_of(np.ascontiguousarray(PIXELS.reshape(7, 5, 3)))
    assert turned.digest != first.digest  # the same bytes in another shape


@pytest.mark.parametrize("given", [5, "x.png", PIXELS[0], PIXELS.astype(float), PIXELS[:0], None])
def test_what_is_no_picture_is_named(given: object) -> None:
    with pytest.raises(InvalidParameterError, match="image: "):
        picture_of(given)


def test_an_open_image_that_is_damaged_is_refused() -> None:
    damaged = Image.open(io.BytesIO(stored(Image.new("RGB", (300, 300)), "PNG")[:200]))
    with pytest.raises(InvalidParameterError, match="p: the image is damaged: it could not be decoded"):
        picture_of(damaged, name="p")


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_exif_data_that_cannot_be_read_is_ignored(form: str) -> None:
    made = io.BytesIO()
    Image.new("RGB", (30, 20), (1, 2, 3)).save(made, form, exif=b"Exif\0\0none", lossless=True)
    for given in (made.getvalue(), Image.open(made)):
        assert picture_of(given).pixels.shape == (20, 30, 3)


def test_parts_name_one_picture(tmp_path: Any) -> None:
    data = stored()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    (tmp_path / "a.png").write_bytes(data)
    parts: list[dict[str, Any]] = [
        {"image_url": {"url": url}}, {"image_url": url}, {"image": IMAGE}, {"image": url}, {"image_pil": IMAGE},
        {"path": str(tmp_path / "a.png")}, {"base64": base64.b64encode(data).decode()}, {"url": url},
    ]  # fmt: skip
    pictures = {picture_of(part_picture(part, "p")).digest for part in parts}
    assert pictures == {picture_of(PIXELS).digest}
    for wrong in ({}, {"image": IMAGE, "url": url}, {"url": "https://a.example/b.png"}, {"path": "none.png"}):
        with pytest.raises(InvalidParameterError, match=r"p.*: "):
            part_picture(wrong, "p")


def test_base64_may_be_in_lines() -> None:
    data = bytes(range(256)) * 3
    for text in (base64.encodebytes(data).decode(), base64.b64encode(data).decode().replace("A", "A \t\r\n")):
        assert from_base64(text) == data
        assert from_data_url(f"data:;base64,{text}", PictureLimits(max_image_bytes=len(data))) == data
    for text in ("AA\u00a0AA", "AA\0AA", "AA-A", "AAA"):
        with pytest.raises(InvalidParameterError, match="not valid base64"):
            from_base64(text)


@pytest.mark.parametrize(("format", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "RGBA"),
                                              ("PNG", "P"), ("PNG", "I;16"), ("WEBP", "RGB")])  # fmt: skip
def test_of_very_large_ones_four_pixels_are_one(format: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shades = np.add.outer(np.arange(40), np.arange(60)).astype(np.uint8)
    wide = Image.fromarray(shades.astype(np.uint16) * 257)
    image = wide if mode == "I;16" else Image.fromarray(shades).convert(mode)
    data = stored(image, format, **({} if format == "PNG" else {"quality": 95}))
    plain = decode_picture(data).pixels.astype(int)
    monkeypatch.setattr(pictures, "_WHOLE", 40 * 60 - 1)
    halved = decode_picture(data).pixels
    assert halved.shape == (20, 30, 3)
    assert abs(halved - plain.reshape(20, 2, 30, 2, 3).mean((1, 3))).max() <= 3
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(turned, format, exif=exif)
    assert decode_picture(turned.getvalue()).pixels.shape == (30, 20, 3)
    assert picture_of(Image.open(io.BytesIO(data))).pixels.shape == (20, 30, 3)


@pytest.mark.parametrize("url", ["data:image/png,abc", "data:;base64", "data:image/png;base64,###", "http://a/b"])
def test_only_base64_is_data(url: str) -> None:
    with pytest.raises(InvalidParameterError):
        from_data_url(url)
    with pytest.raises(InvalidParameterError, match="has more than 30 bytes"):
        from_data_url("data:;base64," + "A" * 100, PictureLimits(max_image_bytes=30))


def test_without_pillow_a_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ConfigError, match=r"images need Pillow: .*vision"):
        require_pillow()
    assert picture_of(PIXELS).width == 7


# ---- what a file costs -----------------------------------------------------------------------------------------------

BOMB = b"II*\0\x08\0\0\0" + struct.pack("<H", 4000)  # entries with the same 90,000 bytes, and with none
BOMB += b"".join(struct.pack("<HHII", 0x9000 + at, 7, 90_000 + at % 2 * 10**6, 8) for at in range(4000)) + bytes(90_000)


def segment(kind: int, body: bytes = b"") -> bytes:
    """A segment of a JPEG."""
    return bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body


def progressive(side: int, scans: int, *, refine: bool = False) -> bytes:
    """A grey JPEG of black whose scans have a few bytes each, and visit every block: one of DC, then of AC."""
    blocks, bits = (side // 8) ** 2, ""
    while blocks > 0:  # in runs of at most 32,767 blocks
        run = min(blocks, 32_767)
        bits += "0" + format(max(run - 16_384, 0), "014b")
        blocks -= max(run, 16_384)
    bits += "1" * (-len(bits) % 8)
    runs = int(bits, 2).to_bytes(len(bits) // 8).replace(b"\xff", b"\xff\0")
    tables = segment(0xDB, b"\0" + b"\x10" * 64) + segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    tables += segment(0xC4, b"\0\1" + bytes(16)) + segment(0xC4, b"\x10\1" + bytes(15) + b"\xe0")
    dc = segment(0xDA, b"\1\1\0\0\0\0") + bytes((side // 8) ** 2 // 8 + 1)
    first, later = (segment(0xDA, b"\1\1\0\1\x3f" + bytes([low])) + runs for low in (1, 0x10 if refine else 1))
    return b"\xff\xd8" + tables + dc + (first + later * (scans - 2) if scans > 1 else b"") + b"\xff\xd9"


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP file of these chunks."""
    body = b"".join(kind + struct.pack("<I", len(each)) + each + bytes(len(each) % 2) for kind, each in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def gif(before: bytes = b"", frames: int = 1) -> bytes:
    """A GIF file with something before its frames."""
    whole = stored(IMAGE, "GIF")
    first = whole.index(b",", 13 + (6 << (whole[10] & 7)))
    return whole[:first] + before + whole[first:-1] * frames + b";"


JPEG = stored(IMAGE, "JPEG")
LOSSLESS = stored(IMAGE, "WEBP", lossless=True)[20:]
CANVAS, MOVING = ((b"VP8X", bytes([kind]) + b"\0\0\0\6\0\0\4\0\0") for kind in (8, 2))  # 7 x 5; with EXIF, with frames
FRAME = (b"ANMF", bytes(6) + b"\6\0\0\4\0\0\1\0\0\0VP8L" + struct.pack("<I", len(LOSSLESS)) + LOSSLESS)
MANY = pictures.MAX_PARTS + 1
COSTLY: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "scans": (lambda: progressive(64, 101), "a JPEG may have at most 100 scans"),
    "scans, as many as may be": (lambda: progressive(64, 100), None),
    "scans of what has many pixels": (lambda: progressive(8192, 33), "8192 x 8192 pixels in 33 scans; "),
    "scans that refine": (lambda: progressive(2048, 30, refine=True), None),
    "arithmetic code": (lambda: JPEG.replace(b"\xff\xc0", b"\xff\xc9"), "must be Huffman-coded"),
    "tables": (lambda: JPEG[:2] + segment(0xC4, bytes(17)) * MANY + JPEG[2:], "65536 segments"),
    "application segments": (lambda: JPEG[:2] + segment(0xE5) * MANY + JPEG[2:], "65536 segments"),
    "EXIF in a JPEG": (lambda: JPEG[:2] + segment(0xE1, b"Exif\0\0" + BOMB[:65_000]) * 40 + JPEG[2:], None),
    "stuffed bytes": (lambda: JPEG[:-2] + b"\xff\0" * 500_000 + JPEG[-2:], None),
    "fill bytes": (lambda: JPEG[:2] + b"\xff" * 1_000_000 + JPEG[2:], None),
    "restarts": (lambda: JPEG[:-2] + b"\xff\xd0" * 500_000 + JPEG[-2:], None),
    "interlaced": (lambda: png(1024, 1024, bytes((3 << 20) + 15 * 128), interlaced=1), None),
    "profiles": (lambda: png(1, 1, bytes(4), chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 20))) * 3000), None),
    "texts": (lambda: png(1, 1, bytes(4), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20))) * 3000), None),
    "texts behind": (lambda: png(1, 1, bytes(4), b"", chunk(b"iTXt", b"a\0\0\0\0\0b") * 60_000), None),
    "chunks": (lambda: png(1, 1, bytes(4), chunk(b"tEXt", b"a\0b") * MANY), "65536 chunks"),
    "pieces of pixels": (lambda: png(1, 1, bytes(4), chunk(b"IDAT", b"") * MANY), "65536 chunks"),
    "pixels behind the last": (lambda: png(1, 1, bytes(1 << 24)), None),
    "EXIF in a PNG": (lambda: png(1, 1, bytes(4), chunk(b"eXIf", BOMB)), None),
    "frames of a PNG": (
        lambda: png(1, 1, bytes(4), chunk(b"acTL", bytes(8)) * 2, chunk(b"fdAT", b"abcd") * 50_000),
        None,
    ),
    "comments": (lambda: gif(b"!\xfe" + b"\1a" * MANY + b"\0"), "65536 blocks"),
    "control blocks": (lambda: gif(b"!\xf9\4\0\0\0\0\0" * MANY), "65536 blocks"),
    "bytes between blocks": (lambda: gif(bytes(MANY)), "65536 blocks"),
    "frames of a GIF": (lambda: gif(frames=5000), None),
    "EXIF in a WebP": (lambda: riff(CANVAS, (b"VP8L", LOSSLESS), (b"EXIF", BOMB)), None),
    "chunks of a WebP": (lambda: riff(CANVAS, (b"VP8L", LOSSLESS), *[(b"ABCD", b"ab")] * 100_000), None),
    "frames of a WebP": (lambda: riff(MOVING, (b"ANIM", bytes(6)), *[FRAME] * 5000), None),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_file_costs_what_its_bytes_and_pixels_do(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, refused = COSTLY[name]
    data = make()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        began = time.process_time()
        if refused is None:
            decode_picture(data)
        else:
            with pytest.raises(InvalidParameterError, match=refused):
                decode_picture(data)
        took = time.process_time() - began
    assert took < 3, "of a hundredth"
    assert not warned
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_metadata_is_not_given_to_pillow(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = stored(IMAGE, format, exif=exif, icc_profile=bytes(70_000), **({} if format == "PNG" else {"xmp": b"<x/>"}))
    monkeypatch.setattr(Image.Exif, "load", None)  # nothing is read of it but the orientation, by our own code
    assert decode_picture(data).pixels.shape == (7, 5, 3)
    if format != "WEBP":  # whose profile Pillow copies and does not read
        with Image.open(io.BytesIO(pictures._bare(data).data)) as image:
            image.load()
            assert not {"exif", "icc_profile", "xmp"} & image.info.keys()


def tiff(order: str, *entries: tuple[int, int, int, int], count: int | None = None) -> bytes:
    """TIFF data with one directory."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(
        order + "IH", 8, len(entries) if count is None else count
    )
    return head + b"".join(struct.pack(order + "HHIHxx", *entry) for entry in entries)


@pytest.mark.parametrize(
    ("exif", "orientation"),
    [
        (tiff("<", (0x010F, 2, 1, 0), (0x0112, 3, 1, 6)), 6),
        (tiff(">", (0x0112, 3, 1, 8)), 8),
        (b"Exif\0\0" + tiff(">", (0x0112, 3, 1, 3)), 3),
        (tiff("<", (0x0112, 3, 2, 6)), 1),  # two of them
        (tiff("<", (0x0112, 5, 1, 6)), 1),  # no number of its kind
        (tiff("<", (0x010F, 2, 1, 6), count=65_535), 1),  # entries that are not there
        (b"II*\0\xff\xff\xff\xff", 1),
        (b"II*\0\4\0", 1),
        (b"MM*\0" + bytes(40), 1),
        (b"", 1),
    ],
)
def test_an_orientation_is_read_within_its_data(exif: bytes, orientation: int) -> None:
    assert pictures._orientation(exif) == orientation
