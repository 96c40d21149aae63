"""Steering: directions that stand for a difference between prompts, and edits that add, remove or set them.

vectors = steering_vectors(f, params, weddings, others, sites="model.layers.*")     # one direction for each block
steered = intervene(f, {"model.layers.14": add(vectors["model.layers.14"], 4.0)})
generate(steered, params, prompt, max_new_tokens=40)                                # it acts at every step
"""

from .components import clamp, project_out, replace_component
from .directions import difference_of_means, principal_difference, probe_direction
from .edits import Edit, add, at, by_step, in_order
from .positions import Where
from .vectors import activation_addition, steering_vectors

__all__ = [
    "Edit",
    "Where",
    "activation_addition",
    "add",
    "at",
    "by_step",
    "clamp",
    "difference_of_means",
    "in_order",
    "principal_difference",
    "probe_direction",
    "project_out",
    "replace_component",
    "steering_vectors",
]
