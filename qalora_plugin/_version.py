"""The version of this package, and those of other packages that it was tested with."""

__version__ = "0.2.0"

LIBRARIES = {
    "torch": ("2.11", "2.13.0", "2.13.0"),
    "transformers": ("5.16.1", "5.16.1", "5.24.0"),
    "peft": ("0.20", "0.20.0", "0.21.2"),
    "trl": ("1.9", "1.9.0", "1.16.0"),
    "accelerate": ("1.13", "1.13.0", "1.15.0"),
}
"""By distribution: the oldest release that has what we call, the oldest and the newest on which the
tests pass. Older ones are an error, others that were not tested a warning."""
