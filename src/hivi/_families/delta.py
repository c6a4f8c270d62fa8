"""A point: maximum a posteriori, and with other families for the other sites variational EM."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hivi._families.base import AbstractFamily, AbstractProposal, require_real, scattered
from hivi._likelihood import likelihood
from hivi._space import Latents, Site
from hivi._tree import Key, PyTree, taken

CLOSE = 1e-3
"""How far from the point, relative to 1 + its size, a value may lie: conversions between spaces round."""


class Delta(AbstractFamily):
    """q(z) = delta(z - lambda): the point that maximises the bound.

    Of all sites it is the maximum a posteriori, in the model's own coordinates (the Jacobian of constrained sites is left
    out, as in NumPyro's `AutoDelta`). In a product with other families, `{"w": Delta(), ".*": MeanField()}`, it is
    variational EM (Neal & Hinton 1998): weights are learned, the other latents inferred. A point says nothing of its own
    uncertainty, and the bound is then one on log p(x, w) at that point, not on log p(x): of use to learn a model, not to
    compare a point with a distribution.

    Raises:
        FamilyError: a discrete site.
        TargetError: a site whose support depends on other latents or on arrays.

    Example:
        >>> import hivi, jax
        >>> target = hivi.from_log_joint(lambda z: -0.5 * (z["x"] - 3.0) ** 2, latents={"x": hivi.Latent()})
        >>> fit = hivi.fit(target, hivi.Delta(), key=jax.random.key(0), steps=2000, progress=False)
        >>> print(f"{fit.sample(jax.random.key(1), 2)['x'][1]:.2f}")
        3.00
    """

    def build(self, sites: tuple[Site, ...], key: Key) -> AbstractProposal:
        require_real("Delta()", sites)
        keys = jax.random.split(key, max(len(sites), 1))
        start = {s.name: likelihood(s).start(s.shape, k)[..., 0] for s, k in zip(sites, keys, strict=False)}
        return DeltaProposal(sites, start)

    def native_plates(self) -> bool:
        return True


class DeltaProposal(AbstractProposal):
    """The point: site -> value in unconstrained coordinates."""

    sites: tuple[Site, ...] = eqx.field(static=True)
    point: dict[str, Array]

    @property
    def points(self) -> frozenset[str]:
        return frozenset(s.name for s in self.sites)

    def propose(self, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        return self.point, None

    def log_q(self, z: Latents, context: PyTree, key: Key, inner: int = 0) -> dict[str, Array]:
        """What turns log p of unconstrained coordinates into that of the model's own."""
        return {f"q({s.name})": s.log_jacobians(z[s.name]) for s in self.sites}

    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        """Of the other sites, given the point: `log_q` there, and nothing elsewhere."""
        total = sum((jnp.sum(t) for t in self.log_q(z, None, key).values()), jnp.zeros(()))
        near = [jnp.all(jnp.abs(z[n] - x) <= CLOSE * (1 + jnp.abs(x))) for n, x in self.point.items()]
        return jnp.where(jnp.all(jnp.stack(near)), total, -jnp.inf)

    @property
    def plain(self) -> bool:
        return True

    def apart(self, key: Key) -> DeltaProposal:
        moved = scattered(self.sites, {n: x[..., None] for n, x in self.point.items()}, key)
        return DeltaProposal(self.sites, {n: x[..., 0] for n, x in moved.items()})

    def near(self, means: dict[str, Array]) -> DeltaProposal:
        moved = {s.name: s.unconstrained_mean(means[s.name]) for s in self.sites if s.name in means}
        return DeltaProposal(self.sites, {**self.point, **moved})

    def centre(self) -> Latents:
        return jax.lax.stop_gradient(self.point)

    def gather(self, rows: dict[str, Array]) -> DeltaProposal:
        local = {s.name: s.local for s in self.sites if s.local is not None}
        some = {n: taken(self.point[n], rows.get(plate.name), axis) for n, (plate, axis) in local.items()}
        return DeltaProposal(self.sites, {**self.point, **some})

    def alone(self, sites: tuple[Site, ...]) -> DeltaProposal:
        return DeltaProposal(sites, {s.name: self.point[s.name] for s in sites})

    def row_terms(self, plate: str) -> dict[str, int]:
        return {f"q({s.name})": axis for s in self.sites for name, axis in s.plates if name == plate}

    def scales(self) -> dict[str, float]:
        return {f"q({s.name})": s.scale for s in self.sites if s.local is not None}

    def owned(self) -> PyTree:
        return eqx.tree_at(lambda p: p.point, self, {s.name: s.local is not None for s in self.sites})
