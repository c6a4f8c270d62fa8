"""Near-identity normalizing flows over a flat vector, built from FlowJAX bijections.

Each starts (almost) as the identity, so that a hierarchical family can start at a mean-field optimum, and each
can be inverted, so that densities at any point and tighter bounds are available.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.bijections import (
    AbstractBijection,
    Affine,
    Chain,
    Coupling,
    Flip,
    MaskedAutoregressive,
    Planar,
    RationalQuadraticSpline,
    Scan,
    Vmap,
)
from jaxtyping import Array
from paramax import Parameterize, unwrap

from hivi._errors import FamilyError, message
from hivi._tree import Key

Kind: TypeAlias = Literal["planar", "coupling", "maf", "spline"]
KINDS: tuple[str, ...] = ("planar", "coupling", "maf", "spline")
WIDTH = 32
START = 1e-2
"""Size of the random deviation from the identity at the start."""
MAX_LOG_SCALE = 2.0
NEWTON_STEPS = 10
_PLANAR_ZERO = 1.5132436
"""log(exp(e-1)-1): where FlowJAX's invertibility constraint maps the planar scale to exactly zero."""


class InvertiblePlanar(AbstractBijection):
    """FlowJAX's planar layer y = x + u tanh(w.x + b) with an inverse: one scalar root, found by Newton's method."""

    layer: Planar
    shape: tuple[int, ...]
    cond_shape: ClassVar[None] = None  # type: ignore[misc]

    def __init__(self, layer: Planar):
        self.layer, self.shape = layer, layer.shape

    def transform_and_log_det(self, x: Any, condition: Any = None) -> tuple[Array, Array]:
        """Y and log |dy/dx|."""
        return self.layer.transform_and_log_det(x)

    def inverse_and_log_det(self, y: Any, condition: Any = None) -> tuple[Array, Array]:
        """X and log |dx/dy|; differentiable through one Newton step at the root (implicit function theorem)."""
        planar = self.layer.get_planar()
        u, w, b = planar.get_act_scale(), planar.weight, planar.bias
        wu, target = w @ u, w @ y + b

        a = jax.lax.stop_gradient(_root(wu, target))
        # One differentiable Newton step at the root: the implicit function theorem.
        slope = jax.lax.stop_gradient(1 + wu * (1 - jnp.tanh(a) ** 2))
        a = a - (a + wu * jnp.tanh(a) - target) / slope
        x = y - u * jnp.tanh(a)
        return x, -self.layer.transform_and_log_det(x)[1]


def _root(c: Array, target: Array) -> Array:
    """Solve a + c tanh(a) = target for c > -1, by Newton steps that approach the root from one side.

    The root has the sign of the target. On that side the function is concave for c > 0 (start below the root) and convex
    for c < 0 (start above it), so that no step overshoots.
    """
    t = jnp.abs(target)
    a = jnp.where(c > 0, jnp.maximum(t / (1 + c), t - c), t - c)
    for _ in range(NEWTON_STEPS):
        tanh = jnp.tanh(a)
        a = a - (a + c * tanh - t) / (1 + c * (1 - tanh**2))
    return jnp.sign(target) * a


def near_identity(kind: str, dim: int, layers: int, key: Key) -> AbstractBijection:
    """A trainable bijection of R^dim that starts near the identity.

    Args:
        kind: "planar" (Rezende & Mohamed 2015), "coupling" (affine, Dinh et al. 2017), "maf" (affine masked
            autoregressive, one pass in the sampling direction, Kingma et al. 2016) or "spline" (rational
            quadratic coupling, Durkan et al. 2019).
        dim: length of the vector.
        layers: number of layers, at least 1.
        key: randomness of the initial parameters.

    Raises:
        FamilyError: unknown kind, fewer than one layer, or a kind that cannot act on one dimension.
    """
    if kind not in KINDS:
        cure = "FlowJAX has no radial layer; planar is closest" if kind == "radial" else "choose one of them"
        raise FamilyError(message("Flow(kind=...)", repr(kind), f"one of {', '.join(KINDS)}", cure))
    if layers < 1:
        raise FamilyError(message("Flow(layers=...)", str(layers), "at least 1", "use MeanField() for no flow"))
    if dim == 1 and kind in ("coupling", "maf"):
        raise FamilyError(
            message(f"Flow(kind={kind!r})", "a single coordinate", "two or more", "use kind='planar' or 'spline'")
        )
    # Static parts (closures inside FlowJAX) come from one cached build: equal configurations share compilations.
    static = eqx.partition(_skeleton(kind, dim, layers), eqx.is_array)[1]
    return eqx.combine(eqx.filter(_build(kind, dim, layers, key), eqx.is_array), static)


