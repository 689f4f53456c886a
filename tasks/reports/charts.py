"""Parts that all charts share: a colour for each kind of model, and writing a figure."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 110  # 1,000 pixels for the 9 inches of a typical figure: a page's width, sharp on screens
PARENT, MERGED, NAIVE, ENSEMBLE = "#8c9bab", "#e07b39", "#f0c49f", "#5b8c5a"


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; the same figure gives the same bytes whatever drew it."""
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def without_frame(axis: Axes) -> None:
    """Leave an axis its left and its lower line."""
    axis.spines[["top", "right"]].set_visible(False)
