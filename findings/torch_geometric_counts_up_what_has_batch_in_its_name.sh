#!/usr/bin/env bash
# package: torch_geometric 2.8.1 (torch 2.13.0)
# date: 2026-11-30
# expected: a tensor that is stored with a graph (the batch that a sample was measured in, an index of refraction) has in a mini-batch the values that it has in the graphs; the tutorial on mini-batching says that edge_index is counted up by the number of nodes
# seen: DataLoader and Batch.from_data_list count up whatever has "batch" in its name, by the largest value of the graphs before and 1, and whatever has "index" in it by their nodes, floating-point values, too: batch_effect 1, 1, 1 becomes 1, 3, 5 and index_of_refraction 1.33, 1.33, 1.33 becomes 1.33, 4.33, 8.33, in the order of the shuffle. One graph of the batch (batch[i], to_data_list) has the right value again, so a look at graphs shows nothing
# ours: nothing; no package of ours takes such objects
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy torch_geometric==2.8.1

cat >"$work/batch.py" <<'PY'
import torch
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

GIVEN = {"batch_effect": 1, "subbatch_mean": 0.5, "index_of_refraction": 1.33, "effect": 1}
graphs = [
    Data(x=torch.zeros(n, 1), edge_index=torch.zeros(2, 0, dtype=torch.long),
         **{name: torch.tensor([value]) for name, value in GIVEN.items()})
    for n in (3, 4, 5)
]
batch = next(iter(DataLoader(graphs, batch_size=3)))
seen = {
    "batch_effect": [1, 3, 5],
    "subbatch_mean": [0.5, 1.5, 2.5],
    "index_of_refraction": [1.33, 4.33, 8.33],
    "effect": [1, 1, 1],
}
for name, wrong in seen.items():
    print(f"{name}: {GIVEN[name]} in each graph, {batch[name].tolist()} in their batch")
    torch.testing.assert_close(batch[name], torch.tensor(wrong))
    for graph in batch.to_data_list():
        torch.testing.assert_close(graph[name], torch.tensor([GIVEN[name]]))
PY
"$work/venv/bin/python" "$work/batch.py"
