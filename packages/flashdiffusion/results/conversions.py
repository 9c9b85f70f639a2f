"""datafold's row of the conversions, in two environments: its scikit-learn is not ours.

python conversions.py theirs FILE.npz   # with datafold==2.0.2, scikit-learn==1.2.2, numpy<2
python conversions.py ours FILE.npz     # with flashdiffusion: one JSON line on stdout
"""

import json
import sys

import numpy as np

N, PAIRS, EPSILON = 300, 5, 1.3


def points():
    return np.random.default_rng(0).standard_normal((N, 3)) * [3.0, 2.0, 1.0]


def theirs(path):
    from datafold.dynfold import DiffusionMaps
    from datafold.pcfold import GaussianKernel

    saved = {}
    for alpha in (0.0, 0.5, 1.0):
        fitted = DiffusionMaps(
            GaussianKernel(epsilon=EPSILON), n_eigenpairs=PAIRS + 1, alpha=alpha
        ).fit(points())
        saved[f"values {alpha}"] = fitted.eigenvalues_[1:]
        saved[f"vectors {alpha}"] = np.asarray(fitted.eigenvectors_)[:, 1:]
    np.savez(path, **saved)


def ours(path):
    from flashdiffusion import DiffusionMap

    found, out = np.load(path), {"peer": "datafold 2.0.2", "epsilon": EPSILON, "N": N}
    for alpha in (0.0, 0.5, 1.0):
        dm = DiffusionMap(1.0 / (2.0 * EPSILON), alpha, PAIRS, solver="dense").fit(points())
        psi = dm.eigenvectors_ / np.linalg.norm(dm.eigenvectors_, axis=0)
        vectors = found[f"vectors {alpha}"]
        vectors = vectors / np.linalg.norm(vectors, axis=0)
        signs = np.sign((psi * vectors).sum(0))
        out[f"alpha {alpha}"] = {
            "eigenvalues": float(np.abs(found[f"values {alpha}"] - dm.eigenvalues_).max()),
            "vectors": float(np.abs(vectors * signs - psi).max()),
        }
    sys.stdout.write(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    {"theirs": theirs, "ours": ours}[sys.argv[1]](sys.argv[2])
