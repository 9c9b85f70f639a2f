#!/usr/bin/env bash
# package: safetensors 0.8.0
# date: 2026-11-29
# expected: an operating system's error while a file is written is an OSError with its errno, as it is while a file is read: load_file of a missing file raises FileNotFoundError
# seen: save_file on a file system without space, or into a folder that does not exist, raises SafetensorError, which is no OSError and has no errno; `except OSError` around a checkpoint does not catch a full disk. The file that was there before is unharmed
# ours: dsalt turns it into an OSError that names the checkpoint, so that a full disk is one line and an exit code (packages/dsalt/tests/test_checkpoints.py, test_a_full_disk_is_one_line_and_harms_nothing)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q safetensors==0.8.0 numpy

cat >"$work/write.py" <<'PY'
import os
import resource
import signal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

small, large = {"x": np.zeros(4, np.float32)}, {"x": np.ones(100_000, np.float32)}
save_file(small, "model.safetensors")
# a limit on the size of a file ends a write as a full disk does
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
for name in ("model.safetensors", "nowhere/model.safetensors"):
    try:
        save_file(large, name)
    except Exception as error:
        print(f"save_file({name!r}): {type(error).__name__}: {error}")
        assert type(error) is SafetensorError and not isinstance(error, OSError)
        assert not hasattr(error, "errno")
    else:
        raise SystemExit("the write did not fail")
try:
    load_file("nowhere/model.safetensors")
except FileNotFoundError as error:
    print(f"load_file: FileNotFoundError: {error}")
assert os.listdir() == ["model.safetensors"]
assert (load_file("model.safetensors")["x"] == small["x"]).all()
print("the file of before is whole")
PY
mkdir "$work/disk"
cd "$work/disk"
"$work/venv/bin/python" ../write.py 2>&1 | cat  # the limit also holds for a file that takes what is printed