@functools.lru_cache(maxsize=256)
def _skeleton(kind: str, dim: int, layers: int) -> AbstractBijection:
    return _build(kind, dim, layers, jax.random.key(0))


def _build(kind: str, dim: int, layers: int, key: Key) -> AbstractBijection:
    keys = jax.random.split(key, layers)
    if kind == "planar":
        return Chain([_planar(dim, k) for k in keys])
    if dim == 1:
        return Chain([Vmap(_spline(), axis_size=1) for _ in keys])
    stacked = Scan(eqx.filter_vmap(lambda k: _network_layer(kind, dim, k))(keys))
    # Each layer ends with a flip: an odd number of them is undone, so that coordinates keep their places.
    return Chain([stacked, _flip(dim)]) if layers % 2 else stacked


def _planar(dim: int, key: Key) -> InvertiblePlanar:
    k1, k2, k3, k4 = jax.random.split(key, 4)
    w = jax.random.normal(k1, (dim,))
    w = w / jnp.linalg.norm(w)
    bias = jax.random.uniform(k3, (1,), minval=-1.0, maxval=1.0)
    u = w * _PLANAR_ZERO / (w @ w) + START * jax.random.normal(k2, (dim,))
    layer = eqx.tree_at(lambda p: p.params, Planar(k4, dim=dim), jnp.concatenate([w, u, bias]))
    return InvertiblePlanar(layer)


def _spline() -> RationalQuadraticSpline:
    # Wider bins and steeper slopes than FlowJAX's minimum, so that the inverse is accurate in float32.
    return RationalQuadraticSpline(knots=8, interval=5, min_derivative=0.05, min_width=0.1)


def _affine() -> Affine:
    """An affine transformer whose log scale is bounded by `MAX_LOG_SCALE`: unbounded ones overflow when stacked."""
    return eqx.tree_at(lambda a: a.scale, Affine(), Parameterize(_bounded_scale, jnp.zeros(())))


def _bounded_scale(raw: Array) -> Array:
    return jnp.exp(MAX_LOG_SCALE * jnp.tanh(raw / MAX_LOG_SCALE))


def _network_layer(kind: str, dim: int, key: Key) -> AbstractBijection:
    transformer = _spline() if kind == "spline" else _affine()
    if kind == "maf":
        made = MaskedAutoregressive(key, transformer=transformer, dim=dim, nn_width=max(WIDTH, dim), nn_depth=1)
        layer = eqx.tree_at(_last_layer_of_made, made, replace_fn=_shrink)
    else:
        coupling = Coupling(
            key, transformer=transformer, untransformed_dim=dim // 2, dim=dim, nn_width=WIDTH, nn_depth=1
        )
        layer = eqx.tree_at(lambda c: c.conditioner.layers[-1], coupling, replace_fn=_shrink)
    return Chain([layer, _flip(dim)])


def _flip(dim: int) -> Flip:
    return Flip(shape=(dim,))  # type: ignore[call-arg]


def _last_layer_of_made(made: MaskedAutoregressive) -> object:
    return made.masked_autoregressive_mlp.layers[-1]


def _shrink(layer: object) -> object:
    """Scale a network's last layer so that the transformer starts near the identity."""
    return jax.tree.map(lambda x: START * x if eqx.is_inexact_array(x) else x, layer)


def forward(bijection: AbstractBijection, x: Array) -> tuple[Array, Array]:
    """Y and log |dy/dx|."""
    return unwrap(bijection).transform_and_log_det(x)


def backward(bijection: AbstractBijection, y: Array) -> tuple[Array, Array]:
    """X and log |dx/dy|."""
    return unwrap(bijection).inverse_and_log_det(y)
