"""Lets the API pages show what a package exports where a module of it has the same name.

`from .saliency import saliency` makes `tdhook.attribution.saliency` the function. Griffe, which reads the sources without
running them, takes it for the module, and leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import griffe


class SameNames(griffe.Extension):
    """Puts what is exported in the place of the module with its name."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        modules = list(_modules(pkg))
        for module in modules:
            for member in module.members.values():
                if member.is_alias and member.target_path.startswith(f"{pkg.name}."):
                    member.resolve_target()  # now: on its way there are modules that will be hidden
        for module in modules:
            for name in module.exports or ():
                hidden = module.members.get(str(name))
                if hidden is None or hidden.is_alias or not hidden.is_module or str(name) not in hidden.members:
                    continue
                found = hidden.members[str(name)]
                target = found.final_target if found.is_alias else found
                module.members[str(name)] = griffe.Alias(str(name), target, parent=module)


def _modules(module: griffe.Module) -> Iterator[griffe.Module]:
    yield module
    for each in module.modules.values():
        if not each.is_alias:
            yield from _modules(each)
