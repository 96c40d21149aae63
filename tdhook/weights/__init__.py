"""Weights as data: scores, pruning, adapters, task vectors and merging, as pure maps of parameters."""
