"""Compile real launches for GPUs that are not there, and hold the result against gates.

A package lists its launches in ``packages/NAME/tests/launches.py``::

    import torch
    from shared_kernels.offline import Launch
    from NAME._triton import configs, forward

    def forward_causal(head_dim):  # called once for every entry of the table, with its head dim
        q = torch.zeros(1, 2, 256, head_dim, dtype=torch.bfloat16)
        forward.launch_forward(q, q, q, is_causal=True)

    LAUNCHES = [Launch("forward causal", forward_causal, table=configs.FORWARD)]

The rules: `run` calls the package's own launcher on CPU tensors (nothing executes, results are
arbitrary, so nothing may branch on values); names are unique in a file; one Launch for each set of
flags that makes other machine code; absolute imports only. A `run` with one parameter gets the
size of each table entry (`largest` for an ANY entry); a `run` without parameters is compiled with
every entry that serves `size`. A table entry that no launch compiles is a failure. Launchers
choose with ``device.target()`` and ``Table.pick``, never with ``.is_cuda``. Head dims above 128
can make "no spill" and "HGMMA" exclude each other: ``hmma_above=128`` gives up the second there.
Try your file with ``python -m shared_kernels.offline packages/NAME/tests/launches.py --targets
sm_90 -v``; ``--report FILE.json`` replaces what was compiled in FILE.json and keeps the rest;
``--summary FILE.json`` shows what the inner loops of a report are made of and what bounds them, by
the model that `model.py` states.

How it works: a stand-in for Triton's driver names the wanted GPU, so that Triton compiles on any
Linux x86_64 machine up to the binary and then launches nothing. Each target has a process of its
own, since one vendor's compiler can abort on the other's code, and a device id of its own, since
Triton caches kernels by it. A process that dies costs the one launch it died in.
"""

from .plan import Item, Launch
from .report import broken_gates, compare
from .run import compile_all, compile_for
from .targets import ALL, MORE, TARGETS

__all__ = [
    "ALL",
    "MORE",
    "TARGETS",
    "Item",
    "Launch",
    "broken_gates",
    "compare",
    "compile_all",
    "compile_for",
]
