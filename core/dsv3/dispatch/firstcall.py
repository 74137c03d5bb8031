"""Callables for decisions, and the first call of each kernel: one that raises there is quarantined, and the next takes over.

After a kernel has answered once for each of its shapes nothing of this is left in the path of a call: the guard has put the
kernel itself in its place.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import warnings
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from dsv3.dispatch.canonical import PerWeight, unprepared, with_canonical
from dsv3.dispatch.decision import CANONICAL, Binding, Decision, Quarantine
from dsv3.dispatch.failure import failed, remedy_for, same_error, shapes_of
from dsv3.dispatch.guard import root_cause
from dsv3.dispatch.node import Node
from dsv3.dispatch.registration import resolve
from dsv3.dispatch.select import Bucket, Candidate, NoKernel
from dsv3.dispatch.site import switch_key, switch_on
from dsv3.dispatch.tuning.fingerprint import config_id
from dsv3.errors import Dsv3Error, KernelWarning
from dsv3.ops import spec
from dsv3.plugin import Backend

if TYPE_CHECKING:
    from dsv3.dispatch.bind import Binder

Holder = MutableSequence[Callable[..., Any]] | MutableMapping[Any, Any]


@dataclass(eq=False)
class Slot:
    """One bound kernel: its decision, the calls it serves, and the place (a site's bucket, a member of a decomposition's
    `ops`, a case of a switch) that holds what is called."""

    decision: Decision
    node: Node
    span: Bucket
    site: str
    holder: Any
    key: Any
    kernel: Candidate
    entry: Callable[..., Any]

    @property
    def live(self) -> bool:
        """Whether what this slot put in its place is still there."""
        return self.holder[self.key] is self.entry and self.decision.kernel is self.kernel

    def put(self, entry: Callable[..., Any]) -> None:
        self.entry = self.holder[self.key] = entry


class FirstCall:
    """Stands where a kernel will be until it has answered once for every shape that it is bound for."""

    def __init__(self, assembly: Assembly, slot: Slot, function: Callable[..., Any]) -> None:
        self.assembly, self.slot, self.function = assembly, slot, function
        self._known = spec(slot.decision.op)
        self._waiting = set(slot.node.groups)

    def __call__(self, **arguments: Any) -> Any:
        try:
            result = self.function(**arguments)
        except (Exception, SystemExit) as error:
            failure = error
        else:
            return self._answered(arguments, result)
        # Not inside the handler: what fails from here on has causes of its own.
        return self.assembly.failed(self, arguments, failure)

    def _answered(self, arguments: Mapping[str, Any], result: Any) -> Any:
        self._waiting.discard(switch_key(self._known, arguments))
        if not self._waiting and self.slot.entry is self and self.slot.live:
            self.slot.put(self.function)
        return result


class Assembly:
    """Builds what the sites call, and rebuilds it around a kernel that fails."""

    def __init__(self, binder: Binder, binding: Binding) -> None:
        self.binder, self.binding = binder, binding
        self._slots: list[Slot] = binding.slots
        self._functions: dict[tuple[str, str, str], Callable[..., Any]] = {}
        self._undone = PerWeight(unprepared)
        self._warned: set[tuple[str, str]] = set()
        self._lock = threading.RLock()

    # -- building

    def place(self, decision: Decision, node: Node, span: Bucket, site: str, holder: Holder, key: Any) -> None:
        """Put the callable for a decision into holder[key], and those for its parts and cases where it finds them."""
        known = spec(decision.op)
        if decision.kernel is not None:
            function = self._converting(self._function(decision.kernel, site), self._owners(decision, node))
            slot = Slot(decision, node, span, site, holder, key, decision.kernel, function)
            slot.put(FirstCall(self, slot, function))
            self._slots.append(slot)
        elif decision.cases:
            table: dict[tuple[int, ...], Callable[..., Any]] = {}
            for shape, inner in decision.cases.items():
                self.place(inner, node.groups[shape], span, site, table, shape)
            holder[key] = switch_on(known, [call.arguments[0] for call in node.calls], table)
        else:
            assert known.decompose is not None
            parts = SimpleNamespace()
            within = site if " inside " in site else f"{site}, inside {decision.op}"
            for op, inner in decision.parts.items():
                self.place(inner, node.children[op], span, within, vars(parts), op)
            holder[key] = self._converting(functools.partial(known.decompose, parts), self._owners(decision, node))

    def _function(self, kernel: Candidate, site: str) -> Callable[..., Any]:
        name = (kernel.name, kernel.kernel.op, config_id(kernel.config))
        if name not in self._functions:
            function = resolve(kernel.kernel, kernel.source.name)
            self._functions[name] = function if kernel.config is None else functools.partial(function, config=kernel.config)
        function = self._functions[name]
        checker = self.binding.checker
        return function if checker is None else checker.wrap(kernel, site, function)

    def _owners(self, decision: Decision, node: Node) -> dict[str, Backend]:
        """The weights that are prepared in a layout which this decision does not read, with the backends that can undo it.
        None where weights were chosen for the decision; some where it takes the place of another."""
        found = {}
        for call in node.calls:
            for path, weight in call.weights.items():
                layout = self.binder.layout(weight)
                reads = decision.kernel.kernel.layouts.get(path, CANONICAL.name) if decision.kernel else CANONICAL.name
                passed = decision.kernel is None and id(weight) in node.passed_on
                if layout.name != reads and not passed:
                    found[path] = self.binder.backend(layout.backend)
        return found

    def _converting(self, function: Callable[..., Any], owners: Mapping[str, Backend]) -> Callable[..., Any]:
        return with_canonical(function, owners, self._undone) if owners else function

    # -- a kernel that raises

    def failed(self, guard: FirstCall, arguments: Mapping[str, Any], error: BaseException) -> Any:
        """The call's result, from the next kernel that can give it. Raises KernelFailed where none may take over, and what the
        kernel raised where the next says the same: then the input is at fault."""
        slot = guard.slot
        decision, op = slot.decision, slot.decision.op
        if self.binding.settled:
            raise error
        if isinstance(error, Dsv3Error) and slot.kernel.source.name == self.binder.reference.source.name:
            raise error  # the reference says what is wrong with the arguments
        shapes = shapes_of(op, arguments)
        if remedy := remedy_for(decision, error, self.binder.strict):
            raise failed(error, decision, slot.site, shapes, remedy) from error
        with self._lock:
            if not slot.live:  # another call of these shapes was first to fail
                return slot.holder[slot.key](**arguments)
            return self._take_over(slot, arguments, error, shapes)

    def _take_over(self, slot: Slot, arguments: Mapping[str, Any], error: BaseException, shapes: str) -> Any:
        """Try the next kernel on the very call; only if it answers is the first quarantined."""
        decision, guard, before = slot.decision, slot.entry, dataclasses.replace(slot.decision)
        fresh = [(slot.kernel.name, decision.op, call.key) for call in _group(slot.node, arguments).calls]
        fresh = [key for key in fresh if key not in self.binder.quarantined]
        self.binder.quarantined.update(dict.fromkeys(fresh, root_cause(error)))
        try:
            decision.become(self.binder.redecide(slot.node, slot.span))
            self.place(decision, slot.node, slot.span, slot.site, slot.holder, slot.key)
            result = slot.holder[slot.key](**arguments)
        except (Exception, SystemExit) as second:
            decision.become(before)
            slot.put(guard)
            for key in fresh:
                del self.binder.quarantined[key]
            verdict = self._neither(slot, error, second, shapes)
        else:
            self._replace_others(set(fresh))
            self._record(slot, error, shapes)
            return result
        raise verdict from (error if verdict is not error else error.__cause__)

    def _neither(self, slot: Slot, error: BaseException, second: BaseException, shapes: str) -> BaseException:
        """What to raise where the one that should take over fails too."""
        if same_error(error, second):
            return error
        if isinstance(second, NoKernel):
            remedy = "No other kernel can take over: try another backend"
        else:
            cause = str(second) if isinstance(second, Dsv3Error) else root_cause(second)
            remedy = f"What should have run instead failed too: {cause}. Try another backend"
        return failed(error, slot.decision, slot.site, shapes, remedy)

    def _record(self, slot: Slot, error: BaseException, shapes: str) -> None:
        instead = slot.decision
        names = [d.name for d in instead.cases.values()] if instead.cases else [instead.name]
        name = ", ".join(dict.fromkeys(n for n in names if n != slot.kernel.name))
        entry = Quarantine(instead.op, slot.kernel.name, root_cause(error), slot.site, shapes, name)
        self.binding.quarantined.append(entry)
        self.binding.notes.append(str(entry))
        known = (entry.kernel, entry.op)
        if known not in self._warned:  # once; further shapes go to the placement's notes only
            self._warned.add(known)
            warnings.warn(f"{entry} (further shapes: see the placement)", KernelWarning, stacklevel=2)

    def _replace_others(self, keys: set[tuple[Any, ...]]) -> None:
        """No other site calls the quarantined kernel with these shapes."""
        for slot in list(self._slots):
            if slot.live and any((slot.kernel.name, slot.decision.op, call.key) in keys for call in slot.node.calls):
                slot.decision.become(self.binder.redecide(slot.node, slot.span))
                self.place(slot.decision, slot.node, slot.span, slot.site, slot.holder, slot.key)
        self._slots[:] = [slot for slot in self._slots if slot.live]


def _group(node: Node, arguments: Mapping[str, Any]) -> Node:
    """The calls that look like this one; all of the node's if it looks like none."""
    try:
        return node.groups.get(switch_key(spec(node.op), arguments), node)
    except AttributeError:  # arguments that have no shape
        return node
