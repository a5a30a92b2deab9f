"""The package's version, from its installed metadata; "0+source" when run from a bare source tree."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("gnomon")
except PackageNotFoundError:
    __version__ = "0+source"
