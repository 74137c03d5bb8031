"""Binding: every call site gets one callable per token bucket, and every weight one layout."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from dsv3.dispatch.check import Checker
from dsv3.dispatch.decision import CANONICAL, Binding, Decision, Layout
from dsv3.dispatch.firstcall import Assembly
from dsv3.dispatch.node import Node
from dsv3.dispatch.select import Bucket, Candidate, Catalogue, NoKernel, bucket_edges, buckets
from dsv3.dispatch.site import Sites, examples
from dsv3.dispatch.tuning.order import why_not, why_taken
from dsv3.errors import BackendUnavailable
from dsv3.ops import spec
from dsv3.plugin import Backend, Prepared


class Binder:
    """Decides for all sites of a graph that has been recorded."""

    def __init__(
        self,
        chosen: Catalogue,
        reference: Catalogue,
        pinned: Mapping[str, tuple[Catalogue, str]],
        strict: bool = False,
        check: bool = False,
    ) -> None:
        self.chosen = chosen
        self.reference = reference
        self.pinned = pinned
        self.strict = strict
        self.check = check
        # (kernel, operator, `Example.key`) -> why it failed while running.
        self.quarantined: dict[tuple[str, str, Hashable], str] = {}
        self._settled = False
        self._fixed: dict[int, Layout] = {}
        self._banned: set[tuple[int, Layout]] = set()
        self._pins_met: set[str] = set()

    def bind(self, sites: Sites, selection: Mapping[str, Any] | None = None) -> Binding:
        """Fill every recorded site with bound kernels: selected, or as a selection made elsewhere says. Raises
        BackendUnavailable for a pin that cannot be met, or a kernel that is not there."""
        nodes = [(site, Node(site.op, examples(site.op, *site.seen))) for site in sites.all if site.seen[0]]
        catalogues = [self.chosen, *(catalogue for catalogue, _ in self.pinned.values())]
        notes: list[str] = []
        if selection is not None:
            spans: list[Bucket] = [(first, last) for first, last in selection["buckets"]]
            plans = self._restored(selection, [(site.op, site.where, node) for site, node in nodes])
        else:
            calls = [call for _, node in nodes for inner in node.walk() for call in inner.calls]
            spans = buckets(bucket_edges(catalogues, calls))
            plans = self._plans([node for _, node in nodes], spans)
            notes = self._check_pins(spans, plans)
        self._settled = True
        where = [(site.op, site.where, plan) for (site, _), plan in zip(nodes, plans, strict=True)]
        layouts = {w: fixed for w, fixed in self._fixed.items() if fixed != CANONICAL}
        offered = {c.source.name: c.kernels for c in (self.reference, *catalogues)}
        binding = Binding(spans, where, layouts, offered, notes, checker=Checker() if self.check else None)
        assembly = Assembly(self, binding)
        for (site, node), plan in zip(nodes, plans, strict=True):
            site[:] = [_unbound] * len(spans)
            for index, decision in enumerate(plan):
                assembly.place(decision, node, spans[index], site.where, site, index)
            site.seen = [[], []]
        return binding

    def _restored(self, selection: Mapping[str, Any], nodes: list[tuple[str, str, Node]]) -> list[list[Decision]]:
        """The decisions that a selection names, over this process's catalogues."""
        written = {(entry["op"], entry["site"]): entry["plan"] for entry in selection["sites"]}
        if missing := [f"{op} at {where}" for op, where, _ in nodes if (op, where) not in written]:
            raise BackendUnavailable(f"the selection says nothing of {missing[0]}: it was made for another model")
        return [[self._restore(plain, node) for plain in written[op, where]] for op, where, node in nodes]

    def _restore(self, plain: Mapping[str, Any], node: Node) -> Decision:
        rejected = [(kernel, reason) for kernel, reason in plain["rejected"]]
        if name := plain.get("kernel"):
            config = MappingProxyType(dict(plain["config"])) if "config" in plain else None
            offered = ((c.source, kernel) for c in self._catalogues() for kernel in c.kernels.get(node.op, ()))
            every = (Candidate(source, kernel, config=config) for source, kernel in offered)
            found = next((candidate for candidate in every if candidate.name == name), None)
            if found is None:
                hint = "install the same plugins and pass the same pins"
                raise BackendUnavailable(f"the selection runs {node.op} with {name}, which is not here; {hint}")
            return self._take(found, node, plain["why"], rejected, plain["fallback"])
        if cases := plain.get("cases"):
            made = {tuple(shape): self._restore(inner, node.groups[tuple(shape)]) for shape, inner in cases}
            return Decision(node.op, plain["why"], tuple(rejected), cases=made)
        self._require_canonical(node)
        parts = {op: self._restore(inner, node.children[op]) for op, inner in plain["parts"].items()}
        return Decision(node.op, plain["why"], tuple(rejected), parts=parts)

    # -- what the assembly asks while the model runs: layouts are settled then, and weights prepared

    def redecide(self, node: Node, span: Bucket) -> Decision:
        """The decision without what has been quarantined since. Canonical weights can always be had."""
        return self._decide(node, span)

    def layout(self, weight: Prepared) -> Layout:
        """The layout that a recorded weight is prepared in."""
        return self._fixed.get(id(weight), CANONICAL)

    def backend(self, name: str) -> Backend:
        """The backend of this name, of those that take part."""
        return next(c.source.backend for c in self._catalogues() if c.source.name == name)

    def _catalogues(self) -> Iterator[Catalogue]:
        yield from (self.chosen, self.reference, *(catalogue for catalogue, _ in self.pinned.values()))

    # -- deciding

    def _plans(self, nodes: list[Node], spans: list[Bucket]) -> list[list[Decision]]:
        """A decision per node and bucket. Calls that read the most weights go first: a kernel for a whole block chooses the
        layouts, and kernels for its parts follow. Where a weight turns out to be needed in two layouts, the one that is not
        canonical is banned for it, and everything is decided again."""
        order = sorted(range(len(nodes)), key=lambda i: -max(len(call.weights) for call in nodes[i].calls))
        plans: list[list[Decision]] = [[] for _ in nodes]
        while True:
            self._fixed.clear()
            conflicts = len(self._banned)
            self._fix_pinned(nodes, spans)
            for i in order:
                plans[i] = self._plan(nodes[i], spans)
            if len(self._banned) == conflicts:
                return plans

    def _plan(self, node: Node, spans: list[Bucket]) -> list[Decision]:
        """A decision per bucket. Those in which a kernel could take the whole of a composite are decided first: its layouts
        then bind the parts in the others, and not the other way round."""

        def in_parts(index: int) -> bool:
            return all(c.reasons or c.wrong for c in self.chosen.candidates(node.op, node.calls, spans[index]))

        decided = {i: self._decide(node, spans[i]) for i in sorted(range(len(spans)), key=in_parts)}
        return [decided[i] for i in range(len(spans))]

    def _fix_pinned(self, nodes: list[Node], spans: list[Bucket]) -> None:
        """Pinned kernels choose layouts before anybody else."""
        for node in (inner for top in nodes for inner in top.walk() if inner.op in self.pinned):
            catalogue, name = self.pinned[node.op]
            for span in spans:
                for found in catalogue.candidates(node.op, node.calls, span):
                    if found.kernel.name == name and not found.reasons:
                        for _, weight, want in _wants(found, node):
                            if (weight, want) not in self._banned:
                                self._fixed.setdefault(weight, want)

    def _decide(self, node: Node, span: Bucket) -> Decision:
        if len(node.groups) == 1:
            return self._decide_group(node, span)
        cases = {key: self._decide_group(group, span) for key, group in node.groups.items()}
        first = next(iter(cases.values()))
        if all(_same(first, other) for other in cases.values()) and not any(d.cases for d in first.walk()):
            return first
        return Decision(node.op, "decided by shape", (), cases=cases)

    def _decide_group(self, node: Node, span: Bucket) -> Decision:
        rejected: list[tuple[str, str]] = []
        pin = self.pinned.get(node.op)
        if pin is not None:
            catalogue, name = pin
            if found := self._first(catalogue, node, span, rejected, only=name):
                self._pins_met.add(node.op)
                return self._take(found, node, "pinned", rejected)
        if found := self._first(self.chosen, node, span, rejected):
            native = self.chosen is not self.reference
            others = self.chosen.candidates(node.op, node.calls, span) if found.cost is not None else []
            why = why_taken(found, others) if native else "reference backend"
            return self._take(found, node, why, rejected)
        if not self.chosen.kernels.get(node.op):
            rejected.append((self.chosen.source.name, f"offers no kernel for {node.op}"))
        if node.children:
            self._require_canonical(node)
            parts = {op: self._decide(child, span) for op, child in node.children.items()}
            return Decision(node.op, "composite, by its parts", tuple(dict.fromkeys(rejected)), parts=parts)
        found = self._first(self.reference, node, span, rejected)
        if found is None:
            raise NoKernel(f"no kernel for {node.op}, not even the reference: " + "; ".join(f"{k}: {r}" for k, r in rejected))
        if spec(node.op).portable:
            return self._take(found, node, "torch's own, on every device", rejected)
        return self._take(found, node, "fallback: no kernel of the backend is eligible", rejected, fallback=True)

    def _first(
        self, catalogue: Catalogue, node: Node, span: Bucket, rejected: list[tuple[str, str]], only: str | None = None
    ) -> Candidate | None:
        """The first eligible candidate whose layouts agree with what is fixed; the others go to `rejected`."""
        taken: Candidate | None = None
        inside = [] if only is not None else [op for op in self.pinned if op in node.inner]
        for candidate in catalogue.candidates(node.op, node.calls, span):
            if only is not None and candidate.kernel.name != only:
                continue
            last_resort = catalogue is self.reference
            reasons = [
                *self._quarantine(candidate, node),
                *candidate.reasons,
                *([] if last_resort else self._layout_reasons(candidate, node)),
            ]
            reasons += [f"{op} inside it is pinned" for op in inside]
            if candidate.wrong and only is None:
                reasons.append(candidate.wrong)
            if taken is not None and not reasons:
                reasons = [why_not(candidate, taken)]
            if reasons:
                rejected.append((candidate.name, "; ".join(reasons)))
            elif taken is None:
                taken = candidate
        return taken

    def _quarantine(self, candidate: Candidate, node: Node) -> list[str]:
        causes = (self.quarantined.get((candidate.name, node.op, call.key)) for call in node.calls if self.quarantined)
        return [f"quarantined: {cause}" for cause in dict.fromkeys(causes) if cause]

    def _layout_reasons(self, candidate: Candidate, node: Node) -> Iterator[str]:
        for path, weight, want in _wants(candidate, node):
            fixed = self._fixed.get(weight, want)
            if (weight, want) in self._banned:
                yield f"layout {want.name!r} of {path} cannot be read by every kernel that needs the weight"
            elif fixed != want and not (self._settled and want == CANONICAL):
                yield f"{path} is kept as {fixed.name!r}, which another call or the decomposition around it reads"

    def _take(
        self, found: Candidate, node: Node, why: str, rejected: list[tuple[str, str]], fallback: bool = False
    ) -> Decision:
        for _, weight, want in _wants(found, node):
            self._fix(weight, want)
        return Decision(node.op, why, tuple(dict.fromkeys(rejected)), kernel=found, fallback=fallback)

    def _fix(self, weight: int, want: Layout) -> None:
        fixed = self._fixed.setdefault(weight, want)
        if fixed != want and not self._settled:
            self._banned.add((weight, fixed if want == CANONICAL else want))

    def _require_canonical(self, node: Node) -> None:
        """A decomposition that takes a weight apart itself can only read the canonical layout."""
        weights: list[Prepared] = [w for call in node.calls for w in call.weights.values()]
        inner = [w for child in node.children.values() for call in child.calls for w in call.weights.values()]
        own = {id(w) for w in weights}
        for weight in weights:
            if id(weight) not in node.passed_on:
                self._fix(id(weight), CANONICAL)
        for weight in inner:
            if id(weight) not in own:  # made by the decomposition: nobody will ever prepare it
                self._fix(id(weight), CANONICAL)

    def _check_pins(self, spans: list[Bucket], plans: list[list[Decision]]) -> list[str]:
        """Notes on pins that hold for some steps only; BackendUnavailable for one that a call site cannot use at all."""
        notes: list[str] = []
        for op, (catalogue, name) in self.pinned.items():
            pin = f"{catalogue.source.name}.{name}"
            uses = [(span, d) for plan in plans for span, top in zip(spans, plan, strict=True) for d in top.walk()
                    if d.op == op and not d.cases]  # fmt: skip
            reasons = list(dict.fromkeys(r for _, d in uses for k, r in d.rejected if k == pin))
            if not uses:
                raise BackendUnavailable(f"pin {op}={pin} has no effect: this model does not call {op} on its own")
            if op not in self._pins_met or _unmet_site(op, plans):
                raise BackendUnavailable(f"pinned kernel {pin} cannot run {op}: {'; or '.join(reasons) or 'never called'}")
            if lost := list(dict.fromkeys(span for span, d in uses if d.why != "pinned")):
                text = ", ".join(f"{first} to {last}" for first, last in lost)
                notes.append(f"pin {op}={pin} does not hold in steps of {text} tokens: {'; or '.join(reasons)}")
        return notes


def _unbound(**arguments: object) -> None:
    raise AssertionError("a call site that was not bound")


def _wants(candidate: Candidate, node: Node) -> Iterator[tuple[str, int, Layout]]:
    """(argument, weight, layout) for every weight that the candidate would read."""
    for call in node.calls:
        for path, weight in call.weights.items():
            name = candidate.kernel.layouts.get(path, CANONICAL.name)
            yield path, id(weight), CANONICAL if name == CANONICAL.name else Layout(name, candidate.source.name)


def _same(a: Decision, b: Decision) -> bool:
    """Whether two decisions bind the same kernels."""

    def names(top: Decision) -> list[tuple[str, Any]]:
        return [(d.kernel.name, d.kernel.config) if d.kernel else (d.op, None) for d in top.walk()]

    return names(a) == names(b)


def _unmet_site(op: str, plans: list[list[Decision]]) -> bool:
    """Whether some site calls the pinned operator without the pin holding in any bucket."""
    for plan in plans:
        uses = [d for top in plan for d in top.walk() if d.op == op and not d.cases]
        if uses and not any(d.why == "pinned" for d in uses):
            return True
    return False
