"""Models as pure functions: `functionalize` and the class of everything that it and the transforms return."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import structure
from .compat import is_compiling
from .copying import copy_tree, eager_class
from .errors import InputError, ModelError
from .scope import Frame, Handler, Observer
from .sites import Tree, join_path
from .twin import Twin


class FunctionalModel:
    """A pure function `f(params, inputs)` whose inner values have sites.

    `functionalize` returns one, and so does every transform of one. It is immutable and hashable, holds no parameters, and
    can be closed over, pickled, deep-copied, shared between threads, vmapped and compiled.
    """

    def __call__(self, params: Any, inputs: Any, *extra: Any) -> Any:
        return self._run(params, inputs, extra, Execution())

    @property
    def base(self) -> Functional:
        """The functionalized module at the bottom of all transforms."""
        raise NotImplementedError

    @property
    def tree(self) -> Tree:
        """The module paths that sites are resolved against."""
        return self.base.blueprint.tree

    def key(self) -> tuple:
        """Equal for functional models whose values depend on each other in the same way."""
        raise NotImplementedError

    def _run(self, params: Any, inputs: Any, extra: tuple, execution: Execution) -> Any:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict) -> FunctionalModel:
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a functional model is immutable; cannot set {name!r}.")


class Execution:
    """How one call is carried out: the handlers of the transforms on the way (outermost first), and what surrounds the run."""

    def __init__(
        self,
        handlers: tuple[Handler, ...] = (),
        observer: Observer | None = None,
        substitutes: dict[tuple[str, int], Any] | None = None,
    ):
        self.handlers = handlers
        self.observer = observer
        self.substitutes = substitutes

    def within(self, handler: Handler) -> Execution:
        """The same execution with one more handler, closer to the model."""
        return Execution((*self.handlers, handler), self.observer, self.substitutes)

    def frame(self) -> Frame | None:
        if not self.handlers and self.observer is None and self.substitutes is None:
            return None
        return Frame(self.handlers, self.observer, self.substitutes)


class Functional(FunctionalModel):
    """A functionalized module: `f(params, inputs)` returns what `module(inputs)` returns."""

    def __init__(self, blueprint: Blueprint, constants: Mapping[str, Any]):
        object.__setattr__(self, "blueprint", blueprint)
        object.__setattr__(self, "constants", dict(constants))

    blueprint: Blueprint
    constants: dict[str, Any]

    @property
    def base(self) -> Functional:
        return self

    def key(self) -> tuple:
        return ("model", *((name, id(value)) for name, value in self.constants.items()))

    def _run(self, params: Any, inputs: Any, extra: tuple, execution: Execution) -> Any:
        if extra:
            raise InputError(
                f"f(params, inputs) takes two arguments, got {len(extra)} more; only perturb and start_from add one."
            )
        if not isinstance(params, (TensorDictBase, Mapping)):
            raise InputError(f"params is a TensorDict as functionalize returns it, got {structure.describe(params)}.")
        args, kwargs = self._arguments(inputs)
        return self.blueprint.twin().run(params, args, kwargs, execution.frame())

    def _arguments(self, inputs: Any) -> tuple[tuple, dict]:
        constants = structure.fresh(self.constants) if self.constants else {}
        if isinstance(inputs, Tensor):
            return (inputs.clone(),), constants
        if isinstance(inputs, tuple):
            return structure.fresh(inputs), constants
        if isinstance(inputs, TensorDictBase) and self.blueprint.takes_tensordict:
            return (structure.fresh(inputs),), constants
        if isinstance(inputs, (Mapping, TensorDictBase)):
            named = structure.fresh({str(name): value for name, value in inputs.items()})
            twice = sorted(set(named) & set(constants))
            if twice:
                bound = structure.describe(constants[twice[0]])
                raise InputError(f"inputs has {twice[0]!r}, which functionalize already bound to {bound}.")
            return (), {**named, **constants}
        raise InputError(
            "inputs is a tensor (one positional argument), a tuple (positional arguments) or a mapping (named arguments), "
            f"got {structure.describe(inputs)}; wrap another kind of argument in a tuple: (value,)."
        )

    def __repr__(self) -> str:
        bound = "".join(f", {name}={value!r}" for name, value in self.constants.items())
        return f"functionalize({self.blueprint.name}{bound})"

    def __reduce__(self) -> tuple:
        return Functional, (self.blueprint, self.constants)


class Blueprint:
    """The structure of a model without its parameters; makes one twin per thread."""

    def __init__(self, module: nn.Module, tensor_names: Mapping):
        self.name = type(module).__name__
        self.tensor_names = tensor_names
        self.tree = _tree(module)
        self.takes_tensordict = isinstance(module, TensorDictModuleBase)
        self.stochastic = tuple(_stochastic(module))
        self.kinds = {join_path(path.split(".")) if path else "": type(m).__name__ for path, m in module.named_modules()}
        self.tails: dict[Any, dict] = {}  # what start_from found that it can leave out
        self.plans: dict[Any, Any] = {}  # which operation gets which rule
        self.template = Twin(module, tensor_names)  # never run but by Dynamo, so that it can be copied at any time
        self._threads = threading.local()

    def twin(self) -> Twin:
        """A twin of the current thread that is not at work: a write may call the model that it writes into."""
        if is_compiling():
            # Dynamo traces under a lock of its own, and cannot trace the making of a twin.
            return self.template
        twins = self._threads.__dict__.setdefault("twins", [])
        for twin in twins:
            if twin.cell.written is None:
                return twin
        twins.append(Twin(self.template.root, self.tensor_names))
        return twins[-1]

    def writes(self) -> int:
        """How many attributes the runs that are at work in this thread have set so far."""
        twins = (self.template,) if is_compiling() else self._threads.__dict__.get("twins", ())
        return sum(len(twin.cell.written or ()) for twin in twins)

    def __reduce__(self) -> tuple:
        skeleton = copy_tree(self.template.root, eager_class)[self.template.root]
        return Blueprint, (skeleton, self.tensor_names)


def functionalize(model: nn.Module, **constants: Any) -> tuple[Functional, TensorDict]:
    """Turns a module into a pure function and its parameters.

        f, params = functionalize(model);  f(params, inputs) == model(inputs)

    Args:
        model: any eager `nn.Module`, in the mode (train or eval) that it is in now. `torch.compile` and DDP wrappers are taken
            off. It is not touched, and later changes to it do not reach `f`.
        **constants: arguments of `model.forward` that never change, such as `use_cache=False`.

    Returns:
        `f`: takes `(params, inputs)`, where `inputs` is a Tensor (one positional argument), a tuple (positional), or a mapping
        or TensorDict (named; a `TensorDictModule` gets the TensorDict itself).
        `params`: nested TensorDict of the parameters and buffers, detached, sharing the storage of the model's. Tied
        parameters appear once, under their first name.

    Raises:
        ModelError: `model` is not a module, is scripted, or has lazy parameters that were never initialised.

    Cost: no forward pass and no copy of a parameter. A call of `f` costs one forward pass, and one copy of each buffer.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
        >>> f, params = functionalize(model)
        >>> x = torch.randn(5, 3)
        >>> torch.equal(f(params, x), model(x))
        True
    """
    module = _unwrap(model)
    names, tensors = _named_tensors(module)
    params = TensorDict(_nest(tensors), batch_size=[])
    return Functional(Blueprint(module, names), constants), params


def _unwrap(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ModelError(f"functionalize takes an nn.Module, got {structure.describe(model)}.")
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # what torch.compile(module) returns
            model = model._orig_mod
        else:
            break
    for path, module in model.named_modules():
        at = f"submodule {path!r}" if path else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"{at} is a ScriptModule, whose code cannot be reached; pass the eager module it was made from.")
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ModelError(f"{at} is FSDP-sharded, so its parameters are not whole; pass the unsharded module.")
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if is_lazy(tensor):
                raise ModelError(f"{at} has a lazy parameter {name!r}; run the model once before functionalize.")
    return model


def _named_tensors(module: nn.Module) -> tuple[dict[tuple, list], dict[tuple, Tensor]]:
    """For each tensor of a module its first name: all places that hold it (module path, table, attribute), and the tensor."""
    first: dict[int, tuple[str, ...]] = {}
    owners: dict[tuple[str, ...], list] = {}
    tensors: dict[tuple[str, ...], Tensor] = {}
    for table in ("_parameters", "_buffers"):
        for path, submodule in module.named_modules():
            names = tuple(path.split(".")) if path else ()
            for name, tensor in submodule.__dict__[table].items():
                if tensor is None:
                    continue
                key = first.setdefault(id(tensor), (*names, name))
                owners.setdefault(key, []).append((names, table, name))
                tensors.setdefault(key, tensor.detach())
    return owners, tensors


def _nest(tensors: Mapping[tuple[str, ...], Tensor]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, tensor in tensors.items():
        level = nested
        for name in key[:-1]:
            level = level.setdefault(name, {})
        level[key[-1]] = tensor
    return nested


def _tree(module: nn.Module) -> Tree:
    paths: dict[nn.Module, tuple[str, ...]] = {}
    aliases: dict[tuple[str, ...], tuple[str, ...]] = {}
    for path, submodule in module.named_modules(remove_duplicate=False):
        names = tuple(path.split(".")) if path else ()
        if submodule in paths:
            aliases[names] = paths[submodule]
        else:
            paths[submodule] = names
    return Tree(tuple(paths.values()), aliases)


def _stochastic(module: nn.Module) -> Sequence[str]:
    """Paths of modules that make the output random or batch-dependent in the mode that the model is in."""
    return [
        path or "the model"
        for path, m in module.named_modules()
        if m.training
        and (
            (isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0)
            or any("dropout" in name and isinstance(value, float) and value > 0 for name, value in vars(m).items())
            or (isinstance(m, nn.modules.batchnorm._NormBase) and not isinstance(m, nn.modules.instancenorm._InstanceNorm))
        )
    ]
