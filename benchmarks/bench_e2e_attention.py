"""diffmax inside attention, with its peers: python -m benchmarks.bench_e2e_attention [--quick]."""

import sys

from .__main__ import main

if __name__ == "__main__":
    raise SystemExit(main(["--only", "diffmax/attention", *sys.argv[1:]]))
