"""What a table of rules means for a model, before anything is computed: `explain`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...core.errors import RuleError
from ...core.kinds import LINEAR_GROUPS
from ...core.plan import Planned, is_nonlinear
from ...core.rules import Rule
from ...core.ruling import Ruled, with_rules


@dataclass(frozen=True)
class Line:
    """One operation that depends on the input.

    Attributes:
        site: its address.
        group: what it is; see `tdhook.core.kinds.GROUPS`.
        rule: its rule, printed; `"gradient"` for none.
        absorbs: what takes up relevance there.
        live: whether the output depends on it; what a rule has cut off does not count.
        nonlinear: it has no rule, and its gradient times its operand is not what it is worth.
    """

    site: str
    group: str
    rule: str
    absorbs: str
    live: bool
    nonlinear: bool


@dataclass(frozen=True, repr=False)
class Report:
    """The operations of a model in the order in which they run, each with its rule. `print` shows it as a table."""

    lines: tuple[Line, ...]

    @property
    def without_rule(self) -> list[str]:
        """The sites of non-linear operations that no line of the table is for."""
        return [line.site for line in self.lines if line.nonlinear]

    def __iter__(self) -> Iterator[Line]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    def __repr__(self) -> str:
        return f"Report({len(self.lines)} operations, {len(self.without_rule)} non-linear ones without a rule)"

    def __str__(self) -> str:
        shown = [line for line in self.lines if line.group != "shape" or line.rule != "gradient"]
        rows = [("operation", "group", "rule", "absorbs")]
        for line in shown:
            note = line.absorbs if line.live else "(the output does not depend on it)"
            rows.append((line.site, line.group, line.rule + (" (no rule!)" if line.nonlinear else ""), note))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join("  ".join((*(f"{c:<{w}}" for c, w in zip(row, widths)), row[3])).rstrip() for row in rows)


def explain(f: Any, params: Any, inputs: Any, rules: Any = None, *, strict: bool = False) -> Report:
    """Which operation gets which rule, and where relevance is absorbed.

    Args:
        f: functional model, with rules or without.
        params: its parameters; only shapes matter.
        inputs: as `f` takes them.
        rules: a table of rules; None for those that `f` has.
        strict: raise if a non-linear operation has no rule.

    Returns:
        A `Report`, with one line for each operation that depends on the input.

    Raises:
        RuleError: as `with_rules`; with `strict`, a non-linear operation without a rule.

    Cost: one run on fake tensors.

    Examples:
        >>> from tdhook.attribution.rules import epsilon_plus, explain
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
        >>> print(explain(f, params, torch.ones(1, 3), epsilon_plus()))
        operation  group       rule                    absorbs
        0/linear   linear      Epsilon(epsilon=1e-06)  bias, epsilon
        1/relu     activation  Pass(stabilizer=1e-09)
    """
    if rules is None and not isinstance(f, Ruled):
        raise RuleError("rules is None, and f has none; give a table of rules, or what tdhook.with_rules returned.")
    ruled = f if rules is None else with_rules(f, rules)
    plan: Any = ruled.plan(params, inputs)
    lines = [
        (planned, None if planned.line is None else ruled.rules.entries[planned.line].rule) for planned in plan.table.values()
    ]
    report = Report(tuple(_line(planned, rule) for planned, rule in lines))
    if strict and report.without_rule:
        raise RuleError(
            f"{len(report.without_rule)} non-linear operations have no rule: {', '.join(report.without_rule[:6])}; add lines "
            "for them, with Gradient() where the gradient is meant."
        )
    return report


def _line(planned: Planned, rule: Rule | None) -> Line:
    return Line(
        planned.site,
        planned.group,
        "gradient" if rule is None else repr(rule),
        _absorbs(planned, rule),
        planned.live,
        rule is None and is_nonlinear(planned),
    )


def _absorbs(planned: Planned, rule: Rule | None) -> str:
    if rule is not None and rule.stops:
        return "all"
    taken = ["bias"] if planned.has_constant else []
    if planned.group in LINEAR_GROUPS and (getattr(rule, "epsilon", None) or getattr(rule, "stabilizer", None)):
        taken += ["epsilon"]
    if planned.group == "softmax" or (planned.group == "attention" and getattr(rule, "query", None) != 0):
        taken += ["softmax"]
    if planned.group == "normalization" and rule is None:
        taken += ["all: its gradient conserves nothing"]
    return ", ".join(taken)
