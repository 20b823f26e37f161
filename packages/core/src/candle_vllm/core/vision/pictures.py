# SPDX-License-Identifier: MIT
"""Check image files of requests and decode them to pixels (before step 3).

An untrusted file is parsed here before Pillow reads it: this checks its format, its size and its scans, and removes
EXIF, ICC profiles, texts and comments, except in WebP and after a GIF's first frame, where Pillow does not parse them.
So the cost of a file is bounded by its bytes and its pixels. Pillow's message about a damaged file may contain memory
addresses and is not returned. Source of the limits: docs/security.md (CVE-2026-22778 and others).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import hashlib
import io
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import ConfigError, InvalidParameterError, with_extra

if TYPE_CHECKING:
    from PIL.Image import Image

    from candle_vllm.core.config import EngineConfig

MAX_PARTS = 1 << 16  # segments, chunks or blocks of a file
MAX_SCANS = 100  # limit for a JPEG; encoders write about ten
MAX_SCANNED = 1 << 31  # pixels times scans of a JPEG: a scan of a few bytes visits every pixel
_ORIENTATION = 0x0112
_LONGEST_SIDE = 1 << 16
_WHOLE = 1 << 25  # pixels; both sides of a larger image are halved, as no model needs more
_BLANKS = " \t\r\n\f\v"


@dataclasses.dataclass(frozen=True)
class PictureLimits:
    """Limits of a prompt's images. An engine's setting of the same name (`max_images`) replaces a default.

    `max_image_bytes` is for an image's file, `max_image_pixels` for the width times the height in the file's header.
    """

    max_images: int = 64
    max_image_bytes: int = 20 << 20
    max_image_pixels: int = 1 << 26

    @classmethod
    def of(cls, config: EngineConfig) -> PictureLimits:
        """Return the limits that an engine's settings give."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(config, name) for name in names if hasattr(config, name)})


LIMITS = PictureLimits()


@dataclasses.dataclass(frozen=True)
class Picture:
    """Decoded image.

    Attributes:
        pixels: [height, width, 3] uint8 RGB, rotated by the EXIF orientation, transparent pixels blended with white.
        digest: SHA-256 of size and pixels; identifies equal images.
    """

    pixels: NDArray[np.uint8]
    digest: bytes

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.pixels.shape[1]


def require_pillow() -> None:
    """Raise ConfigError if Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise ConfigError(f"images need Pillow: {with_extra('vision')}", "max_images") from None


def decode_picture(data: bytes, limits: PictureLimits = LIMITS, name: str = "image") -> Picture:
    """Decode the first frame of a PNG, JPEG, WebP or GIF file.

    `name` is the image's name in messages, and the field that an error names. Raises InvalidParameterError if the file
    has an unsupported format or variant, is damaged, or is too large.
    """
    import PIL.Image

    if len(data) > (most := limits.max_image_bytes):
        raise InvalidParameterError(f"{name}: {len(data)} bytes; an image may have at most {most}", name)
    refused: Exception | None = None
    try:
        file = _bare(data)
        _check_size(file.width, file.height, limits, name)
        if file.scans * file.width * file.height > MAX_SCANNED:
            said = f"{file.width} x {file.height} pixels in {file.scans} scans; {MAX_SCANNED} in all are allowed"
            raise _RefusedFile(said)
        with PIL.Image.open(io.BytesIO(file.data), formats=(file.format,)) as image:
            _check_size(*image.size, limits, name)  # again, because Pillow may read another size from the file
            if image.width * image.height > _WHOLE:
                image.draft(None, (image.width // 2, image.height // 2))  # a JPEG is decoded at half its size
            image.load()
            return _picture(image, _orientation(file.exif or image.info.get("exif", b"")))
    except _RefusedFile as error:
        refused = InvalidParameterError(f"{name}: {error}", name)
    except InvalidParameterError:
        raise
    except Exception:  # a decoder of hostile bytes may raise anything
        refused = InvalidParameterError(f"{name}: the image is damaged: it could not be decoded", name)
    raise refused


def pixels_of(data: bytes) -> int:
    """Return the number of pixels by a file's header; 0 for a file that cannot be parsed."""
    try:
        file = _bare(data)
    except Exception:  # as in `decode_picture`
        return 0
    return file.width * file.height


