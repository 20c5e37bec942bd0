"""The chart library of a page: uPlot, as the package youplot brings it along, of which nothing is imported.

Its files go into a page only if they are uPlot's own release, byte for byte.
"""

from __future__ import annotations

from hashlib import sha256
from importlib.metadata import PackageNotFoundError, files

UPLOT = "1.6.31"
_PACKAGE = "youplot"
_REPAIR = f"pip install --force-reinstall {_PACKAGE}==1.0.0, which is the extra 'report'"
_FILES = {
    "uplot.iife.min.js": "2d27e8ad3d228164525ce213f9dc716f39b4e3aee0cc773fb3491c96cf4921a2",
    "uplot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}


class NoCharts(RuntimeError):
    """The chart library is not there; the message says how to have it."""


def uplot() -> tuple[str, str]:
    """The script and the style sheet. Raises NoCharts."""
    try:
        listed = {path.name: path for path in files(_PACKAGE) or ()}
    except PackageNotFoundError as error:
        raise NoCharts(f"the package {_PACKAGE}, from which a page has its charts, is not there; {_REPAIR}") from error
    texts = []
    for name, digest in _FILES.items():
        data = listed[name].read_binary() if name in listed else b""
        if sha256(data).hexdigest() != digest:
            raise NoCharts(f"the {name} of the package {_PACKAGE} is not that of uPlot {UPLOT}; {_REPAIR}")
        texts.append(data.decode())
    script, style = texts
    return script, style
