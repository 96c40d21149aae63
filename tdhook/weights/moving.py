"""The parameters that a method differentiates or moves, and `params` with others in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from ..core.errors import InputError, ParamsError
from ..core.functional import FunctionalModel
from ..core.structure import describe
from .selection import Key, Select, flat, nest, parameter_name, replaced, require_params, select_parameters


@dataclass(frozen=True)
class Moving:
    """Some tensors of `params`.

    Attributes:
        params: all of them.
        chosen: the moving ones under their paths.
    """

    params: TensorDictBase
    chosen: Mapping[Key, Tensor]

    @property
    def values(self) -> list[Tensor]:
        return list(self.chosen.values())

    def put(self, values: Sequence[Tensor]) -> TensorDict:
        """`params` with others in the place of the moving ones; what was given stays as it is."""
        return replaced(self.params, dict(zip(self.chosen, values)))

    def restructure(self, results: Sequence[Tensor], lead: Sequence[int] = ()) -> TensorDict:
        """A nested TensorDict of one result for each moving tensor, with leading dimensions `lead`."""
        return nest(dict(zip(self.chosen, results)), lead)

    def flatten(self, name: str, given: Any) -> list[Tensor]:
        """The tensors of an argument that has the structure and the shapes of the moving ones."""
        if not isinstance(given, TensorDictBase):
            raise InputError(f"{name} is {describe(given)}; give a TensorDict like the selected parameters.")
        found = flat(given)
        for key in (*self.chosen, *found):
            if key not in found:
                raise InputError(f"{name} has no {parameter_name(key)!r}; give a tensor for each selected parameter.")
            if key not in self.chosen:
                raise InputError(
                    f"{name} has {parameter_name(key)!r}, which is a buffer or not selected; leave it out: "
                    f"{name}.exclude({key!r})."
                )
            if found[key].shape != self.chosen[key].shape or found[key].dtype != self.chosen[key].dtype:
                raise InputError(
                    f"{name} holds {describe(found[key])} at {parameter_name(key)!r}, the parameter is "
                    f"{describe(self.chosen[key])}; give one like it."
                )
        return [found[key] for key in self.chosen]


def moving(f: Any, params: Any, select: Select = None, *, buffers: bool = False) -> Moving:
    """The selected floating-point tensors, without the buffers of a functional model unless `buffers`.

    Raises:
        ParamsError: params that are no TensorDict of one model, a name that is unknown, nothing left to move.
    """
    require_params("params", params, single=True)
    chosen = select_parameters(params, select)
    if not buffers and isinstance(f, FunctionalModel):
        owners = f.base.blueprint.tensor_names
        trained = {key: t for key, t in chosen.items() if key not in owners or owners[key][0][1] != "_buffers"}
        if not trained:
            raise ParamsError(f"select={select!r} names buffers only, which are not trained; name parameters.")
        chosen = trained
    return Moving(params, chosen)
