#!/usr/bin/env bash
# package: anndata 0.12.19 (h5py 3.16.0, zarr 3.1.6)
# date: 2026-11-30
# expected: anndata.experimental.concat_on_disk writes what anndata.concat of the loaded objects gives: its page says that the results should be equivalent, and that only memory differs
# seen: a sparse X (or layer) keeps the dtype of the first file. Behind a file of integer counts the values of the others are cut to integers (300.75 becomes 300, 0.5 becomes 0), behind a float32 file counts above 2^24 are rounded, and what a small integer type cannot hold stops at its end in h5ad (300 becomes 255) and wraps around in zarr (300 becomes 44). No warning; in the other order of the same files the numbers are right. anndata.concat takes the common dtype, and so does concat_on_disk where X is dense
# ours: nothing; flashdiffusion.anndata.diffmap reads what the file holds
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q anndata==0.12.19 h5py==3.16.0 zarr==3.1.6 numpy==2.4.6 scipy==1.17.1 dask

cat >"$work/concat.py" <<'PY'
import sys
import warnings

import anndata
import numpy as np
from anndata.experimental import concat_on_disk
from scipy import sparse

warnings.simplefilter("ignore")


def both(first, second, as_matrix, kind):
    """The value of the second file, concatenated in memory and on disk."""
    names = []
    for number, array in enumerate((first, second)):
        cells = anndata.AnnData(as_matrix(array), obs={"n": [number]})
        cells.obs_names = [str(number)]
        names.append(f"{sys.argv[1]}/{len(names)}.{kind}")
        getattr(cells, f"write_{kind}")(names[-1])
    read = getattr(anndata, f"read_{kind}")
    concat_on_disk(names, f"{sys.argv[1]}/all.{kind}")
    loaded = anndata.concat([read(name) for name in names])
    found = [cells.X.toarray() if sparse.issparse(cells.X) else cells.X
             for cells in (loaded, read(f"{sys.argv[1]}/all.{kind}"))]
    return [float(x[1, 0]) for x in found]


counts = np.array([[7, 1]])
for first, second, h5ad, zarr in (
    (counts.astype(np.int64), np.array([[300.75, 1]], np.float32), 300, 300),
    (counts.astype(np.int64), np.array([[0.5, 1]], np.float64), 0, 0),
    (counts.astype(np.uint8), np.array([[300, 1]], np.int32), 255, 44),
    (counts.astype(np.float32), np.array([[2**24 + 1, 1]], np.int64), 2**24, 2**24),
):
    for kind, wrong in (("h5ad", h5ad), ("zarr", zarr)):
        exact, on_disk = both(first, second, sparse.csr_matrix, kind)
        print(f"{kind}: {first.dtype} + {second.dtype}: {exact} in memory, {on_disk} on disk")
        assert exact == float(second[0, 0]) and on_disk == wrong
        assert both(first, second, np.asarray, kind) == [exact, exact], "dense"
PY
"$work/venv/bin/python" "$work/concat.py" "$work"
