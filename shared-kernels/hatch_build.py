"""The build hook: a wheel or an editable install holds the native library where it can be compiled.

The library knows neither Python's ABI nor torch's: a wheel with it is py3-none-PLATFORM. Without a
compiler, or with SHARED_KERNELS_NATIVE=0, the wheel is pure Python, every package runs on PyTorch
alone, and one line says so. With SHARED_KERNELS_NATIVE=1 a failed build is an error.
SHARED_KERNELS_PLATFORM names the platform of the wheel: one of those in native/build.py is compiled
with the package ziglang, whatever the machine, and a failed build is an error.
"""

from __future__ import annotations

import os
import runpy
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeLibrary(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        wish = os.environ.get("SHARED_KERNELS_NATIVE", "")
        if wish == "0":
            self.app.display_info("shared-kernels without its native library: it is switched off")
            return
        root = Path(self.root)
        build = runpy.run_path(str(root / "native" / "build.py"))
        tag = os.environ.get("SHARED_KERNELS_PLATFORM") or sysconfig.get_platform()
        if tag in build["PLATFORMS"] and version != "editable":
            # held until the wheel is written
            self.folder = tempfile.TemporaryDirectory()
            library = build["build"](Path(self.folder.name), wheel=tag)
        else:
            library = root / "src" / "shared_kernels" / "native" / build["NAME"]
            try:
                if not build["is_current"](library):
                    build["build"](library.parent)
            except build["BuildError"] as problem:
                if wish == "1":
                    raise
                self.app.display_warning(f"shared-kernels without its native library: {problem}")
                library.unlink(missing_ok=True)  # one of older sources would be worse than none
                return
        if version == "editable":  # it is read from the source folder
            return
        inside = f"shared_kernels/native/{library.name}"
        build_data["force_include"][str(library)] = inside
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + tag.replace("-", "_").replace(".", "_")
