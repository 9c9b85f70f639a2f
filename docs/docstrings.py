"""What the docstrings of the sources need before the site can show them.

The sources say `Example:`, as Google's style allows; griffe knows the section `Examples:` only.
Roles of Sphinx (a class in backquotes behind `:class:`) become plain code.
"""

from __future__ import annotations

import re

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([^`]+)`")
EXAMPLE = re.compile(r"^(\s*)Example:[ ]*$", re.M)


def shown(text: str) -> str:
    """A docstring as the site shows it."""
    return EXAMPLE.sub(r"\1Examples:", ROLE.sub(r"`\1`", text))


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = shown(obj.docstring.value)
