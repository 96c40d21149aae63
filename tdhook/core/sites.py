"""Sites: the addresses of the values inside a model.

    site  := path [":" port]  |  path "/" op [":" port]          an "@" call may stand before the port
    path  := component ("." component | "[" int, slice or "quoted name" "]")*
    port  := ("out" | "in") ("[" int, name or "quoted name" "]")*

Examples:
    >>> Site.parse("h[3].mlp:out")
    Site('h.3.mlp')
    >>> Site.parse("lstm:out[1][0]").keys
    (1, 0)
    >>> Site.parse("h.0.attn/softmax@2:in").call
    2

A path that holds `*` (anything inside one component), `**` (any depth), a slice or a negative index is a pattern. `Tree`
knows the module paths of one model and resolves addresses and patterns against them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Union

from torch import nn

from .compat import is_compiling
from .errors import SiteError, did_you_mean

SiteLike = Union[str, "Site", re.Pattern, Callable[[str], bool]]

_PLAIN = re.compile(r"[A-Za-z0-9_\-]+\Z")
_TOKEN = re.compile(
    r"""(?P<dot>\.)?(?P<name>[A-Za-z0-9_\-*]+)
      | \[(?P<index>-?\d{1,9})\]
      | \[(?P<slice>(?:-?\d{1,9})?:(?:-?\d{1,9})?(?::(?:-?\d{1,9})?)?)\]
      | (?P<qdot>\.)?\["(?P<quoted>(?:[^"\\]|\\["\\])*)"\]""",
    re.VERBOSE,
)
_PATH_END = re.compile(r"""(?:[^"/@:\[]|\["(?:[^"\\]|\\["\\])*"\]|\[[^"\]]*\])*""")
_KEY = re.compile(r"""\[(?:(?P<index>-?\d{1,9})|"(?P<quoted>(?:[^"\\]|\\["\\])*)"|(?P<name>[^\[\]"]+))\]""")
_TAIL = re.compile(r"(?:/(?P<op>[A-Za-z_]\w*|\*))?(?:@(?P<call>\d{1,9}|\*))?(?::(?P<port>in|out)(?P<keys>.*))?\Z", re.DOTALL)


@dataclass(frozen=True)
class Index:
    """`[-1]`: a numbered child, counted from the end."""

    value: int

    def __str__(self) -> str:
        return f"[{self.value}]"


@dataclass(frozen=True)
class Slice:
    """`[2:8:2]`: the numbered children in a range."""

    start: int | None
    stop: int | None
    step: int | None

    def __str__(self) -> str:
        bounds = [self.start, self.stop] + ([self.step] if self.step is not None else [])
        return f"[{':'.join('' if b is None else str(b) for b in bounds)}]"


@dataclass(frozen=True)
class Glob:
    """`*`, `attn*`, `**`: a wild card."""

    value: str

    def __str__(self) -> str:
        return self.value


Component = str | Index | Slice | Glob


@dataclass(frozen=True, repr=False)
class Site:
    """The address of one value (or, with wild cards, of several).

    Attributes:
        path: components of the module path; empty for the model itself.
        op: name of an operation inside that module (`"relu"`, `"softmax"`), or None for the module's own values.
        call: which call of the module or operation, counted from 0; `"*"` for each; None when there is only one.
        port: `"out"` or `"in"`.
        keys: where in a structured value the tensor lies, from the outside in.
    """

    path: tuple[Component, ...] = ()
    op: str | None = None
    call: int | str | None = None
    port: str = "out"
    keys: tuple[int | str, ...] = ()

    @staticmethod
    def parse(text: str) -> Site:
        """Reads an address. Raises `SiteError` that names the place where it stops making sense."""
        if not isinstance(text, str):
            fix = f"; take its site, {str(text.site)!r}" if isinstance(getattr(text, "site", None), (str, Site)) else ""
            raise SiteError(f"a site is a string such as 'h.3.mlp:in', got {text!r} of type {type(text).__name__}{fix}.")
        if not text.strip():
            raise SiteError("the site is empty; the output of the model itself is ':out', its input ':in'.")
        text = text.strip()
        split = _PATH_END.match(text).end()  # type: ignore[union-attr]  # it matches the empty string at least
        tail = _TAIL.match(text[split:])
        keys = _parse_keys(tail["keys"] or "") if tail else None
        if tail is None or keys is None:
            raise SiteError(
                f"site {text!r} is malformed at {text[split:]!r}; "
                "after the path come '/op', '@call' and ':in' or ':out' with [index] or [name], in this order."
            )
        call = tail["call"]
        return Site(
            path=_parse_path(text, text[:split]),
            op=tail["op"],
            call=call if call in (None, "*") else int(call),
            port=tail["port"] or "out",
            keys=keys,
        )

    def __str__(self) -> str:
        return _print(self) if is_compiling() else _remembered(self)  # Dynamo warns of a cache

    def __repr__(self) -> str:
        return f"Site({str(self)!r})"

    @property
    def is_pattern(self) -> bool:
        """Whether the address may stand for several values."""
        return self.op == "*" or self.call == "*" or any(isinstance(c, (Glob, Slice)) for c in self.path)


def _print(site: Site) -> str:
    text = join_path(site.path)
    text += f"/{site.op}" if site.op else ""
    text += f"@{site.call}" if site.call is not None else ""
    if site.port != "out" or site.keys or not text:
        text += f":{site.port}" + "".join(map(_print_key, site.keys))
    return text


_remembered = functools.lru_cache(maxsize=2**16)(_print)


def _parse_path(text: str, path: str) -> tuple[Component, ...]:
    components: list[Component] = []
    place = 0
    while place < len(path):
        token = _TOKEN.match(path, place)
        if token is None or (bool(token["dot"]) != bool(components) and token["name"] is not None):
            raise SiteError(
                f"site {text!r} is malformed at {path[place:]!r}; a path reads 'h.3.mlp', 'h[-1].mlp', 'h[2:8]', "
                "'h.*.mlp', '**.mlp' or 'blocks[\"odd name\"]'."
            )
        if token["name"] is not None:
            name = token["name"]
            components.append(Glob(name) if "*" in name else name)
        elif token["index"] is not None:
            index = int(token["index"])
            components.append(str(index) if index >= 0 else Index(index))
        elif token["slice"] is not None:
            bounds = [int(b) if b else None for b in token["slice"].split(":")]
            if bounds[2:] == [0]:
                raise SiteError(f"site {text!r} has a slice of step 0; take 1 or more.")
            components.append(Slice(*bounds, *([None] * (3 - len(bounds)))))
        else:
            components.append(_unescape(token["quoted"]))
        place = token.end()
    return tuple(components)


def _parse_keys(text: str) -> tuple[int | str, ...] | None:
    """The keys in `[0][name]["odd name"]`; None when it is something else."""
    keys: list[int | str] = []
    place = 0
    while place < len(text):
        key = _KEY.match(text, place)
        if key is None:
            return None
        keys.append(int(key["index"]) if key["index"] else key["name"] or _unescape(key["quoted"]))
        place = key.end()
    return tuple(keys)


def _print_key(key: int | str) -> str:
    plain = _KEY.fullmatch(f"[{key}]")
    if isinstance(key, int) or (plain and plain["name"]):
        return f"[{key}]"
    return f'["{_escape(key)}"]'


def _escape(name: str) -> str:
    return name.replace("\\", "\\\\").replace('"', '\\"')


def _unescape(quoted: str) -> str:
    return re.sub(r"\\(.)", r"\1", quoted)


def join_path(components: Iterable[Component]) -> str:
    """The canonical spelling of a path.

    Examples:
        >>> join_path(("h", "3", "odd name"))
        'h.3["odd name"]'
    """
    text = ""
    for component in components:
        if isinstance(component, str) and not _PLAIN.match(component):
            text += f'["{_escape(component)}"]'
        elif isinstance(component, (Index, Slice)):
            text += str(component)
        else:
            text += f".{component}" if text else str(component)
    return text


@dataclass(frozen=True)
class Want:
    """One resolved request: a module path of the model and what is wanted there.

    `site` is the address that names the result; `exact` is False when a pattern asked, which then takes every call and every
    tensor of a structured value.
    """

    site: Site
    request: str
    exact: bool


@dataclass(frozen=True)
class Tree:
    """The module paths of one model, in registration order; `aliases` maps further paths of a shared module to its first."""

    paths: tuple[tuple[str, ...], ...]
    aliases: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)

    def resolve(self, sites: SiteLike | Sequence[SiteLike]) -> tuple[Want, ...]:
        """Every request as `Want`s with literal module paths, without duplicates. Raises `SiteError` for unknown ones."""
        if isinstance(sites, (str, nn.Module)) or not isinstance(sites, Iterable):
            sites = [sites]
        wants: dict[tuple[Site, bool], Want] = {}
        for request in sites:
            for want in self._resolve_one(request):
                wants.setdefault((want.site, want.exact), want)
        if not wants:
            raise SiteError("no site was given; pass at least one, such as 'h.3.mlp'.")
        return tuple(wants.values())

    def _resolve_one(self, request: SiteLike) -> list[Want]:
        if isinstance(request, nn.Module):
            raise SiteError(f"a site is a string such as 'h.3.mlp:in', got the module {type(request).__name__}; give its path.")
        if isinstance(request, re.Pattern) or (callable(request) and not isinstance(request, Site)):
            match = request.fullmatch if isinstance(request, re.Pattern) else request
            shown = repr(request.pattern) if isinstance(request, re.Pattern) else repr(request)
            found = [Want(Site(path), shown, False) for path in self.paths if path and match(join_path(path))]
            if not found:
                raise SiteError(f"no module path of the model matches {shown}; the model has {self._examples()}.")
            return found
        site = request if isinstance(request, Site) else Site.parse(request)
        everywhere = dict.fromkeys(self.paths) | dict.fromkeys(self.aliases)
        matches = [path for path in everywhere if _match(site.path, path, self._numbered)]
        if not matches:
            name = join_path(site.path)
            raise SiteError(
                f"unknown site {str(site)!r}: the model has no module {name!r}."
                + (did_you_mean(name, (join_path(p) for p in everywhere if p)) or f" It has {self._examples()}.")
            )
        canonical = dict.fromkeys(self.aliases.get(path, path) for path in matches)
        return [Want(replace(site, path=path), str(site), not site.is_pattern) for path in canonical]

    def _numbered(self, parent: tuple[str, ...]) -> list[str]:
        """The numbered children of a module, in order."""
        depth = len(parent)
        names = {p[depth] for p in (*self.paths, *self.aliases) if len(p) > depth and p[:depth] == parent}
        return sorted((n for n in names if n.isdecimal()), key=int)

    def _examples(self) -> str:
        names = [repr(join_path(p)) for p in self.paths if p]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "no submodules"


def _match(pattern: tuple[Component, ...], path: tuple[str, ...], numbered: Callable, depth: int = 0) -> bool:
    """Whether `path[depth:]` matches `pattern`."""
    if not pattern:
        return depth == len(path)
    head, rest = pattern[0], pattern[1:]
    if isinstance(head, Glob) and head.value == "**":
        return any(_match(rest, path, numbered, d) for d in range(depth, len(path) + 1))
    if depth == len(path):
        return False
    name = path[depth]
    if isinstance(head, Glob):
        fits = fnmatchcase(name, head.value)
    elif isinstance(head, Index):
        children = numbered(path[:depth])
        fits = -head.value <= len(children) and name == children[head.value]
    elif isinstance(head, Slice):
        fits = name in numbered(path[:depth])[head.start : head.stop : head.step]
    else:
        fits = name == head
    return fits and _match(rest, path, numbered, depth + 1)
