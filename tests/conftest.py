"""Tests run from anywhere: the six scripts are one folder up."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import squeeze  # noqa: E402

squeeze.keep_freed_memory()
