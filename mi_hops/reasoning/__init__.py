"""Two-hop reasoning: the gap, erasure of the bridge, locating, and scoring repairs."""
