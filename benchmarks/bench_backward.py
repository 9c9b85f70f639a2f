"""diffmax backward, against its peers: python -m benchmarks.bench_backward [--quick]."""

import sys

from .__main__ import main

if __name__ == "__main__":
    raise SystemExit(main(["--only", "diffmax/backward", *sys.argv[1:]]))
