"""The version of this package, and of its distribution."""

__version__ = "0.2.0"
