"""Draw the spaces of an attention block: `python docs/figures/symmetry.py` writes symmetry.svg."""

from pathlib import Path

COLOURS = {"residual": "#4c78a8", "heads": "#f58518", "width": "#54a24b", "values": "#b279a2"}
BOXES = {  # weight: (x, y, [space of the columns], [spaces of the rows])
    "query": (170, 30, ["residual"], ["heads", "width"]),
    "key": (170, 120, ["residual"], ["heads", "width"]),
    "value": (170, 210, ["residual"], ["heads", "values"]),
    "output": (470, 120, ["heads", "values"], ["residual"]),
}
SIZE = 56


def bar(x: float, y: float, width: float, height: float, space: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{COLOURS[space]}"/>'


def box(name: str, x: float, y: float, columns: list[str], rows: list[str]) -> list[str]:
    """Draw a weight as a square, with bars for its columns (top) and its rows (left)."""
    parts = [f'<rect x="{x}" y="{y}" width="{SIZE}" height="{SIZE}" fill="#f2f2f2" stroke="#999"/>']
    parts += [f'<text x="{x + SIZE / 2}" y="{y + SIZE / 2 + 4}" text-anchor="middle">{name}</text>']
    for i, space in enumerate(columns):
        parts.append(bar(x, y - 8 * (i + 1), SIZE, 6, space))
    for i, space in enumerate(rows):
        parts.append(bar(x - 8 * (i + 1), y, 6, SIZE, space))
    return parts


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1},{y1} L{x2},{y2}" stroke="#666" fill="none" marker-end="url(#a)"/>'


def main() -> None:
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 350" font-family="sans-serif" '
        'font-size="12">',
        '<defs><marker id="a" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" '
        'orient="auto"><path d="M0,0 L6,3 L0,6 z" fill="#666"/></marker></defs>',
        '<rect width="640" height="350" fill="white"/>',
    ]
    for name, (x, y, columns, rows) in BOXES.items():
        parts += box(name, x, y, columns, rows)
    parts += ['<text x="20" y="152">stream x</text>']
    parts += [line(75, 148, 148, y) for y in (60, 148, 236)]
    parts += [
        '<rect x="300" y="60" width="110" height="40" rx="6" fill="#fff" stroke="#999"/>',
        '<text x="355" y="84" text-anchor="middle">softmax(q kᵀ)</text>',
        '<rect x="300" y="160" width="110" height="40" rx="6" fill="#fff" stroke="#999"/>',
        '<text x="355" y="184" text-anchor="middle">weighted sum of v</text>',
        line(228, 58, 298, 75),
        line(228, 148, 298, 90),
        line(228, 238, 298, 190),
        line(355, 100, 355, 158),
        line(410, 180, 448, 152),
        line(528, 148, 580, 148),
        '<text x="584" y="152">+ x</text>',
    ]
    legend = {
        "residual": "residual stream",
        "heads": "heads: one order for queries, keys and values",
        "width": "width of queries and keys, per head",
        "values": "width of values, per head",
    }
    for i, (space, text) in enumerate(legend.items()):
        x, y = 20 + 300 * (i % 2), 305 + 22 * (i // 2)
        parts += [bar(x, y - 9, 14, 10, space), f'<text x="{x + 20}" y="{y}">{text}</text>']
    Path(__file__).with_suffix(".svg").write_text("\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
