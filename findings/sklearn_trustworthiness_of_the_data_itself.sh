#!/usr/bin/env bash
# package: scikit-learn 1.9.1
# date: 2026-11-30
# expected: sklearn.manifold.trustworthiness(X, X) is 1: every neighbour in the output is one in the input, and its page penalises only unexpected neighbours, by their rank in the input; the order of the samples does not matter
# seen: where distances are equal (counts, bits, repeated rows) neighbours in the output come from one search and ranks in the input from another sort, and what differs in a tie is penalised: sparse counts of 300 samples are worth 0.906 as a picture of themselves, and 0.904 in reverse order. Sorted stably on both sides the formula gives 1
# ours: nothing; no figure of ours rests on it
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6

cat >"$work/trust.py" <<'PY'
import numpy as np
from sklearn.manifold import trustworthiness
from sklearn.metrics import pairwise_distances


def formula(X, Y, k=5):
    """1 - 2 / (n k (2n - 3k - 1)) sum of max(0, rank - k), ties by the number of the sample."""
    n = len(X)
    order = []
    for points in (X, Y):
        D = pairwise_distances(points)
        np.fill_diagonal(D, np.inf)
        order.append(np.argsort(D, axis=1, kind="stable"))
    rank = np.empty((n, n), dtype=int)
    np.put_along_axis(rank, order[0], np.arange(1, n + 1)[None], 1)
    excess = np.take_along_axis(rank, order[1][:, :k], 1) - k
    return 1 - 2 / (n * k * (2 * n - 3 * k - 1)) * excess.clip(min=0).sum()


rng = np.random.default_rng(0)
for name, X, most in (
    ("normal points", rng.normal(size=(300, 6)), 1.0),
    ("sparse counts", rng.poisson(0.05, (300, 6)).astype(float), 0.95),
    ("ten copies of 30 points", np.repeat(rng.normal(size=(30, 6)), 10, 0), 0.999),
):
    there, back = trustworthiness(X, X), trustworthiness(X[::-1], X[::-1])
    print(f"{name}: {there:.4f}, in reverse order {back:.4f}, ties by number {formula(X, X):.3f}")
    assert formula(X, X) == formula(X[::-1], X[::-1]) == 1
    assert there == back == 1 if most == 1 else there < most
    assert name != "sparse counts" or there != back
PY
"$work/venv/bin/python" "$work/trust.py"
