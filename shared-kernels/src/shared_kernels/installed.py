"""Is the distribution that is installed under a package's name the package that runs?

Other people's projects carry the same names on the public index. Where one of them is installed, a
checkout on PYTHONPATH still runs, while everything that asks for the installed version, or installs
an extra, means the other project.
"""

from __future__ import annotations

import warnings
from importlib import metadata


def warn_of_another_project(name: str) -> None:
    """Warn if the distribution that is installed as `name` is not this repository's.

    Every package of this repository requires shared-kernels, and its metadata says so; nobody
    else's does. Nothing installed under the name (a checkout on PYTHONPATH) is no reason to warn.
    The look-up reads one file, and torch has imported the reader already.

    Args:
        name: the package that is being imported, ``__name__`` of its ``__init__``.

    Example:
        >>> warn_of_another_project("a_name_that_nobody_has_installed")

    Source: packaging.python.org, core metadata (Requires-Dist).
    """
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return
    if "\nRequires-Dist: shared-kernels" in (found.read_text("METADATA") or ""):
        return
    warnings.warn(
        f"the {name} that runs here belongs to the sparse-weights packages, but the distribution "
        f"{name} {found.version} that is installed is another project of the same name; remove it "
        f"with `pip uninstall {name}`, and install this one from its checkout: "
        f"`pip install ./shared-kernels ./packages/{name}`",
        UserWarning,
        stacklevel=3,  # the line that imports the package
    )
