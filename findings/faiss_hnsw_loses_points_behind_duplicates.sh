#!/usr/bin/env bash
# package: faiss-cpu 1.15.1
# date: 2026-11-30
# expected: an HNSW graph that finds 98 % of the ten nearest neighbours still does so when some of the points are equal (empty cells, padded rows, repeated frames): a search for one of the other points cannot be harmed by them, and a search for a point of the index finds at least that point
# seen: with 4000 points equal to the mean of 16 000 random ones, a search for one of the random ones finds less than a tenth of its neighbours, and itself in one of six cases, in whatever order they came, without a warning or an index of -1; efSearch=128 does not mend it. The links of equal points go to equal points, and the search does not leave them
# ours: DiffusionMap(neighbors=k, search="faiss") builds its graph of the distinct points (packages/flashdiffusion/tests/test_graph.py, test_faiss_finds_its_way_past_equal_points); search="exact" and "tree" know no such graph
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q faiss-cpu==1.15.1 numpy==2.4.6

cat >"$work/duplicates.py" <<'PY'
import faiss
import numpy as np

faiss.omp_set_num_threads(1)
N, EQUAL, K = 20_000, 4_000, 10
rng = np.random.default_rng(0)
distinct = rng.normal(size=(N, 20)).astype(np.float32)
equal_first = distinct.copy()
equal_first[:EQUAL] = 0
shuffled = equal_first[rng.permutation(N)]


def found(points, ef):
    """Shares of the neighbours of other points, and of these points themselves."""
    others = np.flatnonzero(points.any(1))[-2000:]
    exact = faiss.IndexFlatL2(20)
    exact.add(points)
    graph = faiss.IndexHNSWFlat(20, 32)
    graph.hnsw.efSearch = ef
    graph.add(points)
    wanted, got = (index.search(points[others], K)[1] for index in (exact, graph))
    assert (wanted[:, 0] == others).all() and (got >= 0).all()
    hits = [len(set(a) & set(b)) / K for a, b in zip(wanted, got)]
    return np.mean(hits), (got == others[:, None]).any(1).mean()


for name, points, ef, least, most in (
    ("all distinct", distinct, 16, 0.95, 1),
    ("4000 equal, in front", equal_first, 16, 0, 0.5),
    ("4000 equal, shuffled", shuffled, 16, 0, 0.5),
    ("the same, efSearch 128", shuffled, 128, 0, 0.5),
):
    neighbours, itself = found(points, ef)
    print(f"{name}: {neighbours:.0%} of the neighbours, {itself:.0%} of the points themselves")
    assert least <= neighbours <= most
PY
"$work/venv/bin/python" "$work/duplicates.py"
