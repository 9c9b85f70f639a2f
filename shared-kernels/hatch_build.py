"""The build hook: a wheel holds the native library where SHARED_KERNELS_NATIVE=1 asks for it.

The library knows neither Python's ABI nor torch's: a wheel with it is py3-none-PLATFORM. Without
the wish the wheel is pure Python: no package runs on the library yet. With it a machine that
cannot compile it is told so.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeLibrary(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if os.environ.get("SHARED_KERNELS_NATIVE") != "1":
            return
        root = Path(self.root)
        spec = importlib.util.spec_from_file_location("native_build", root / "native" / "build.py")
        if spec is None or spec.loader is None:
            raise ImportError(f"{root / 'native' / 'build.py'} cannot be loaded")
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        library = root / "src" / "shared_kernels" / "native" / build.NAME
        if not build.is_current(library):
            build.build(library.parent)
        if version == "editable":  # it is read from the source folder
            return
        inside = f"shared_kernels/native/{build.NAME}"
        build_data["force_include"][str(library)] = inside
        build_data["pure_python"] = False
        tag = os.environ.get("SHARED_KERNELS_PLATFORM") or sysconfig.get_platform()
        build_data["tag"] = "py3-none-" + tag.replace("-", "_").replace(".", "_")
