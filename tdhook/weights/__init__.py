"""Weights as data: scores, pruning, adapters, task vectors and merging, as pure maps of params."""

from .adapters import CrossLayer, adapt
from .circuit_pruning import Circuit, prune_circuit
from .lora import energy_ranks, lora_from_difference, lora_init, lora_merge, lora_unmerge
from .merging import dare, slerp, ties
from .pruning import Pruned, Units, prune
from .scores import fisher, gradient_x_weight, magnitude, optimal_brain_damage, taylor
from .task_vectors import Strength, add_task_vectors, analogy, choose_strength, task_vector
from .wanda import wanda

__all__ = [
    "Circuit",
    "CrossLayer",
    "Pruned",
    "Strength",
    "Units",
    "adapt",
    "add_task_vectors",
    "analogy",
    "choose_strength",
    "dare",
    "energy_ranks",
    "fisher",
    "gradient_x_weight",
    "lora_from_difference",
    "lora_init",
    "lora_merge",
    "lora_unmerge",
    "magnitude",
    "optimal_brain_damage",
    "prune",
    "prune_circuit",
    "slerp",
    "task_vector",
    "taylor",
    "ties",
    "wanda",
]
