"""The contract of a variational family: a properly weighted proposal.

A family (a small configuration such as `MeanField()`) is built for the sites of a target into a *proposal*: the
parameters theta and phi, and how to draw from them. A proposal promises a draw `z` and a number `log_q` with

    E[g(z) exp(-log_q)] = integral of g          (proper weighting)

not a density. Every bound then follows from `log_p - log_q` by Jensen's inequality.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hivi._errors import FamilyError, message
from hivi._families.checks import RATE, jointly, not_a_prior
from hivi._families.checks import Directions as Directions
from hivi._families.checks import rate_for as rate_for
from hivi._families.checks import require_real as require_real
from hivi._families.checks import require_spread as require_spread
from hivi._families.checks import scattered as scattered
from hivi._families.checks import with_counts as with_counts
from hivi._families.checks import with_tables as with_tables
from hivi._layout import Components as Components
from hivi._layout import Coordinates as Coordinates
from hivi._layout import Layout as Layout
from hivi._layout import gaussian_density as gaussian_density
from hivi._layout import gaussian_terms as gaussian_terms
from hivi._layout import size_of as size_of
from hivi._likelihoods.base import AbstractLikelihood
from hivi._space import Latents, Site
from hivi._tree import Key, PyTree


class Conditional(NamedTuple):
    """q(z_i | lambda_i) of one site at one draw of lambda: what score and difference gradients need."""

    likelihood: AbstractLikelihood
    lam: Array


class AbstractProposal(eqx.Module):
    """A built family: its arrays are theta and phi, everything else is static."""

    sites: eqx.AbstractVar[tuple[Site, ...]]

    @abc.abstractmethod
    def propose(self, key: Key, branch: Int[Array, ""] | int = 0) -> tuple[Latents, PyTree]:
        """One draw of all sites, and the context (lambda, base noise) that produced it.

        Reparameterised values carry gradients; discrete values are integers. `branch` selects the mixture
        component: branches are *stratified*, each is drawn from every time and weighted by `log_weights`.
        """

    @abc.abstractmethod
    def log_q(self, z: Latents, context: PyTree, key: Key, inner: int = 0) -> dict[str, Array]:
        """Terms whose total is the `log_q` of a draw that `propose` made, as arrays before their sums.

        Args:
            z: the draw (discrete values may have moved: local expectations evaluate there too).
            context: what `propose` returned with it.
            key: randomness of the `inner` extra draws of lambda, the same for moved values.
            inner: number K of extra draws of lambda from r(lambda|z) (Sobolev & Vetrov 2019); 0 is eq. 5.
        """

    @abc.abstractmethod
    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        """Log of an unbiased estimate of the density q(z) at any z; exact where the family has it."""

    def hidden(self, context: PyTree) -> Latents:
        """Discrete variables of its own, above z, by names that are no site's; `log_q` takes them among `z`.

        `conditionals` has q of each of them. Those of `propose` are in the context.
        """
        return {}

    @property
    def above(self) -> tuple[Site, ...]:
        """What `hidden` has, as sites."""
        return ()

    def redrawn(self, values: Latents, key: Key, branch: Int[Array, ""] | int = 0) -> tuple[Latents, PyTree]:
        """`propose` with other values of some variables of `upstream` or `above`: what depends on them is drawn anew.

        With the same key, all the rest is as `propose` draws it.
        """
        assert not (self.upstream | {s.name for s in self.above}), (
            f"{type(self).__name__} must say what depends on them"
        )
        return self.propose(key, branch)

    def landable(self, site: str) -> bool:
        """Whether `landed` can serve a site: exact densities of continuous sites."""
        return False

    @property
    def learning_rate(self) -> float:
        """Of the default optimiser, where the user names none."""
        return rate_for(self.sites) if self.plain else RATE

    @property
    def plain(self) -> bool:
        """Whether there are no flows or networks in it, which long steps would harm."""
        return False

    def apart(self, key: Key) -> AbstractProposal:
        """Real sites at random places, as they should start beside discrete ones."""
        return self

    @property
    def lands(self) -> bool:
        """Whether to stick the landing where it can: families that come close to a posterior, or start there."""
        return False

    def landed(self, z: Latents, context: PyTree, sites: frozenset[str]) -> dict[str, Array]:
        """The terms of `log_q` of the groups of these sites with all parameters held fixed, under the same names.

        Only the draw carries gradients: the score, of mean zero, is left out (Roeder, Wu & Duvenaud 2017).
        """
        return {}

    def conditionals(self, context: PyTree) -> dict[str, Conditional]:
        """q(z_i | lambda_i) of every site whose coordinates are independent given the context."""
        return {}

    def gather(self, rows: dict[str, Array]) -> AbstractProposal:
        """The proposal for one minibatch: `rows` holds row numbers by plate; of a plate that is not there, all rows."""
        return self

    @property
    def upstream(self) -> frozenset[str]:
        """Discrete sites on whose values other draws of this proposal depend: every term is downstream of them."""
        return frozenset()

    @property
    def points(self) -> frozenset[str]:
        """Sites at a point, on which the bound is then conditional: it is one on log p of the data and the point."""
        return frozenset()

    @property
    def inferred(self) -> frozenset[str]:
        """Plates whose rows have their parameters from an inference network."""
        return frozenset()

    def unseen(self, features: Mapping[str, Array], sites: tuple[Site, ...]) -> AbstractProposal:
        """The proposal for other rows: plate -> their features; the sites have their number of rows.

        Raises:
            FamilyError: a site that has parameters for each row that was fitted.
        """
        new = {s.name: s for s in sites}
        for s in self.sites:
            if s.shape != new[s.name].shape or any(name in features for name, _ in s.plates):
                raise FamilyError(
                    message(
                        f"site {s.name!r} at other rows",
                        f"{type(self).__name__}, which has parameters for each row that was fitted",
                        "an inference network, which gives parameters to any rows",
                        f"fit with family={{{s.name!r}: hivi.Amortised(..., data=x), ...}}",
                    )
                )
        return self

    def resized(self, sites: tuple[Site, ...]) -> AbstractProposal:
        """The same, of rows that are filled in later, for as many of them as these sites have."""
        changed: dict[str, Any] = {"sites": sites}
        return dataclasses.replace(self, **changed)

    def bare(self) -> AbstractProposal:
        """The proposal without data of its rows, as it is saved."""
        return self

    @property
    def amortised(self) -> bool:
        """Whether it must be `given` features of its rows before use."""
        return False

    def given(self, features: Array | None) -> AbstractProposal:
        """The proposal for rows with these features (rows, features); itself, unless it is amortised."""
        return self

    def centre(self) -> Latents:
        """A central value of the sites, in engine coordinates, of families that have one at no cost; no gradient."""
        return {}

    def near(self, means: dict[str, Array]) -> AbstractProposal:
        """The proposal moved to these means (in the model's own space, per site; one row for a local site)."""
        return self

    def expecting(self, sites: tuple[str, ...], plug_in: bool = False) -> AbstractProposal:
        """The proposal with these sites in closed form: `views` gives their means, `log_q` their negative entropy.

        Raises:
            FamilyError: a site whose family has no closed-form means.
        """
        own = [s.name for s in self.sites if s.name in sites]
        if not own:
            return self
        raise FamilyError(
            message(
                f"site {own[0]!r}",
                f"{type(self).__name__}, which has no closed-form means",
                "MeanFieldGamma() for a site in closed form",
                "name the family of that site, or use estimator=hivi.Auto()",
            )
        )

    def views(self) -> dict[str, Latents]:
        """View ("mean", "logmeanexp") -> means of sites in closed form, to be used for the draws; often empty."""
        return {}

    def natural(self, gradient: PyTree) -> PyTree:
        """Natural gradient: the inverse Fisher matrix applied to a gradient (a tree like this proposal)."""
        return gradient

    def roles(self) -> PyTree:
        """A tree like this proposal: "conjugate" (takes natural steps as they are), "natural" or "free" (Adam).

        Steps of rows' natural gradients have a learning rate in units of a log rate or logit; the rest moves slower.
        """
        return jax.tree.map(lambda _: "free", self)

    def individual(self) -> PyTree:
        """A tree like this proposal: which arrays each row has for itself when it is repeated over the rows of a plate."""
        return jax.tree.map(lambda _: True, self)

    def centres(self) -> PyTree:
        """A tree like this proposal: which arrays are the location and scale of its value, as a prior that rows share."""
        found = f"the prior {type(self).__name__}, which has no location and scale apart from the rest"
        cure = "use one of them, or shared=False"
        raise FamilyError(message("Hierarchical(shared=True)", found, "Flow() or MeanField()", cure))

    def precondition(self, rule: Callable[[Array], Array]) -> AbstractProposal:
        """For a gradient of a prior over lambda: itself with `rule` applied to the location's part, where there is one."""
        return self

    def started(self, search: Callable[[], tuple[Array, Array]]) -> AbstractProposal:
        """The proposal at the best Gaussian over its sites: `search` finds its mean (D,) and Cholesky factor (D, D)."""
        return self

    def grown(self, lam: dict[str, Array]) -> AbstractProposal:
        """The proposal moved to a mean-field optimum, as `Hierarchical(start=...)` does."""
        raise FamilyError(
            message("growing from a mean-field fit", type(self).__name__, "a hierarchical family", "use Hierarchical()")
        )

    def along_lambda(self, lam: dict[str, Array]) -> AbstractProposal:
        """For an optimiser's moments of such an optimum: a tree like this proposal, `lam` where lambda is centred, else zero."""
        return jax.tree.map(lambda x: jnp.zeros_like(x) if eqx.is_inexact_array(x) else x, self)

    def owned(self) -> PyTree:
        """A tree like this proposal: whether an array has one slice per row of the subsampled plate, as its first axis."""
        return jax.tree.map(lambda _: False, self)

    def divided(self, names: frozenset[str]) -> tuple[AbstractProposal | None, AbstractProposal | None]:
        """What it says of the other sites, and of those with these names, which are independent of them.

        Raises:
            FamilyError: sites of both kinds that are fitted jointly.
        """
        outside, inside = (tuple(s for s in self.sites if (s.name in names) is own) for own in (False, True))
        if not (outside and inside):
            return (self, None) if outside else (None, self)
        part = self.alone(inside)
        return self.alone(outside), part

    def alone(self, sites: tuple[Site, ...]) -> AbstractProposal:
        """What it says of some of its sites, where they are independent of the others.

        Raises:
            FamilyError: they are fitted jointly.
        """
        raise FamilyError(jointly(type(self).__name__, sites, self.sites))

    def row_terms(self, plate: str) -> dict[str, int]:
        """Name of a term of `log_q` that belongs to the rows of a plate -> its axis of rows."""
        return {}

    def scales(self) -> dict[str, float]:
        """Name of a term of `log_q` -> its plate scale N/B, where that is not 1."""
        return {}

    def parameters(self) -> dict[str, Array]:
        """Site -> lambda, where lambda is a parameter (mean-field); empty otherwise."""
        return {}

    @property
    def factorised(self) -> bool:
        """Whether the coordinates of the value are independent."""
        return False

    @property
    def closed_form(self) -> bool:
        """Whether `expecting` can take all sites in closed form."""
        return False

    @property
    def branches(self) -> int:
        """Number of stratified components."""
        return 1

    @property
    def equal_branches(self) -> bool:
        """Whether all branches have the same probability, whatever the parameters."""
        return self.branches == 1

    def log_weights(self) -> Float[Array, " branches"]:
        """Log-probabilities of the branches."""
        return jnp.zeros(1)

    def score_weight(self, inner: int) -> float:
        """Share of `log q(z|lambda)` in `log_q`, whose pathwise score has mean zero and is cancelled."""
        return 1.0

    def coordinates(self, value: Latents, context: PyTree) -> Coordinates:
        """Reference coordinates in which an auxiliary over these (continuous) sites works best: standardised.

        `context` is what `propose` returned with the value, or None for a value from elsewhere.
        """
        location, scale = self.affine()
        flat = Layout(self.sites).flatten(value)
        return Coordinates((flat - location) / scale, -jnp.sum(jnp.log(scale)))

    def from_coordinates(self, base: Float[Array, " dim"]) -> tuple[Latents, Array]:
        """Inverse of `coordinates`: the value, and log |d value / d base|."""
        location, scale = self.affine()
        return Layout(self.sites).unflatten(location + scale * base), jnp.sum(jnp.log(scale))

    def density_at(self, base: Float[Array, " dim"], key: Key) -> tuple[Latents, Array, Array]:
        """`from_coordinates` with the log-density there (or an unbiased estimate's log): no inverse is needed."""
        value, log_det = self.from_coordinates(base)
        return value, log_det, self.log_density(value, key)

    def affine(self) -> tuple[Float[Array, " dim"], Float[Array, " dim"]]:
        """Location of the value at base 0, and the scale of each of its coordinates there."""
        raise FamilyError(not_a_prior(self))

    def components(self) -> Components:
        """The Gaussian components, for a mixture prior over lambda."""
        raise FamilyError(
            message(
                "Hierarchical(auxiliary=Component())",
                f"the prior {type(self).__name__}",
                "a mixture prior",
                "use prior=Mixture(components=...), or another auxiliary such as InverseFlow()",
            )
        )

    def recentre(self, location: Float[Array, " dim"], scale: Float[Array, " dim"]) -> AbstractProposal:
        """The same proposal moved to a location and scale of its (flat, continuous) value: a start for a prior."""
        raise FamilyError(not_a_prior(self))

    def stretch(self, extra: Float[Array, "directions dim"]) -> AbstractProposal:
        """As a prior: the covariance widened by about the sum of the outer products of the rows of `extra`.

        Families that cannot start along directions stay as they are.
        """
        return self


class AbstractFamily(eqx.Module):
    """Configuration of a family; `build` makes its parameters for given sites."""

    @abc.abstractmethod
    def build(self, sites: tuple[Site, ...], key: Key) -> AbstractProposal:
        """Initial proposal over global sites (and, for families that say so, local ones).

        Raises:
            FamilyError: the family cannot represent one of the sites.
        """

    def at_row(self, sites: tuple[Site, ...], row: Int[Array, ""]) -> AbstractFamily:
        """The family for one row of the sites' subsampled plate."""
        return self

    def over_rows(self, rows: AbstractProposal, key: Key) -> AbstractProposal:
        """What becomes of this family's proposal over the rows of a plate: itself, unless it is amortised."""
        return rows

    def inner(self) -> AbstractFamily:
        """The family of a row: itself, unless it is amortised."""
        return self

    def localised(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """For an inference network: the sites as rows of its plate, which need not be subsampled."""
        return sites

    def native_plates(self) -> bool:
        """Whether `build` accepts sites of a subsampled plate; otherwise it is built row by row."""
        return False
