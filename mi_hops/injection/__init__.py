"""Memory injection: add what a prompt fails to recall to its activations while it runs."""
