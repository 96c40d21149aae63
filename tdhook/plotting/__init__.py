"""Pictures of results. Needs the extra `plot`; `import tdhook` does not import it.

Functions that draw return a `matplotlib.figure.Figure` of their own, which pyplot does not know about: nothing is shown,
nothing has to be closed, and no global setting changes. Save one with `figure.savefig("name.png")`; a notebook shows
what a cell returns. `tokens_html` and `tokens_terminal` return strings and need no matplotlib.
"""

from .curves import curves
from .galleries import heat_map_gallery
from .images import heat_map_over_image, heat_maps_over_image
from .matrices import matrix_map
from .sites import site_position_map, site_position_maps
from .tokens import token_matrix, tokens_html, tokens_terminal

__all__ = [
    "curves",
    "heat_map_gallery",
    "heat_map_over_image",
    "heat_maps_over_image",
    "matrix_map",
    "site_position_map",
    "site_position_maps",
    "token_matrix",
    "tokens_html",
    "tokens_terminal",
]
