"""diffmax forward, against its peers: python -m benchmarks.bench_forward [--quick]."""

import sys

from .__main__ import main

if __name__ == "__main__":
    raise SystemExit(main(["--only", "diffmax/forward", *sys.argv[1:]]))
