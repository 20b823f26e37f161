# SPDX-License-Identifier: MIT
"""Pictures as they are sent, checked and decoded to pixels (before step 3).

Bytes of a stranger are given to Pillow only: its loaders are limited to four formats by name, a picture's size is read
and checked before its pixels are, and what Pillow says of a broken file (which may show addresses of memory) is not
passed on. Source of the limits: CVE-2026-22778, CVE-2026-34755 and their like, see docs/vision.md.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import ConfigError, InvalidParameterError, with_extra

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_ORIENTATION = 0x0112
_LONGEST_SIDE = 1 << 16
_WHOLE = 1 << 25  # pixels; of what has more, both sides are halved while it is decoded, for no model looks so closely
_BLANKS = " \t\r\n\f\v"


@dataclasses.dataclass(frozen=True)
class PictureLimits:
    """What a picture may be.

    Attributes:
        nbytes: of its file.
        pixels: width times height, as its file says.
    """

    nbytes: int = 20 << 20
    pixels: int = 1 << 26


LIMITS = PictureLimits()


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture's pixels.

    Attributes:
        pixels: [height, width, 3] uint8, RGB as a person sees it: rotated as its file says, on white where it is
            transparent.
        digest: SHA-256 of size and pixels, by which two are the same.
    """

    pixels: NDArray[np.uint8]
    digest: bytes

    @property
    def height(self) -> int:
        """In pixels."""
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        """In pixels."""
        return self.pixels.shape[1]


def require_pillow() -> None:
    """Raises ConfigError where Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        said = f"pictures need Pillow: {with_extra('vision')}"
        raise ConfigError(said, "max_images") from None


def decode_picture(data: bytes, limits: PictureLimits = LIMITS, name: str = "image") -> Picture:
    """The first frame of a PNG, JPEG, WebP or GIF file.

    Args:
        data: the file.
        limits: what it may be.
        name: what messages call it, and the field to blame.

    Raises:
        InvalidParameterError: it is none of these, damaged, or too large; nothing of its pixels was decoded then.
    """
    import PIL.Image

    if len(data) > limits.nbytes:
        raise InvalidParameterError(f"{name}: {len(data)} bytes; a picture may have {limits.nbytes}", name)
    refused: Exception | None = None
    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size, limits, name)
            if image.width * image.height > _WHOLE:
                image.draft(None, (image.width // 2, image.height // 2))  # of a JPEG, half is all that is decoded
            return _picture(image)
    except InvalidParameterError:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        refused = InvalidParameterError(f"{name}: too many pixels; a picture may have {limits.pixels}", name)
    except PIL.UnidentifiedImageError:
        said = f"{name}: this is no picture in a format that is read: PNG, JPEG, WebP or GIF"
        refused = InvalidParameterError(said, name)
    except Exception:  # a decoder of hostile bytes may raise anything
        refused = InvalidParameterError(f"{name}: the picture is damaged: it could not be decoded", name)
    raise refused


def picture_of(image: object, limits: PictureLimits = LIMITS, name: str = "image") -> Picture:
    """What a caller of the library passes as a picture: a Pillow image, an array [H, W, 3] uint8, or a file's bytes.

    Raises:
        InvalidParameterError: it is something else, or too large.
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
            return _picture(image)
    raise InvalidParameterError(
        f"{name}: a picture is a PIL.Image, an array [height, width, 3] of uint8, or a file's bytes, not "
        f"{type(image).__name__}",
        name,
    )


def from_data_url(url: str, limits: PictureLimits = LIMITS, name: str = "image") -> bytes:
    """The bytes of a `data:` URL, whose declared type is not believed; source: RFC 2397.

    Raises:
        InvalidParameterError: it is none, its data are not base64, or there are too many.
    """
    head, comma, data = url.partition(",")
    if not comma or not head[:5].lower() == "data:" or not head.lower().endswith(";base64"):
        raise InvalidParameterError(f"{name}: a data URL is data:image/png;base64, and the picture in base64", name)
    most = 4 * (limits.nbytes // 3 + 1)
    if len(data) > most and len(data) - sum(map(data.count, _BLANKS)) > most:
        raise InvalidParameterError(f"{name}: a picture may have {limits.nbytes} bytes", name)
    return from_base64(data, name)


def from_base64(data: str, name: str = "image") -> bytes:
    """Bytes of base64, in lines or not; raises InvalidParameterError where it is none."""
    try:
        return base64.b64decode(data.encode("ascii").translate(None, _BLANKS.encode()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidParameterError(f"{name}: its data are no base64", name) from None


def part_picture(part: Mapping[str, Any], place: str) -> object:
    """What a part of a message says its picture is, as `picture_of` takes it; `place` is the part's, for messages.

    Parts are those of OpenAI's API (`image_url`, `input_image`), of transformers (`image` with `image`, `path`, `url`
    or `base64`) and of vLLM (`image_pil`). Nothing is fetched: see `part_address`.

    Raises:
        InvalidParameterError: it has none, or an address of another machine.
    """
    found = [
        part[key] for key in ("image", "image_pil", "image_url", "url", "path", "base64") if part.get(key) is not None
    ]
    if len(found) != 1:
        raise InvalidParameterError(f"{place}: must have one picture: image_url, image, path or base64", place)
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
        f"{place}: an address is fetched by chat, chat_stream and achat alone; elsewhere fetch_images does it before: "
        "await engine.fetch_images(messages)",
        place,
    )


def part_address(part: Mapping[str, Any]) -> str | None:
    """The address that a part of a message has for its picture, which is elsewhere; None where there is none."""
    for key in ("image", "image_url", "url"):
        given = part.get(key)
        given = given.get("url") if isinstance(given, Mapping) else given
        if isinstance(given, str) and given[:5].lower() != "data:":
            return given
    return None


def _check_size(width: int, height: int, limits: PictureLimits, name: str) -> None:
    if not 0 < width <= _LONGEST_SIDE or not 0 < height <= _LONGEST_SIDE or width * height > limits.pixels:
        said = f"{name}: {width} x {height} pixels; a picture may have {limits.pixels}, and {_LONGEST_SIDE} on a side"
        raise InvalidParameterError(said, name)


def _picture(image: Image) -> Picture:
    """A picture of an opened one: as it is meant to be seen, without alpha."""
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
    image.load()
    turn = turns.get(image.getexif().get(_ORIENTATION, 1))
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 256).convert("L")  # Pillow alone would cut at 255
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        seen = _halved(image if image.mode == "RGBA" else image.convert("RGBA"))
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", seen.size, (255, 255, 255, 255)), seen)
    image = _halved(image if image.mode in ("RGB", "L") else image.convert("RGB"))
    image = image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    return _of_pixels(np.asarray(image if turn is None else image.transpose(turn)))


def _halved(image: Image) -> Image:
    """Four pixels as one, where there are too many to keep."""
    return image.reduce(2) if image.width * image.height > _WHOLE else image


def _of_pixels(pixels: NDArray[np.uint8]) -> Picture:
    pixels = np.ascontiguousarray(pixels)
    digest = hashlib.sha256(np.array(pixels.shape, "<i8").tobytes())
    digest.update(pixels.data)
    return Picture(pixels, digest.digest())
