"""An image out of a file, as a model takes it, or one line that says why not.

Nothing is lost on the way: what would be, transparent parts, more than 8 bits, the colours where a model takes grey,
is refused.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")  # of 8 bits a value
GREY = ("1", "L", "LA", "La")
_FETCH = "fetch the file again, or take it out"


class UnreadableImage(ValueError):
    """An image that a data set cannot give; says which, and what to do."""


def header_problem(value: dict[str, Any]) -> str:
    """What is wrong with an undecoded image of `datasets` that shows without its pixels; '' if nothing does."""
    try:
        with _opened(value) as image:
            return _problem(image)
    except UnreadableImage as error:
        return str(error)


def read_image(value: dict[str, Any], channels: int) -> Image.Image:
    """RGB, or grey for one channel, turned as its EXIF says. Raises UnreadableImage with the reason and the repair."""
    with _opened(value) as image:
        if problem := _problem(image):
            raise UnreadableImage(problem)
        try:
            image.load()
            image = ImageOps.exif_transpose(image)
        except Exception as error:  # of whatever decoder reads a file
            raise UnreadableImage(f"is broken ({_reason(error)}); {_FETCH}") from error
        if channels != 1:
            return image.convert("RGB")
        if image.mode in GREY:
            return image.convert("L")
        red, *others = image.convert("RGB").split()
        if any(other.tobytes() != red.tobytes() for other in others):
            raise UnreadableImage("is in colour, and the model takes grey (num_channels=1); set num_channels=3")
        return red


def _opened(value: dict[str, Any]) -> Image.Image:
    content, path = value.get("bytes"), value.get("path")
    if content is None and path is None:
        raise UnreadableImage("is missing; take the row out")
    if content is None and not Path(str(path)).is_file():
        raise UnreadableImage("does not exist; put it back, or take it out")
    if len(content) == 0 if content is not None else Path(str(path)).stat().st_size == 0:
        raise UnreadableImage(f"is empty (0 bytes); {_FETCH}")
    try:
        return Image.open(str(path) if content is None else BytesIO(content))
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"is no image that Pillow reads; {_FETCH}") from error
    except Exception as error:  # of whatever decoder reads a file
        raise UnreadableImage(f"is broken ({_reason(error)}); {_FETCH}") from error


def _problem(image: Image.Image) -> str:
    """Of an image that is opened, and decoded where parts of it may be transparent."""
    if 0 in image.size:
        return f"has 0 pixels ({image.width} x {image.height}); take it out"
    if image.mode not in MODES:
        kind = {"F": "floating-point", "LAB": "Lab"}.get(image.mode, "16 or 32 bit")
        return f"has {kind} values (mode {image.mode}), a model takes 8 bit; save it as RGB or grey of 8 bit"
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return ""
    try:
        lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    except Exception as error:  # of whatever decoder reads a file
        return f"is broken ({_reason(error)}); {_FETCH}"
    if lowest == 255:
        return ""
    return f"has transparent parts (mode {image.mode}); put it on a background and save it without"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
