"""Circuits: the graph of a residual stream, one masked forward over its edges, and what can be computed with it."""

from .acdc import acdc
from .circuit import Circuit, edge_overlap, top_edges
from .discovery import edge_graph
from .edge_attribution import eap, eap_ig
from .edge_patching import edge_patching
from .evaluation import CircuitMetric, completeness, evaluate, faithfulness, kl_divergence_from, mean_over_pairs
from .graph import EdgeGraph, Reader, Writer
from .masking import mask_edges
from .written import mean_values, writer_values

__all__ = [
    "Circuit",
    "CircuitMetric",
    "EdgeGraph",
    "Reader",
    "Writer",
    "acdc",
    "completeness",
    "eap",
    "eap_ig",
    "edge_graph",
    "edge_overlap",
    "edge_patching",
    "evaluate",
    "faithfulness",
    "kl_divergence_from",
    "mask_edges",
    "mean_over_pairs",
    "mean_values",
    "top_edges",
    "writer_values",
]