def picture_of(image: object, limits: PictureLimits = LIMITS, name: str = "image") -> Picture:
    """Convert an image: a Pillow image, an array [H, W, 3] uint8, the bytes of a file; or return a `Picture`.

    Raises InvalidParameterError if the image has another type, or is too large; or see `decode_picture`.
    """
    if isinstance(image, Picture):
        return image
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decode_picture(bytes(image), limits, name)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            said = f"{name}: an array must be [height, width, 3] of uint8, not {list(image.shape)} of {image.dtype}"
            raise InvalidParameterError(said, name)
        _check_size(image.shape[1], image.shape[0], limits, name)
        return _of_pixels(image)
    with contextlib.suppress(ImportError):
        import PIL.Image

        if isinstance(image, PIL.Image.Image):
            _check_size(*image.size, limits, name)
            try:
                image.load()
                with contextlib.suppress(Exception):  # EXIF data that cannot be read is ignored, as in a file
                    return _picture(image, image.getexif().get(_ORIENTATION, 1))
                return _picture(image, 1)
            except Exception:  # as in `decode_picture`
                raise InvalidParameterError(f"{name}: the image is damaged: it could not be decoded", name) from None
    raise InvalidParameterError(
        f"{name}: an image must be a PIL.Image, an array [height, width, 3] of uint8, or the bytes of a file, not "
        f"{type(image).__name__}",
        name,
    )


