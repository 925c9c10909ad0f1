"""Compare the libraries that are installed with those that this package was tested with."""

import logging
from importlib.metadata import PackageNotFoundError, version

from packaging.version import InvalidVersion, Version

from .._version import LIBRARIES
from ..errors import ConfigError

_log = logging.getLogger(__name__)


def check_versions() -> None:
    """Refuse libraries that are too old, and warn of those that were not tested; imports none.

    Raises:
        ConfigError: a library lacks what this package calls.
    """
    untested = []
    for name, (needed, first, last) in LIBRARIES.items():
        try:
            found = Version(version(name))
        except (PackageNotFoundError, InvalidVersion):  # whoever imports it says more
            continue
        if found < Version(needed):
            raise ConfigError(
                f"{name}: expected {needed} or newer, found {found}, which lacks what "
                f"qalora-plugin calls. Update it: pip install '{name}>={needed}'"
            )
        # a release that only mends is as tested as the one that it mends
        if not _minor(Version(first)) <= _minor(found) <= _minor(Version(last)):
            span = first if first == last else f"{first} to {last}"
            untested.append(f"{name} {found} (tested: {span})")
    if untested:
        _log.warning("qalora-plugin was not tested with %s", ", ".join(untested))


def _minor(found: Version) -> tuple[int, int]:
    return found.major, found.minor
