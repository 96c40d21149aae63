"""Pictures of results. Needs the extra `plot`; `import tdhook` does not import it.

Every function returns a `matplotlib.figure.Figure` of its own, which pyplot does not know about: nothing is shown,
nothing has to be closed, and no global setting changes. Save one with `figure.savefig("name.png")`; a notebook shows
what a cell returns.
"""

from .images import heat_map_over_image, heat_maps_over_image
from .sites import site_position_map, site_position_maps

__all__ = ["heat_map_over_image", "heat_maps_over_image", "site_position_map", "site_position_maps"]
