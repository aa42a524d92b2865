"""Scripts that make the package's bundled data; no part of the package."""
