#!/usr/bin/env bash
# package: scikit-learn 1.9.1 (scipy 1.17.1)
# date: 2026-11-30
# expected: a CSR matrix that names a place twice holds the sum there, as SciPy says, whose own example of csr_array counts words that way; scikit-learn takes CSR matrices and finds for one the numbers that it finds for its toarray()
# seen: what rests on squared entries forgets the sum: a word that is counted twice adds 1 + 1, not 4. euclidean_distances, cosine_similarity, rbf_kernel, NearestNeighbors, normalize, TfidfTransformer, VarianceThreshold and f_classif give other numbers than for the same matrix after sum_duplicates(), silently; cosines of a row with itself are not 1, and a row is not its own nearest neighbour. MaxAbsScaler sums first
# ours: DiffusionMap(affinity="precomputed") sums entries before it checks or uses them (packages/flashdiffusion/tests/test_graph.py, test_a_matrix_of_the_callers)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6

cat >"$work/words.py" <<'PY'
import numpy as np
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.feature_selection import VarianceThreshold, f_classif
from sklearn.metrics.pairwise import cosine_similarity, euclidean_distances, rbf_kernel
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import MaxAbsScaler, normalize


def words():
    """The example of scipy.sparse.csr_array: terms counted by naming their places."""
    texts = ["hello hello hello hello world", "goodbye cruel world", "hello cruel hello",
             "world hello", "goodbye goodbye"]
    indptr, indices, data, vocabulary = [0], [], [], {}
    for text in texts:
        for term in text.split():
            indices.append(vocabulary.setdefault(term, len(vocabulary)))
            data.append(1.0)
        indptr.append(len(indices))
    return csr_array((data, indices, indptr), shape=(5, 4))


def neighbours(X):
    return NearestNeighbors(n_neighbors=2, algorithm="brute").fit(X).kneighbors(X)[0]  # distances


calls = {
    "euclidean_distances": euclidean_distances,
    "cosine_similarity": cosine_similarity,
    "rbf_kernel": rbf_kernel,
    "NearestNeighbors": neighbours,
    "normalize": normalize,
    "TfidfTransformer": lambda X: TfidfTransformer().fit_transform(csr_array(X)),
    "VarianceThreshold": lambda X: VarianceThreshold().fit(X).variances_,
    "f_classif": lambda X: f_classif(X, [0, 1, 0, 0, 1])[0],
    "MaxAbsScaler": lambda X: MaxAbsScaler().fit_transform(X),
}
dense = words().toarray()
assert dense[0].tolist() == [4, 1, 0, 0]
for name, call in calls.items():
    summed = words()
    summed.sum_duplicates()
    given, wanted, again = (x.toarray() if hasattr(x, "toarray") else x
                            for x in (call(words()), call(dense), call(summed)))
    off = np.abs(given - wanted).max()
    print(f"{name}: {off:.3g} off")
    assert np.allclose(again, wanted) and (off > 0.1) == (name != "MaxAbsScaler")
itself = cosine_similarity(words()).diagonal()
print("cosines of rows with themselves:", itself.round(2))
PY
"$work/venv/bin/python" "$work/words.py"
