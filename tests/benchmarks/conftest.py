"""The benchmarks are scripts beside the package; tests import their modules as the scripts do."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
