"""Concepts: directions and units that stand for them, what depends on them, their erasure, and attribution through them.

sets = [stop_at(f, site)(params, images).mean((-2, -1)) for images in (stripes, *random_sets)]
vectors = cav(sets[0], sets[1:])                                             # one for each random set
chance = cav(sets[2:], sets[1])                                              # random against random
scores, by_chance = (tcav(f, params, zebras, site, v, targets=340, axis=1).sign_count for v in (vectors, chance))
tcav_significance(scores, by_chance).p_value

intervene(f, {site: leace(activations, labels)})                             # a model that does not know the labels
saliency(through_direction(f, site, vectors.direction[0], axis=1), params, zebras, targets=340)
"""

from .concept_vectors import ConceptVectors, cav, pattern_cav
from .conditional import through_direction, through_units
from .covariances import Covariances, covariances, merge_covariances, update_covariances
from .erasure import Eraser, leace, mean_projection, project_out
from .nullspace import iterative_nullspace_projection
from .selection import UnitSelection, select_units
from .significance import Significance, tcav_significance
from .tcav import ConceptSensitivity, tcav

__all__ = [
    "ConceptSensitivity",
    "ConceptVectors",
    "Covariances",
    "Eraser",
    "Significance",
    "UnitSelection",
    "cav",
    "covariances",
    "iterative_nullspace_projection",
    "leace",
    "mean_projection",
    "merge_covariances",
    "pattern_cav",
    "project_out",
    "select_units",
    "tcav",
    "tcav_significance",
    "through_direction",
    "through_units",
    "update_covariances",
]
