"""Fonts that have the letters of a text; the one that comes with Pillow knows only English ones."""

from __future__ import annotations

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Fonts of Windows, macOS and Linux with Korean, Chinese or Japanese letters; Pillow looks where the system keeps them.
_WIDE = (
    "malgun.ttf",
    "msyh.ttc",
    "YuGothM.ttc",
    "arialuni.ttf",
    "AppleSDGothicNeo.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKkr-Regular.otf",
    "NotoSansCJKsc-Regular.otf",
    "NanumGothic.ttf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "arial.ttf",
    "Arial.ttf",
    "DejaVuSans.ttf",
)


def font_for(text: str, size: int) -> Font:
    """Pillow's own font where it has all letters of ``text``, else the known one of this system that lacks fewest."""
    own = ImageFont.load_default(size)
    best, fewest = own, len(missing(text, own))
    for name in _WIDE if fewest else ():
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue
        lacks = len(missing(text, font))
        if lacks < fewest:
            best, fewest = font, lacks
        if not lacks:
            break
    return best


def missing(text: str, font: Font) -> set[str]:
    """The letters of ``text`` that ``font`` shows as it shows an unassigned one: as a box."""
    box = _drawn("\U0010ffff", font)
    return {letter for letter in set(text) if not letter.isspace() and _drawn(letter, font) == box}


def drawable(text: str, font: Font) -> str:
    """``text`` with a question mark for every letter that ``font`` lacks."""
    lacks = missing(text, font)
    return "".join("?" if letter in lacks else letter for letter in text)


def _drawn(letter: str, font: Font) -> tuple[tuple[int, int], bytes] | None:
    try:
        mask = font.getmask(letter)
    except (UnicodeError, ValueError, OSError):  # the bitmap font of a Pillow without FreeType
        return None
    return mask.size, bytes(mask)
