"""Branches and loops for the axis-map interpreter: cond, while, scan.

Inside a scan the step is one more axis, numbered below 0: what is scanned and stacked runs along it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from hivi._locality.base import (
    ALL,
    Along,
    Arr,
    AxisMap,
    Const,
    Entry,
    Known,
    Loss,
    Params,
    Read,
    Scope,
    Shape,
    Table,
    Unsupported,
    reindex,
    table,
    total,
    used,
)

_PATIENCE = 8  # passes over a loop body before the maps of its carry are joined
_LIMIT = 24  # passes before the carry is taken to depend on everything
_RETRIES = 3  # passes given to a second, narrower start

Step = Callable[[list[Scope]], list[Scope]]


@runtime_checkable
class Walker(Protocol):
    """What loops need of the interpreter."""

    sizes: dict[str, Shape]
    losses: dict[Loss, None]
    loops: Shape

    def call(self, jaxpr: Any, args: Sequence[Arr]) -> list[Arr]:
        """Interpret a nested jaxpr."""
        ...

    def scope(self, name: str, reads: Sequence[Read], args: Sequence[Arr], shape: Shape) -> Scope:
        """Scope of an output that reads its operands so."""
        ...

    def merged(self, name: str, found: dict[str, set[AxisMap]], shape: Shape) -> Scope:
        """Scope of an array of this shape, from maps that may overlap."""
        ...

    def widened(self, name: str, old: Scope, new: Scope) -> Scope:
        """A scope that covers both, by one map for each site that grew."""
        ...


def cond(walker: Walker, params: Params, args: Sequence[Arr]) -> list[Arr]:
    """Every output depends on the choice, and on what any branch gives."""
    index, *operands = args
    branches = params["branches"]
    if index.known and isinstance(index.known.entry, Const):
        return walker.call(branches[min(max(index.known.low, 0), len(branches) - 1)], operands)
    results = [walker.call(branch, operands) for branch in branches]
    reads = [*(Read(i) for i in range(len(branches))), Read(len(branches), ())]
    return [
        Arr(arrays[0].shape, walker.scope("cond", reads, [*arrays, index], arrays[0].shape))
        for arrays in zip(*results, strict=True)
    ]


def while_loop(walker: Walker, params: Params, args: Sequence[Arr]) -> list[Arr]:
    """Every element depends on its own steps, and on the test that decides how many there are."""
    start = params["cond_nconsts"] + params["body_nconsts"]
    tests, consts, init = args[: params["cond_nconsts"]], args[params["cond_nconsts"] : start], args[start:]

    def step(carry: list[Scope]) -> list[Scope]:
        state = [Arr(a.shape, scope) for a, scope in zip(init, carry, strict=True)]
        test = walker.call(params["cond_jaxpr"], [*tests, *state])[0]
        outs = walker.call(params["body_jaxpr"], [*consts, *state])
        # under vmap the test has an element for each member of the batch: a prefix of the carry's axes
        reads = [Read(0), Read(1), Read(2, tuple(Along(d) for d in range(len(test.shape))))]
        if any(a.shape[: len(test.shape)] != test.shape for a in init):
            raise Unsupported
        return [walker.scope("while", reads, [a, b, test], a.shape) for a, b in zip(init, outs, strict=True)]

    carry = _settle(walker, "while", args, [a.scope for a in init], step)
    return [Arr(a.shape, scope) for a, scope in zip(init, carry, strict=True)]


def scan(walker: Walker, params: Params, args: Sequence[Arr]) -> list[Arr]:
    """Iterate over the scopes of the carry; see `_Scan`."""
    length, jaxpr = params["length"], params["jaxpr"]
    start = params["num_consts"] + params["num_carry"]
    consts, init, xs = args[: params["num_consts"]], args[params["num_consts"] : start], args[start:]
    walker.loops = (length, *walker.loops)
    try:
        return _Scan(walker, jaxpr, length, params["reverse"]).run(consts, init, xs)
    finally:
        walker.loops = walker.loops[1:]


def _settle(walker: Walker, name: str, args: Sequence[Arr], start: list[Scope], step: Step) -> list[Scope]:
    """Iterate `step` until the scopes of a carry stand still.

    Any scopes that `step` leaves as they are hold at every step, wherever the search started. `step`
    is called last on the answer. The losses of passes on the way there count only if something was lost.
    """
    before = dict(walker.losses)
    during: dict[Any, Any] = {}

    def take(carry: list[Scope]) -> list[Scope]:
        during.update(walker.losses)
        walker.losses = dict(before)
        return step(carry)

    carry, count = start, 0
    while (new := take(carry)) != carry:
        if count >= _PATIENCE:
            new = [walker.widened(name, a, b) for a, b in zip(carry, new, strict=True)]
            if new == carry:
                break
        carry, count = new, count + 1
        if count > _LIMIT:
            sites = {site for arg in args for site in arg.scope}
            carry = [{site: total(len(walker.sizes[site])) for site in sites} for _ in carry]
    # What is only ever added to keeps the guesses of the first passes. Let it start afresh beside the others.
    wider = [_width(b) > _width(a) for a, b in zip(start, carry, strict=True)]
    if not any(wider):
        return carry
    fresh = [a if again else b for a, b, again in zip(start, carry, wider, strict=True)]
    for _ in range(_RETRIES):
        if (new := take(fresh)) == fresh:
            carry = fresh
            break
        fresh = new
    else:
        take(carry)
    if any(_width(b) > _width(a) for a, b in zip(start, carry, strict=True)):
        walker.losses.update(during)
    return carry


def _width(scope: Scope) -> int:
    return sum(m.count(ALL) for maps in scope.values() for m in maps)


class _Scan:
    """One scan. Its carry enters a step shifted: what the step before called `t` is `t - 1` here."""

    def __init__(self, walker: Walker, jaxpr: Any, length: int, reverse: bool) -> None:
        self.walker, self.jaxpr, self.length, self.loop = walker, jaxpr, length, -len(walker.loops)
        self.sign = -1 if reverse else 1
        self.first, self.last = (length - 1, 0) if reverse else (0, length - 1)

    def run(self, consts: Sequence[Arr], init: Sequence[Arr], xs: Sequence[Arr]) -> list[Arr]:
        """Outputs of the scan: final carry, then stacked outputs."""
        slices = [self._slice(x) for x in xs]
        counters = self._counters(consts, init, slices)
        outs: list[Arr] = []

        def step(carry: list[Scope]) -> list[Scope]:
            state = [Arr(a.shape, s, n) for a, s, n in zip(init, carry, counters, strict=True)]
            outs[:] = self.walker.call(self.jaxpr, [*consts, *state, *slices])
            return [self._next(a, out) for a, out in zip(init, outs, strict=False)]

        _settle(self.walker, "scan", [*consts, *init, *slices], [a.scope for a in init], step)
        final = list(init)
        if self.length:
            final = [Arr(a.shape, self._relabel(a.scope, self._at(self.last), a.shape)) for a in outs[: len(init)]]
        for a in outs[len(init) :]:
            shape = (self.length, *a.shape)
            final.append(Arr(shape, self._relabel(a.scope, self._stacked, shape)))
        return final

    def _slice(self, x: Arr) -> Arr:
        """One step of what is scanned over."""
        view = (Along(self.loop), *(Along(d) for d in range(len(x.shape) - 1)))
        scope = self.walker.scope("scan", [Read(0, view)], [x], x.shape[1:])
        known, support = (k and k.seen(view, x.shape[1:] + self.walker.loops) for k in (x.known, x.support))
        return Arr(x.shape[1:], scope, known, support=support, finite=x.finite)

    def _relabel(self, scope: Scope, change: Callable[[Entry], Entry], shape: Shape) -> Scope:
        changed = {site: {tuple(map(change, m)) for m in maps} for site, maps in scope.items()}
        return self.walker.merged("scan", changed, shape)

    def _at(self, step: int) -> Callable[[Entry], Entry]:
        return lambda e: reindex(e, {self.loop: Const(step)}, self.walker.loops)

    def _shifted(self, e: Entry) -> Entry:
        return reindex(e, {self.loop: Along(self.loop, -self.sign)}, self.walker.loops)

    def _stacked(self, e: Entry) -> Entry:
        move = {a: Along(0 if a == self.loop else a + 1) for a in used(e) if a == self.loop or a >= 0}
        if isinstance(e, Table):
            sizes = dict(zip(e.axes, e.shape, strict=True))
            return table([move[a].axis if a in move else a for a in sizes], e.array())
        return reindex(e, move, ())

    def _next(self, init: Arr, out: Arr) -> Scope:
        """Scope of the carry at any step: the initial one at the first, else that of the step before."""
        found: dict[str, set[AxisMap]] = {}
        for site in {**init.scope, **out.scope}:
            maps = {tuple(map(self._shifted, m)) for m in out.scope.get(site, ())}
            at_first = [tuple(map(self._at(self.first), m)) for m in maps]
            for m in init.scope.get(site, ()):
                # an initial z[0] before z[1:] is what the shifted maps say of the first step anyhow
                if not any(all(e in (ALL, x) for e, x in zip(wide, m, strict=True)) for wide in at_first):
                    maps.add(m)
            found[site] = maps
        return self.walker.merged("scan", found, init.shape)

    def _counters(self, consts: Sequence[Arr], init: Sequence[Arr], slices: Sequence[Arr]) -> list[Known | None]:
        """Integers of the carry that grow by the same number every step: guessed, then verified."""
        grow: list[int | None] = [1 if a.known and isinstance(a.known.entry, Const) else None for a in init]
        first, last = [[Arr(a.shape, {}, a.known, a.columns) for a in arrays] for arrays in (consts, slices)]
        guessing = True
        while any(g is not None for g in grow):
            guess = [None if g is None else self._count(a, g) for a, g in zip(init, grow, strict=True)]
            state = [Arr(a.shape, {}, known) for a, known in zip(init, guess, strict=True)]
            outs = self.walker.call(self.jaxpr, [*first, *state, *last])
            found = [_difference(out.known, known) for out, known in zip(outs, guess, strict=False)]
            if found == grow:
                return guess
            grow = [f if f == g or guessing else None for f, g in zip(found, grow, strict=True)]
            guessing = False
        return [None] * len(init)

    def _count(self, init: Arr, grow: int) -> Known | None:
        """The counter that starts at `init` and grows so, at each step."""
        begin = init.known.low if init.known else 0
        offset, stride = begin - self.sign * grow * self.first, self.sign * grow
        ends = sorted((begin, begin + grow * (self.length - 1)))
        return Known(Along(self.loop, offset, stride) if stride else Const(offset), ends[0], ends[1])


def _difference(new: Known | None, old: Known | None) -> int | None:
    """By how much a known array grew, where that is one number."""
    if new is None or old is None:
        return None
    a, b = new.entry, old.entry
    if isinstance(a, Along) and isinstance(b, Along) and (a.axis, a.stride) == (b.axis, b.stride):
        return a.offset - b.offset
    if isinstance(a, Const) and isinstance(b, Const):
        return a.index - b.index
    return None


CONTROL: dict[str, Callable[[Any, Params, Sequence[Arr]], list[Arr]]] = {
    "cond": cond,
    "while": while_loop,
    "scan": scan,
}
