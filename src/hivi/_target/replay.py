"""Map latents to the model's own space where their supports depend on other latents or on data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from hivi import _jaxprs
from hivi._factored import Program
from hivi._space import Latents, Site


class Replay(eqx.Module):
    """The part of a model that computes the values of its latents, as a program without the rest.

    Attributes:
        names: the latents, in the order of the program's results.
        needs: the latents that the program reads.
        program: its structure; static.
        before: arrays that come first among its inputs.
        after: arrays that come last.
    """

    names: tuple[str, ...] = eqx.field(static=True)
    needs: tuple[str, ...] = eqx.field(static=True)
    program: Program = eqx.field(static=True)
    before: tuple[Any, ...]
    after: tuple[Any, ...]

    def __call__(self, z: Latents) -> Latents:
        """One draw of full size, in the engine's coordinates -> the model's own space."""
        inputs = [*self.before, *(z[name] for name in self.needs), *self.after]
        return dict(zip(self.names, _jaxprs.evaluate(self.program.jaxpr, inputs), strict=True))


def replay(
    values: Callable[[Latents, Sequence[Any]], Mapping[str, Any]], sites: Sequence[Site], data: Sequence[Any]
) -> Replay:
    """Trace `values(z, data)` and keep what its results need.

    Args:
        values: full-size latents in the engine's coordinates, and data -> values in the model's own space.
        sites: the latent sites.
        data: arrays.
    """
    names = tuple(s.name for s in sites)
    examples = [jnp.zeros(s.shape, s.dtype) for s in sites]

    def flat(*args: Any) -> list[Any]:
        found = values(dict(zip(names, args, strict=False)), args[len(names) :])
        return [found[name] for name in names]

    jaxpr, consts, _ = _jaxprs.trace(flat, *examples, *data)
    jaxpr, used = _jaxprs.prune(_jaxprs.inline(jaxpr), [True] * len(names))
    start, end = len(consts), len(consts) + len(names)
    before = [jnp.asarray(c) for c, u in zip(consts, used[:start], strict=True) if u]
    needs = [name for name, u in zip(names, used[start:end], strict=True) if u]
    after = [x for x, u in zip(data, used[end:], strict=True) if u]
    program = Program(jaxpr, tuple(needs), (), (), _jaxprs.fingerprint(jaxpr))
    return Replay(names, tuple(needs), program, tuple(before), tuple(after))
