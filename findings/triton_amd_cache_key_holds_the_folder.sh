#!/usr/bin/env bash
# package: triton 3.7.1
# date: 2026-11-29
# expected: the options that go into a kernel's key in Triton's cache say the same wherever Triton is installed, as its own code for NVIDIA takes care of: it hashes what the device library holds
# seen: for AMD the key holds the paths of the device libraries ocml.bc and ockl.bc. The same Triton in another folder (another virtual environment, a container's layer, a moved home) finds nothing of a shared cache for AMD and compiles every kernel again; for NVIDIA it finds all
# ours: shared_kernels.offline.keys hashes what the libraries hold (test_offline.py, test_a_key_knows_no_folder)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/options.py" <<'PY'
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

for target in (GPUTarget("hip", "gfx942", 64), GPUTarget("cuda", 90, 32)):
    print(make_backend(target).parse_options({}).hash())
PY
cd "$work"
for folder in one another; do
    python3 -m venv "$folder"
    "$folder/bin/pip" install -q triton==3.7.1
    mapfile -t "$folder" < <("$folder/bin/python" options.py)
done
echo "gfx942: ${one[0]:0:16} in one folder, ${another[0]:0:16} in another"
echo "sm_90:  ${one[1]:0:16} in one folder, ${another[1]:0:16} in another"
[[ ${#one[0]} == 64 && ${one[0]} != "${another[0]}" ]]
[[ ${#one[1]} == 64 && ${one[1]} == "${another[1]}" ]]
