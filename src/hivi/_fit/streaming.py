"""The host's side of a streamed fit: passes, records, step sizes, and what is read off row by row."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hivi._bounds import AbstractBound, Elbo
from hivi._compile import make_room
from hivi._errors import FitError, message
from hivi._estimators.base import AbstractStrategy
from hivi._families.base import AbstractProposal
from hivi._fit.rows import Layout, Records, layout_of
from hivi._fit.stream import (
    FINAL,
    Rates,
    Schedule,
    StreamPlan,
    StreamState,
    at_blocks,
    free_moments,
    row_moments,
    run_block,
    split_rows,
)  # fmt: skip
from hivi._target.base import Source, Target
from hivi._tree import Key, PyTree

BLOCK = 8
"""Most steps that are loaded at once."""
Report = Callable[[int, int, float], None]
"""Called after every block with (steps done, of, bound)."""


@dataclasses.dataclass
class Stream:
    """A streamed fit that can go on: shared parameters, the rows' records, history.

    Attributes:
        target: the streamed target.
        state: shared parameters and their moments.
        records: the rows' parameters and moments.
        layout: how they lie in the records.
        steps: conjugate steps done so far (their sizes fall with it).
        settled: whether a warm-up is over.
        elbo: estimate of the bound at every step, in nats.
    """

    target: Target
    state: StreamState
    records: Records
    layout: Layout
    steps: int = 0
    settled: bool = False
    elbo: list[float] = dataclasses.field(default_factory=list)

    @property
    def source(self) -> Source:
        """Where the data come from."""
        if self.target.source is None:
            raise FitError(message("streamed fit", "a target without a source", "a streamed target", "use hivi.fit"))
        return self.target.source

    def proposal(self, ids: np.ndarray) -> AbstractProposal:
        """The proposal of some rows."""
        own, _ = self.layout.unpack(jnp.asarray(self.records.read(ids)))
        return eqx.combine(own, self.state.shared)


def open_stream(target: Target, proposal: AbstractProposal, key: Key) -> Stream:
    """Start: `proposal` is built for one minibatch; its first row is the template of every row."""
    own, shared = split_rows(proposal)
    own = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), own)
    tree = (own, row_moments(own))
    layout = layout_of(tree)
    template = np.asarray(layout.pack(tree))[0] if layout.shapes else np.zeros(0, np.float32)
    if target.source is None:
        raise FitError(message("streamed fit", "a target without a source", "a streamed target", "use hivi.fit"))
    records = Records(target.source.rows, template)
    state = StreamState(shared, free_moments(proposal), key, jnp.array(0, jnp.int32))
    return Stream(target, state, records, layout)


def advance(
    stream: Stream,
    passes: int,
    *,
    strategies: dict[str, AbstractStrategy],
    schedule: Schedule,
    bound: AbstractBound | None = None,
    samples: int = 1,
    rng: np.random.Generator,
    report: Report | None = None,
) -> Stream:
    """Some passes over the data; returns the same stream, moved on.

    Raises:
        FitError: the bound or its gradient was not finite in more than a tenth of the steps; a strategy that remembers.
    """
    make_room()
    learning = [n for n, s in strategies.items() if s.remembers]
    if learning:
        raise FitError(
            message(
                f"site {learning[0]!r} of a streamed target",
                f"{type(strategies[learning[0]]).__name__} that learns from step to step",
                "a strategy without a memory: every step has other rows",
                "use Score() with two samples or more, LocalExpectation(), Difference() or DisARM()",
            )
        )
    plan = StreamPlan(tuple(strategies.items()), Elbo() if bound is None else bound, samples, schedule.shared)
    lean = dataclasses.replace(stream.target, source=None, starts={})
    per_pass = len(stream.source.passes(np.random.default_rng(0)))
    total, done, began = passes * per_pass, 0, len(stream.elbo)
    before = int(stream.state.skipped)
    for ids, batches in _prefetched(stream.source, _blocks(stream.source, passes, rng)):
        count = len(ids)
        records = stream.records.read(ids.reshape(-1)).reshape(*ids.shape, stream.records.width)
        rates = _rates(schedule, stream.steps, done, total, count)
        padded = _pad((records, batches, rates), _block_size(per_pass))
        state, moved, values = run_block(stream.state, *padded, jnp.array(count), lean, plan, stream.layout)
        moved = np.asarray(moved)[:count]
        stream.records.write(ids.reshape(-1), moved.reshape(ids.size, stream.records.width))
        stream.state = state
        stream.elbo += np.asarray(values)[:count].tolist()
        done += count
        stream.steps += count if schedule.shared else 0
        if report is not None:
            report(done, total, stream.elbo[-1])
    skipped = int(stream.state.skipped) - before
    if skipped > 0.1 * max(total, 1):
        raise FitError(
            message(
                "streamed fit",
                f"bound or gradient not finite in {skipped} of {len(stream.elbo) - began} steps",
                "a finite bound",
                "lower the learning rates of its schedule, or rescale the data",
            )
        )
    return stream


def _rates(schedule: Schedule, steps: int, done: int, total: int, count: int) -> Rates:
    """Step sizes of the next steps: the rows' and free ones decay over the last 40 % of the run."""
    number = np.arange(count)
    left = np.clip((total - done - number) / max(0.4 * total, 1.0), 0.0, 1.0)
    decay = FINAL + (1 - FINAL) * left
    conjugate = (schedule.delay + steps + number) ** -schedule.power
    return Rates(*(jnp.asarray(r, jnp.float32) for r in (schedule.rows * decay, schedule.free * decay, conjugate)))


def _block_size(per_pass: int) -> int:
    return math.ceil(per_pass / math.ceil(per_pass / BLOCK))


def _blocks(source: Source, passes: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Row numbers of the steps of one block, (steps, batch); a block never spans two passes."""
    for _ in range(passes):
        order = source.passes(rng)
        size = _block_size(len(order))
        for start in range(0, len(order), size):
            yield np.stack(order[start : start + size])


def _prefetched(source: Source, blocks: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, PyTree]]:
    for ids in blocks:
        yield ids, source.load(list(ids))


def _pad(tree: PyTree, size: int) -> PyTree:
    """Repeat the last step until the leading axis has this size: one compilation for all blocks."""

    def one(x: Any) -> Array:
        x = np.asarray(x)
        return jnp.asarray(np.concatenate([x, np.repeat(x[-1:], size - len(x), 0)]) if len(x) < size else x)

    return jax.tree.map(one, tree)


def per_block(stream: Stream, read: Callable[..., PyTree], key: Key, *args: Any) -> list[PyTree]:
    """`read(target at the block, its proposal, key, *args)` for every block of rows, as NumPy, without padding rows.

    The arrays over rows come in the order of the source's blocks; `in_order` joins them in the order of the rows.
    """
    out = []
    for number, (ids, here) in enumerate(at_blocks(stream.target)):
        found = read(here, stream.proposal(ids), jax.random.fold_in(key, number), *args)
        out.append(jax.tree.map(functools.partial(_real, ids >= 0), found))
    return out


def in_order(source: Source, parts: list[np.ndarray]) -> np.ndarray:
    """Join arrays over the rows of each block into one, in the order of the rows."""
    ids = np.concatenate(source.blocks())
    joined = np.concatenate(parts)
    return joined[np.argsort(ids[ids >= 0])]


def _real(real: np.ndarray, values: Array) -> np.ndarray:
    """Only real rows of an array over rows; other arrays as they are."""
    a = np.asarray(values)
    return a[real] if a.ndim and len(a) == len(real) else a
