"""What a stranger does first with an installed wheel, away from the repository.

Run by ``make dist-check`` in an environment that holds the wheel and what it depends on.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import mi_hops
from mi_hops.model import bundled_models

where = Path(mi_hops.__file__).parent
assert where.is_relative_to(sys.prefix), f"{where} is not the installed package"
assert importlib.metadata.version("mi-hops") == mi_hops.__version__
assert {"hops-gpt2", "hops-llama", "planted-serial-0"} <= set(bundled_models())
for name in bundled_models():
    assert mi_hops.load_model(name).cfg.n_layers > 0
assert len(mi_hops.load_facts("geo")) > 8000

command = Path(sys.executable).with_name("mi-hops")
with tempfile.TemporaryDirectory() as out:
    options = ["--sizes", "quick", "--limit", "12", "--out", f"{out}/study", "--quiet"]
    subprocess.run([command, "study", *options], check=True)
    report = Path(out, "study", "report.html")
    assert report.stat().st_size > 10_000
print(f"mi_hops {mi_hops.__version__} works from its wheel")
