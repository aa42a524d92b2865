"""``python -m mi_hops`` does what the ``mi-hops`` command does."""

from __future__ import annotations

from mi_hops.cli import app

if __name__ == "__main__":
    app(prog_name="mi-hops")
