"""Mean-field: q(z) = product of q(z_i | lambda_i) with lambda a parameter (Black Box VI, Ranganath et al. 2014)."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hivi._families.base import (
    AbstractFamily,
    AbstractProposal,
    Conditional,
    require_spread,
    scattered,
    size_of,
    with_counts,
    with_tables,
)
from hivi._likelihood import likelihood, natural_gradient
from hivi._likelihoods.normal import NormalLikelihood
from hivi._space import Latents, Site
from hivi._tree import Key, PyTree, taken


class MeanField(AbstractFamily):
    """Independent coordinates: Normal (in unconstrained space), Bernoulli, Categorical or Poisson.

    q(z) = prod_i q(z_i | lambda_i), the family of Black Box VI (Ranganath, Gerrish & Blei 2014), eq. 1 of the
    HVM paper. It keeps no dependence between coordinates: the baseline that every other family is held against. Integer ranges
    have a probability for each value: to 1,024 values and 16,384 numbers a site; beyond that a binomial.

    Args:
        concentration: of counts: q(z_i) is negative binomial with this concentration (1: Geometric), wider than the Poisson that
            None gives.
        dispersed: of counts, and of ranges beyond tables: q(z_i) also has a free spread, narrower (down to 1/256 of a Poisson's
            or binomial's variance) or wider (up to 4 times).

    Example:
        >>> import hivi
        >>> hivi.MeanField().concentration is None
        True
    """

    concentration: float | None = None
    dispersed: bool = False

    def __check_init__(self) -> None:
        require_spread(self.concentration, self.dispersed)

    def build(self, sites: tuple[Site, ...], key: Key) -> AbstractProposal:
        sites = with_counts(with_tables(sites), self.concentration, self.dispersed)
        keys = jax.random.split(key, max(len(sites), 1))
        lam = {s.name: likelihood(s).start(s.shape, k) for s, k in zip(sites, keys, strict=False)}
        return MeanFieldProposal(sites, lam)

    def native_plates(self) -> bool:
        return True


class MeanFieldProposal(AbstractProposal):
    """Parameters of a mean-field family: site -> lambda of shape (*site shape, width)."""

    sites: tuple[Site, ...] = eqx.field(static=True)
    lam: dict[str, Array]

    def propose(self, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        keys = jax.random.split(key, max(len(self.sites), 1))
        draw = {s.name: likelihood(s).sample(self.lam[s.name], k) for s, k in zip(self.sites, keys, strict=False)}
        return draw, self.lam

    def log_q(self, z: Latents, context: PyTree, key: Key, inner: int = 0) -> dict[str, Array]:
        return {f"q({s.name})": likelihood(s).log_prob(context[s.name], z[s.name]) for s in self.sites}

    @property
    def plain(self) -> bool:
        return True

    def apart(self, key: Key) -> MeanFieldProposal:
        return MeanFieldProposal(self.sites, scattered(self.sites, self.lam, key))

    def landable(self, site: str) -> bool:
        return any(s.name == site and not s.discrete for s in self.sites)

    def landed(self, z: Latents, context: PyTree, sites: frozenset[str]) -> dict[str, Array]:
        fixed = jax.lax.stop_gradient(context)
        return {n: t for n, t in self.log_q(z, fixed, jax.random.key(0)).items() if n[2:-1] in sites}

    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        return sum((jnp.sum(t) for t in self.log_q(z, self.lam, key).values()), jnp.zeros(()))

    def conditionals(self, context: PyTree) -> dict[str, Conditional]:
        return {s.name: Conditional(likelihood(s), context[s.name]) for s in self.sites}

    def gather(self, rows: dict[str, Array]) -> MeanFieldProposal:
        lam = dict(self.lam)
        for s in self.sites:
            if s.local is not None:
                plate, axis = s.local
                lam[s.name] = taken(lam[s.name], rows.get(plate.name), axis)
        return MeanFieldProposal(self.sites, lam)

    def alone(self, sites: tuple[Site, ...]) -> MeanFieldProposal:
        return MeanFieldProposal(sites, {s.name: self.lam[s.name] for s in sites})

    def row_terms(self, plate: str) -> dict[str, int]:
        return {f"q({s.name})": axis for s in self.sites for name, axis in s.plates if name == plate}

    def scales(self) -> dict[str, float]:
        return {f"q({s.name})": s.scale for s in self.sites if s.local is not None}

    def parameters(self) -> dict[str, Array]:
        return self.lam

    def centre(self) -> Latents:
        return {s.name: jax.lax.stop_gradient(self.lam[s.name][..., 0]) for s in self.sites if not s.discrete}

    def near(self, means: dict[str, Array]) -> MeanFieldProposal:
        known = {s.name: s for s in self.sites if s.name in means}
        moved = {n: likelihood(s).near(self.lam[n], s.unconstrained_mean(means[n])) for n, s in known.items()}
        return MeanFieldProposal(self.sites, {**self.lam, **moved})

    def natural(self, gradient: PyTree) -> PyTree:
        lam = {}
        for s in self.sites:
            lam[s.name] = natural_gradient(likelihood(s), self.lam[s.name], gradient.lam[s.name]) / s.scale
        return MeanFieldProposal(self.sites, lam)

    def roles(self) -> PyTree:
        return jax.tree.map(lambda _: "natural", self)

    def centres(self) -> PyTree:
        return jax.tree.map(lambda _: True, self)

    def owned(self) -> PyTree:
        return eqx.tree_at(lambda p: p.lam, self, {s.name: s.local is not None for s in self.sites})

    @property
    def factorised(self) -> bool:
        return True

    # As a prior over lambda (all sites real).
    def affine(self) -> tuple[Array, Array]:
        lam = jnp.concatenate([self.lam[s.name].reshape(-1, NormalLikelihood().width) for s in self.sites])
        return lam[:, 0], jnp.exp(lam[:, 1])

    def recentre(self, location: Array, scale: Array) -> MeanFieldProposal:
        flat = jnp.stack([location, jnp.log(scale)], -1)
        lam, start = {}, 0
        for s in self.sites:
            shape = self.lam[s.name].shape
            stop = start + size_of(shape[:-1])
            lam[s.name] = flat[start:stop].reshape(shape)
            start = stop
        return MeanFieldProposal(self.sites, lam)
