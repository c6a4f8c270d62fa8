"""The curvature operator of continuous sites: Hessian-vector products at draws from a mean-field q."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hivi._families.auxiliary import Link
from hivi._families.base import AbstractProposal
from hivi._space import Latents, Site
from hivi._target.base import Target

BATCH = 16
"""Draws evaluated at once."""


class Bend(eqx.Module):
    """Second derivatives of f(z) = log p - log q_0 along the parameters of Normal sites, draw by draw.

    With z = m + s exp(t) e and the location in units of s, `M = E[d2 f / d(m/s, t)^2]` at fixed noise e and fixed q_0: exact for
    every draw of a Gaussian target, where a product of a gradient and a score would have noise.

    Attributes:
        proposal: q_0.
        target: log p.
        sites: the Normal sites, all global.
        keys: one per draw.
    """

    proposal: AbstractProposal
    target: Target
    sites: tuple[Site, ...] = eqx.field(static=True)
    keys: Key[Array, " samples"]

    def each(self, along: Float[Array, " dim"]) -> Float[Array, "samples dim"]:
        """The product of every draw's second derivatives with a vector over (location, log scale) of the sites."""
        link = Link(self.sites)

        def one(key: Array) -> Array:
            k_rows, k_branch, k_draw = jax.random.split(key, 3)
            rows = self.target.minibatch(k_rows)
            local = self.proposal.gather(rows)
            branch = jax.random.categorical(k_branch, local.log_weights()) if local.branches > 1 else 0
            z, _ = local.propose(k_draw, branch)
            lam = {s.name: local.parameters()[s.name] for s in self.sites}
            base = {n: (z[n] - v[..., 0]) * jnp.exp(-v[..., 1]) for n, v in lam.items()}

            def value(free: Array) -> Array:
                parts, moved, log_q = link.split(free), {}, jnp.zeros(())
                for n, v in lam.items():
                    standard = parts[n][..., 0] + jnp.exp(parts[n][..., 1]) * base[n]
                    moved[n] = v[..., 0] + jnp.exp(v[..., 1]) * standard
                    log_q = log_q - 0.5 * jnp.sum(standard**2)
                return self.target.log_joint({**z, **moved}, rows) - log_q

            return jax.jvp(jax.grad(value), (jnp.zeros(link.dim),), (along,))[1]

        return jax.lax.map(one, self.keys, batch_size=BATCH)


def pathwise(target: Target, site: Site, lam: Float[Array, "*shape 2"], z: Latents, rows: dict[str, Array]) -> Array:
    """One draw's gradient of f with respect to (location / s, log s) of a Normal site, q_0 held fixed."""
    scale = jnp.exp(lam[..., 1])
    base = (z[site.name] - lam[..., 0]) / scale
    slope = jax.grad(lambda v: target.log_joint({**z, site.name: v}, rows))(z[site.name]) / site.scale
    whole = scale * slope + base
    return jnp.stack([whole, whole * base], -1)
