"""Lenses: what the activations of a model say when they are read as vocabulary."""
