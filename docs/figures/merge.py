"""Draw two towers, their streams and the merge: `python docs/figures/merge.py` writes merge.svg."""

from pathlib import Path

BLUE, GREEN, ORANGE, GREY = "#4c78a8", "#54a24b", "#e07b39", "#8c9bab"
SHADES = (0.25, 0.55, 0.85, 0.4, 0.7)  # of the units of a stream
ORDER = (2, 4, 0, 3, 1)  # in which the other tower has them
BLOCKS, WIDTH, HEIGHT, TOP = 3, 112, 34, 64


def text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="middle" {more}>{words}</text>'


def units(x: float, y: float, colour: str, order: tuple[int, ...]) -> list[str]:
    """The units of a stream between two blocks: squares whose shade says which unit it is."""
    size, gap = 14, 4
    left = x - (len(order) * (size + gap) - gap) / 2
    parts = []
    for place, unit in enumerate(order):
        at = left + place * (size + gap)
        shade = SHADES[unit]
        rectangle = f'<rect x="{at:.0f}" y="{y}" width="{size}" height="{size}" rx="3"'
        parts.append(f'{rectangle} fill="{colour}" fill-opacity="{shade}"/>')
    return parts


def tower(x: float, title: str, below: str, colour: str, order: tuple[int, ...]) -> list[str]:
    """A stack of blocks with its stream between them."""
    parts = [text(x, 26, title, 'font-weight="600"'), text(x, 44, below, f'fill="{GREY}"')]
    for block in range(BLOCKS):
        y = TOP + block * (HEIGHT + 34)
        parts.append(
            f'<rect x="{x - WIDTH / 2}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" '
            f'fill="{colour}" fill-opacity="0.12" stroke="{colour}"/>'
        )
        parts.append(text(x, y + 22, f"block {BLOCKS - block}"))
        parts += units(x, y + HEIGHT + 10, colour, order)
    return parts


def arrow(x: float, y: float, words: str, below: str) -> list[str]:
    line = f'<path d="M{x - 44} {y} h84 m-9 -6 l9 6 l-9 6" fill="none" stroke="{GREY}"'
    return [
        f'{line} stroke-width="2"/>',
        text(x, y - 12, words, 'font-weight="600"'),
        text(x, y + 24, below, f'fill="{GREY}"'),
    ]


def main() -> None:
    same = tuple(range(len(SHADES)))
    parts = [
        *tower(90, "images", "trained apart", BLUE, same),
        *tower(230, "texts", "units in another order", GREEN, ORDER),
        *arrow(355, 150, "align", "same function"),
        *tower(480, "images", "the reference", BLUE, same),
        *tower(620, "texts", "the same order now", GREEN, same),
        *arrow(745, 150, "merge", "without training"),
        *tower(870, "one trunk", "for both", ORANGE, same),
    ]
    style = "font-family: system-ui, sans-serif; font-size: 13px; fill: #56636f"
    (Path(__file__).parent / "merge.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 280" role="img" '
        f'aria-label="Two towers are aligned, then merged into one" style="{style}">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    main()
