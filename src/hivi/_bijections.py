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
    RationalQuadraticSpline,
    Scan,
    Vmap,
)
from jaxtyping import Array, Float
from paramax import Parameterize, unwrap

from hivi._errors import FamilyError, message, require_count
from hivi._tree import Key

Kind: TypeAlias = Literal["planar", "coupling", "maf", "spline"]
KINDS: tuple[str, ...] = ("planar", "coupling", "maf", "spline")
WIDTH = 32
START = 1e-2
"""Size of the random deviation from the identity at the start."""
MAX_LOG_SCALE = 2.0
NEWTON_STEPS = 10
_PLANAR_ZERO = 1.5132436
"""log(exp(e-1)-1): where the invertibility constraint of a planar layer maps the planar scale to exactly zero."""


class PlanarFlow(AbstractBijection):
    """Planar layers y = x + u tanh(w.x + b) in sequence (Rezende & Mohamed 2015), with an inverse.

    FlowJAX has the layer, but without an inverse and with its parameters apart; here they are one array, because an optimiser
    pays for every leaf. The inverse of a layer is one scalar root.

    Attributes:
        params: (layers, 2 dim + 1): w, the unconstrained u, and b of every layer.
    """

    params: Float[Array, "layers parameters"]
    shape: tuple[int, ...]
    cond_shape: ClassVar[None] = None  # type: ignore[misc]

    def __init__(self, params: Float[Array, "layers parameters"]):
        self.params = params
        self.shape = ((params.shape[1] - 1) // 2,)

    def _layers(self) -> list[tuple[Array, Array, Array]]:
        """(w, u, b) per layer, with u constrained so that the layer is invertible."""
        w, raw, b = jnp.split(self.params, [self.shape[0], 2 * self.shape[0]], axis=1)
        inner = jnp.sum(w * raw, 1, keepdims=True)
        u = raw + (jnp.log1p(jax.nn.softplus(inner)) - 1 - inner) * w / jnp.sum(w * w, 1, keepdims=True)
        return [(w[k], u[k], b[k, 0]) for k in range(self.params.shape[0])]

    def transform_and_log_det(self, x: Any, condition: Any = None) -> tuple[Array, Array]:
        """Value y and log |dy/dx|."""
        slopes = []
        for w, u, b in self._layers():
            act = jnp.tanh(_dot(x, w) + b)
            slopes.append(1 + (1 - act**2) * _dot(w, u))
            x = x + u * act
        return x, jnp.sum(jnp.log(jnp.stack(slopes)))

    def inverse_and_log_det(self, y: Any, condition: Any = None) -> tuple[Array, Array]:
        """Value x and log |dx/dy|; differentiable through one Newton step at each root (implicit function theorem)."""
        slopes = []
        for w, u, b in reversed(self._layers()):
            wu, target = _dot(w, u), _dot(w, y) + b
            a = jax.lax.stop_gradient(_root(wu, target))
            slope = jax.lax.stop_gradient(1 + wu * (1 - jnp.tanh(a) ** 2))
            act = jnp.tanh(a - (a + wu * jnp.tanh(a) - target) / slope)
            slopes.append(1 + (1 - act**2) * wu)
            y = y - u * act
        return y, -jnp.sum(jnp.log(jnp.stack(slopes)))


def _dot(a: Array, b: Array) -> Array:
    """Inner product as a fused sum: for short vectors a matrix product costs a call of its own."""
    return jnp.sum(a * b)


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


def require_flow(where: str, kind: str, layers: int, least: int = 1) -> None:
    """Refuse a kind that does not exist, and too few layers.

    Raises:
        FamilyError: naming the argument of `where`.
    """
    if kind not in KINDS:
        cure = "FlowJAX has no radial layer; planar is closest" if kind == "radial" else "choose one of them"
        raise FamilyError(message(f"{where}(kind=...)", repr(kind), f"one of {', '.join(KINDS)}", cure))
    require_count(f"{where}(layers=...)", layers, "use MeanField() for no flow" if least else "0 is no flow", least)


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
    require_flow("Flow", kind, layers)
    if dim == 1 and kind in ("coupling", "maf"):
        raise FamilyError(
            message(f"Flow(kind={kind!r})", "a single coordinate", "two or more", "use kind='planar' or 'spline'")
        )
    # Static parts (closures inside FlowJAX) come from one cached build: equal configurations share compilations.
    static = eqx.partition(_skeleton(kind, dim, layers, str(jnp.result_type(float))), eqx.is_array)[1]
    return eqx.combine(eqx.filter(_build(kind, dim, layers, key), eqx.is_array), static)


@functools.lru_cache(maxsize=256)
def _skeleton(kind: str, dim: int, layers: int, precision: str) -> AbstractBijection:
    return _build(kind, dim, layers, jax.random.key(0))


def _build(kind: str, dim: int, layers: int, key: Key) -> AbstractBijection:
    keys = jax.random.split(key, layers)
    if kind == "planar":
        return PlanarFlow(jax.vmap(lambda k: _planar(dim, k))(keys))
    if dim == 1:
        return Chain([Vmap(_spline(), axis_size=1) for _ in keys])
    stacked = Scan(eqx.filter_vmap(lambda k: _network_layer(kind, dim, k))(keys))
    # Each layer ends with a flip: an odd number of them is undone, so that coordinates keep their places.
    return Chain([stacked, _flip(dim)]) if layers % 2 else stacked


def monotone(dim: int) -> AbstractBijection:
    """A rational-quadratic spline for each of `dim` coordinates, exactly the identity at the start and beyond -5 and 5."""
    static = eqx.partition(_splines(dim, str(jnp.result_type(float))), eqx.is_array)[1]
    return eqx.combine(eqx.filter(_splines.__wrapped__(dim, ""), eqx.is_array), static)


@functools.lru_cache(maxsize=256)
def _splines(dim: int, precision: str) -> AbstractBijection:
    each = eqx.filter_vmap(lambda _: _spline())(jnp.arange(dim))
    return Vmap(each, in_axes=eqx.if_array(0))


def _planar(dim: int, key: Key) -> Float[Array, " parameters"]:
    k1, k2, k3 = jax.random.split(key, 3)
    w = jax.random.normal(k1, (dim,))
    w = w / jnp.linalg.norm(w)
    u = w * _PLANAR_ZERO + START * jax.random.normal(k2, (dim,))
    return jnp.concatenate([w, u, jax.random.uniform(k3, (1,), minval=-1.0, maxval=1.0)])


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
