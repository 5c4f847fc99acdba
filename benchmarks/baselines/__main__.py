"""`python -m benchmarks.baselines`; see `benchmarks.baselines.compare`."""

from __future__ import annotations

import sys

from benchmarks.baselines.compare import main

if __name__ == "__main__":
    sys.exit(main())
