"""datafold's row of the conversions, in an environment of its own: its scikit-learn is not ours.

    pip install "numpy<2" "scipy<1.12" scikit-learn==1.2.2 "pandas<2.2" "matplotlib<3.9"
    pip install --no-deps datafold==2.0.2 "findiff<0.11" sympy mpmath numexpr Deprecated wrapt
    python conversions.py > datafold.json

tests/test_conversions.py compares our maps of the same points with what it has written.
"""

import importlib.metadata
import json
import sys

import numpy as np
from datafold.dynfold import DiffusionMaps
from datafold.pcfold import GaussianKernel

N, PAIRS, EPSILON = 40, 4, 6.0


def main():
    X = np.random.default_rng(0).standard_normal((N, 3)) * [3.0, 2.0, 1.0]
    names = ("datafold", "scikit-learn", "scipy", "numpy")
    out = {
        **{name: importlib.metadata.version(name) for name in names},
        "epsilon": EPSILON,
        "points": X.tolist(),
        "of_alpha": {},
    }
    for alpha in (0.0, 0.5, 1.0):
        kernel = GaussianKernel(epsilon=EPSILON)
        fitted = DiffusionMaps(kernel, n_eigenpairs=PAIRS + 1, alpha=alpha, time_exponent=2)
        coordinates = np.asarray(fitted.fit_transform(X))
        out["of_alpha"][alpha] = {
            "eigenvalues": fitted.eigenvalues_.tolist(),
            "eigenvectors": np.asarray(fitted.eigenvectors_).tolist(),
            "coordinates_of_time_2": coordinates.tolist(),
        }
    sys.stdout.write(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