def from_data_url(url: str, limits: PictureLimits = LIMITS, name: str = "image") -> bytes:
    """Return the bytes of a `data:` URL; its media type is ignored. Source: RFC 2397.

    Raises InvalidParameterError if it is not a data URL, not base64, or too long.
    """
    head, comma, data = url.partition(",")
    if not comma or not head[:5].lower() == "data:" or not head.lower().endswith(";base64"):
        raise InvalidParameterError(f"{name}: a data URL must be data:image/png;base64, and the base64 text", name)
    most = 4 * (limits.max_image_bytes // 3 + 1)
    if len(data) > most and len(data) - sum(map(data.count, _BLANKS)) > most:
        raise InvalidParameterError(f"{name}: the image has more than {limits.max_image_bytes} bytes", name)
    return from_base64(data, name)


def from_base64(data: str, name: str = "image") -> bytes:
    """Decode base64, which may contain line breaks; raises InvalidParameterError for invalid base64."""
    try:
        return base64.b64decode(data.encode("ascii").translate(None, _BLANKS.encode()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidParameterError(f"{name}: its data is not valid base64", name) from None


def part_picture(part: Mapping[str, Any], place: str) -> object:
    """Return the image of a content part, as `picture_of` accepts it; `place` is the part's position, for errors.

    Accepts content parts of OpenAI's API (`image_url`, `input_image`), of transformers (`image` with `image`, `path`,
    `url` or `base64`) and of vLLM (`image_pil`). A `path` is read, no URL fetched. Raises InvalidParameterError if the
    part has no image, an unreadable one, or a URL that is no data URL.
    """
    found = [
        part[key] for key in ("image", "image_pil", "image_url", "url", "path", "base64") if part.get(key) is not None
    ]
    if len(found) != 1:
        raise InvalidParameterError(f"{place}: must have one image: image_url, image, path or base64", place)
    given = found[0]
    if isinstance(given, Mapping):
        given = given.get("url")
    if part.get("path") is not None:
        try:
            return Path(given).read_bytes()  # type: ignore[arg-type]  # a caller's own file
        except (OSError, TypeError, ValueError) as error:
            raise InvalidParameterError(f"{place}.path: cannot be read: {error}", place) from None
    if not isinstance(given, str):
        return given
    if part.get("base64") is not None:
        return from_base64(given, place)
    if given[:5].lower() == "data:":
        return from_data_url(given, name=place)
    raise InvalidParameterError(
        f"{place}: only chat, chat_stream and achat fetch images from URLs; elsewhere call fetch_images first: await "
        "engine.fetch_images(messages)",
        place,
    )


def part_address(part: Mapping[str, Any]) -> str | None:
    """Return the URL of a content part's image; None for a data URL or an image that is given in another way."""
    for key in ("image", "image_url", "url"):
        given = part.get(key)
        given = given.get("url") if isinstance(given, Mapping) else given
        if isinstance(given, str) and given[:5].lower() != "data:":
            return given
    return None


def _check_size(width: int, height: int, limits: PictureLimits, name: str) -> None:
    most = limits.max_image_pixels
    if not 0 < width <= _LONGEST_SIDE or not 0 < height <= _LONGEST_SIDE or width * height > most:
        said = f"{name}: {width} x {height} pixels; at most {most}, and {_LONGEST_SIDE} on a side, are allowed"
        raise InvalidParameterError(said, name)


def _picture(image: Image, orientation: int) -> Picture:
    """Convert a loaded Pillow image: blend transparent pixels with white, halve large images, apply the orientation."""
    import PIL.Image
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn, clear = turns.get(orientation), image.info.get("transparency")
    if image.mode.startswith("I;16"):  # Pillow alone would clip at 255, and compare the lower eight bits with `clear`
        values = np.asarray(image)
        image = PIL.Image.fromarray((values >> 8).astype(np.uint8))
        if clear is not None:
            image.putalpha(PIL.Image.fromarray((values != clear).astype(np.uint8) * 255))
    elif isinstance(clear, tuple) and max(clear) > 255:  # 16 bits, of which Pillow has the upper eight of each pixel
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        seen = _halved(image if image.mode == "RGBA" else image.convert("RGBA"))
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", seen.size, (255, 255, 255, 255)), seen)
    image = _halved(image if image.mode in ("RGB", "L") else image.convert("RGB"))
    image = image if image.mode == "RGB" else image.convert("RGB")  # `convert` would copy it
    return _of_pixels(np.asarray(image if turn is None else image.transpose(turn)))


def _halved(image: Image) -> Image:
    """Halve both sides of an image of more than `_WHOLE` pixels."""
    return image.reduce(2) if image.width * image.height > _WHOLE else image


def _of_pixels(pixels: NDArray[np.uint8]) -> Picture:
    pixels = np.ascontiguousarray(pixels)
    digest = hashlib.sha256(np.array(pixels.shape, "<i8").tobytes())
    digest.update(pixels.data)
    return Picture(pixels, digest.digest())


# ---- files reduced to their pixels -----------------------------------------------------------------------------------
# The parsers raise struct.error, IndexError or ValueError for a damaged file.


class _RefusedFile(Exception):
    """A file of a kind that is not decoded, or whose decoding would be too expensive; the message has the reason."""


class _File(NamedTuple):
    """File reduced to its pixels, the input of Pillow.

    Attributes:
        data: the file without metadata.
        exif: the file's EXIF data, not parsed; empty for WebP, whose EXIF data Pillow returns unparsed.
        scans: passes over the pixels.
    """

    format: str
    data: bytes
    width: int
    height: int
    exif: bytes = b""
    scans: int = 1


def _bare(data: bytes) -> _File:
    """Reduce a file to its pixels; raises _RefusedFile for an unknown format."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _bare_png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _bare_jpeg(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _bare_gif(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _File("WEBP", data, *_size_of_webp(data))
    raise _RefusedFile("this is not an image in a supported format: PNG, JPEG, WebP or GIF")


def _too_many(parts: str) -> _RefusedFile:
    return _RefusedFile(f"an image may have at most {MAX_PARTS} {parts}")


_PNG_PIXELS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_GREYS = {b"\2\0": 85, b"\4\0": 17}  # Pillow multiplies levels of 2 and 4 bits by this, but not the transparent one


def _bare_png(data: bytes) -> _File:
    """Keep critical chunks and transparency; Pillow handles truncated files. Source: PNG 3, 5.3 and 11."""
    if data[12:16] == b"CgBI":  # another order of colours and another compression
        raise _RefusedFile("an Apple-optimised PNG (CgBI) is not supported: convert it to a plain one")
    if data[12:16] != b"IHDR":
        raise ValueError
    kept, exif, at = [data[:8]], b"", 8
    for _ in range(MAX_PARTS):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4])
        sound = end == at + 14 and struct.pack(">I", zlib.crc32(data[at + 4 : at + 10])) == data[at + 10 : end]
        if kind == b"tRNS" and sound and (factor := _GREYS.get(data[24:26])):
            level = struct.pack(">H", factor * (data[at + 9] & 255 // factor))
            kept.append(b"\0\0\0\2tRNS" + level + struct.pack(">I", zlib.crc32(b"tRNS" + level)))
        elif kind in _PNG_PIXELS and (kind != b"IHDR" or at == 8):
            kept.append(data[at:end])
        elif kind == b"eXIf" and not exif:
            exif = data[at + 8 : end - 4]
        if kind == b"IEND" or end >= len(data):
            return _File("PNG", b"".join(kept), *struct.unpack_from(">II", data, 16), exif=exif)
        at = end
    raise _too_many("chunks")


_JPEG_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xef\xfe])")  # 0xFF before any other byte is a scan's data
_JPEG_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive; all with Huffman coding
_JPEG_PIXELS = frozenset({0xC4, 0xDA, 0xDB, 0xDD, 0xE0, 0xEE}) | _JPEG_FRAMES  # E0 and EE define the colour space
_JPEG_DROPPED = frozenset({0xCC, 0xDC, *range(0xE1, 0xEE), 0xEF, 0xFE})


def _bare_jpeg(data: bytes) -> _File:
    """Keep tables, frame and scans, up to the end of the first image. Source: ITU-T T.81, annex B."""
    kept, exif, size, scans, at = [data[:2]], b"", None, 0, 2
    for _ in range(MAX_PARTS):
        found = _JPEG_MARKER.search(data, at)
        if scans:
            kept.append(data[at : len(data) if found is None else found.start()])
        if found is None or found[1] == b"\xd9":
            if size is None:
                raise ValueError
            return _File("JPEG", b"".join(kept) + (b"" if found is None else b"\xff\xd9"), *size, exif, scans)
        marker, begin = found[1][0], found.end()
        at = begin + struct.unpack_from(">H", data, begin)[0]
        if marker in _JPEG_FRAMES and size is None:
            height, width = struct.unpack_from(">HH", data, begin + 3)
            size = width, height
        elif marker < 0xD0 and marker not in _JPEG_PIXELS | _JPEG_DROPPED:
            raise _RefusedFile("a JPEG must be Huffman-coded, and not lossless or hierarchical")
        elif marker not in _JPEG_PIXELS - _JPEG_FRAMES | _JPEG_DROPPED:
            raise ValueError
        elif marker == 0xE1 and not exif and data.startswith(b"Exif\0\0", begin + 2):
            exif = data[begin + 2 : at]
        elif marker == 0xDA and (scans := scans + 1) > MAX_SCANS:
            raise _RefusedFile(f"a JPEG may have at most {MAX_SCANS} scans")
        if marker in _JPEG_PIXELS:
            kept.append(data[begin - 2 : at])
    raise _too_many("segments")


def _bare_gif(data: bytes) -> _File:
    """Keep the screen, the first image's control block and everything from this image on. Source: GIF89a, 18 to 26."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + ((6 << (flags & 7)) if flags & 128 else 0)
    screen, control = data[:at], b""
    blocks = iter(range(MAX_PARTS))
    for _ in blocks:
        begin = at
        if data[at] == 0x2C:
            left, top, columns, rows = struct.unpack_from("<HHHH", data, at + 1)
            return _File("GIF", screen + control + data[at:], max(width, left + columns), max(height, top + rows))
        if data[at] == 0x3B:
            raise ValueError
        at += 1
        if data[begin] == 0x21:
            at += 1
            while data[at] and next(blocks, None) is not None:
                at += 1 + data[at]
            at += 1
            control = data[begin:at] if data[begin + 1] == 0xF9 else control
    raise _too_many("blocks")


def _size_of_webp(data: bytes) -> tuple[int, int]:
    """Return width and height of the canvas. Source: RFC 9649, 2.5 to 2.7, and RFC 6386, 9.1."""
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        (sides,) = struct.unpack_from("<I", data, 21)
        return 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _orientation(exif: bytes) -> int:
    """Return the orientation in EXIF's first directory; 1 by default. Source: TIFF 6.0, 2; EXIF 3.0, 4.6.5."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4], "")
    try:
        (begin,) = struct.unpack_from(order + "I", exif, 4) if order else (len(exif),)
        (count,) = struct.unpack_from(order + "H", exif, begin)
        for at in range(begin + 2, begin + 2 + 12 * count, 12):
            tag, kind, number, value = struct.unpack_from(order + "HHIH", exif, at)
            if tag == _ORIENTATION:
                return value if (kind, number) == (3, 1) else 1
    except struct.error:  # a truncated directory
        pass
    return 1
