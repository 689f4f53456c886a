"""Concepts, and the real drawings of each: glyphs of a font, digits from many hands."""

import gzip
import re
from collections.abc import Mapping
from functools import cache

import emoji
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tasks.data.scenes.packages import DIGITS, FONT, package_file, read_arrays

SPLITS = ("train", "validation", "test")

COLOURS = "black|blue|brown|green|grey|light blue|orange|pink|purple|red|white|yellow"
PERSON = r"((man|woman|person) )?"
DRAWINGS: Mapping[str, str] = {  # concept: the English names (package `emoji`) of its drawings
    "firefighter": PERSON + "firefighter",
    "cook": PERSON + "cook",
    "astronaut": PERSON + "astronaut",
    "biking": PERSON + "biking",
    "surfing": PERSON + "surfing",
    "mage": PERSON + "mage",
    "fairy": PERSON + "fairy",
    "mermaid": "mer(maid|man|person)",
    "guard": PERSON + "guard",
    "bathing": "person taking bath",
    "thumbs-up": "thumbs up",
    "thumbs-down": "thumbs down",
    "victory-hand": "victory hand",
    "raised-fist": "raised fist",
    "OK-hand": "OK hand",
    "biceps": "flexed biceps",
    "ear": "ear",
    "foot": "foot",
    "nail-polish": "nail polish",
    "selfie": "selfie",
    "heart": f"({COLOURS}|beating|growing|sparkling) heart",
    "circle": f"({COLOURS}) circle",
    "square": f"({COLOURS})( large)? square",
    "clock": r"\w+[- ](o.clock|thirty)",
    "moon": "(crescent|first quarter|last quarter|wa[nx]ing (crescent|gibbous)) moon",
    "cat": "(cat face|(crying|grinning|kissing|pouting|smiling|weary) cat.*|cat with .*)",
    "tree": "(christmas|deciduous|evergreen|leafless|palm) tree",
    "book": "(blue|closed|green|open|orange) book|notebook.*",
    "car": "(oncoming )?(automobile|police car|taxi)|(sport utility|pickup) (vehicle|truck)",
    "cloud": "cloud( with .*)?|sun behind .*cloud",
}
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CONCEPTS = (*DRAWINGS, *NUMERALS)
EMPTY = -1  # the concept of a cell that shows nothing
GLYPH_POINTS = 72  # the size that glyphs are drawn at


def read_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """MNIST by split: ink in 0..1 [n, 28, 28] and labels [n]."""
    parts = read_arrays(gzip.decompress(package_file(DIGITS).read_bytes()))
    return {
        split: (ink.reshape(-1, 28, 28), labels)
        for split, (ink, labels) in zip(SPLITS, parts, strict=True)
    }


@cache
def glyphs() -> dict[str, tuple[str, ...]]:
    """The emoji sequences that draw each concept, in code-point order."""
    tone = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")
    names = {
        sequence: tone.sub("", entry["en"].strip(":").replace("_", " "))
        for sequence, entry in emoji.EMOJI_DATA.items()
        if entry["status"] == emoji.STATUS["fully_qualified"]
    }
    return {
        concept: tuple(
            sorted(s for s, name in names.items() if re.fullmatch(pattern, name, re.IGNORECASE))
        )
        for concept, pattern in DRAWINGS.items()
    }


def glyph_font() -> ImageFont.FreeTypeFont:
    """Load the font of all drawings."""
    return ImageFont.truetype(package_file(FONT), GLYPH_POINTS)


def draw_glyph(sequence: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One glyph, cropped to its ink."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((24, 16), sequence, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None or box[2] - box[0] > 120:
        raise ValueError(f"the font has no single glyph for {sequence!r}: is Pillow without raqm?")
    return canvas.crop(box)


def draw_digit(ink: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """One handwritten digit in a random dark colour, cropped to its ink."""
    alpha = (ink * 255).astype(np.uint8)
    colour = np.broadcast_to(rng.integers(0, 110, size=3, dtype=np.uint8), (28, 28, 3))
    image = Image.fromarray(np.dstack([colour, alpha]))
    return image.crop(image.getchannel("A").getbbox())
