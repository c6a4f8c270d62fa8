"""Saving and loading without pickle: arrays in safetensors, structure in JSON, nothing that runs code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.distributions import constraints
from numpyro.distributions.constraints import Constraint
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hivi._bounds import AbstractBound, Elbo, ImportanceWeighted
from hivi._compile import compiled
from hivi._errors import LoadError, message
from hivi._families.amortised import Amortised
from hivi._families.auxiliary import AbstractAuxiliary, Component, InverseFlow, Linearised, SemiImplicit
from hivi._families.base import AbstractFamily
from hivi._families.codes import Codes
from hivi._families.copula import Copula
from hivi._families.delta import Delta
from hivi._families.flow import Flow
from hivi._families.full_rank import FullRank
from hivi._families.gamma import MeanFieldGamma
from hivi._families.hierarchical import Hierarchical
from hivi._families.low_rank import LowRank
from hivi._families.mean_field import MeanField
from hivi._families.mixture import Mixture
from hivi._families.recursive import Recursive
from hivi._families.standardised import Standardised
from hivi._families.structured import Structured
from hivi._space import Plate, Site, Values
from hivi._tree import PyTree

KNOWN: dict[str, type] = {
    c.__name__: c
    for c in (
        MeanField, MeanFieldGamma, Delta, Amortised, FullRank, LowRank, Copula, Flow, Mixture, Standardised, Hierarchical, Codes,
        Structured, Recursive,
        InverseFlow, Linearised, SemiImplicit, Component, Elbo, ImportanceWeighted,
    )
}  # fmt: skip
"""What a saved run may name: configurations are rebuilt from this table alone."""


def encode(value: Any) -> Any:
    """Configuration objects -> JSON values."""
    if isinstance(value, AbstractFamily | AbstractAuxiliary | AbstractBound):
        fields = {
            f.name: encode(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.init and f.name not in ("start", "along", "data")
        }
        return {"type": type(value).__name__, **fields}
    if isinstance(value, eqx.Module):
        return {"type": "network", "class": type(value).__name__}
    if isinstance(value, Mapping):
        return {"type": "dict", "items": [[k, encode(v)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"type": "tuple", "items": [encode(v) for v in value]}
    return value


def decode(value: Any) -> Any:
    """JSON values -> configuration objects.

    Raises:
        LoadError: a type that hivi does not know.
    """
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    if kind == "dict":
        return {k: decode(v) for k, v in value["items"]}
    if kind == "tuple":
        return tuple(decode(v) for v in value["items"])
    if kind == "network":
        found, cure = f"a network of your own ({value['class']})", "pass hivi.load(folder, family=...) as it was fitted"
        raise LoadError(message("saved run", found, "its code, which is not saved", cure))
    if kind not in KNOWN:
        raise LoadError(message("saved run", f"the type {kind!r}", f"one of {sorted(KNOWN)}", "update hivi"))
    return KNOWN[kind](**{k: decode(v) for k, v in value.items() if k != "type"})


def encode_site(site: Site) -> dict[str, Any]:
    """A site as JSON, its constraint included."""
    plain = dataclasses.asdict(dataclasses.replace(site, support=None))
    return {**plain, "support": None if site.support is None else encode_constraint(site.support)}


def decode_site(raw: dict[str, Any]) -> Site:
    """A site from JSON."""
    local = raw["local"]
    return Site(
        name=raw["name"],
        shape=tuple(raw["shape"]),
        values=Values(**raw["values"]),
        constrained_shape=tuple(raw["constrained_shape"]),
        support=None if raw["support"] is None else decode_constraint(raw["support"]),
        plates=tuple((n, a) for n, a in raw["plates"]),
        local=None if local is None else (Plate(*local[0]), local[1]),
    )


def encode_constraint(constraint: Constraint) -> dict[str, Any]:
    """A NumPyro constraint by class name and parameters."""
    children, (names, aux) = constraint.tree_flatten()
    parts = [encode_constraint(c) if isinstance(c, Constraint) else np.asarray(c).tolist() for c in children]
    return {"class": type(constraint).__name__, "parts": parts, "aux": dict(aux), "names": list(names)}


def decode_constraint(raw: dict[str, Any]) -> Constraint:
    """A NumPyro constraint from its class name, which must be one of NumPyro's own.

    Raises:
        LoadError: an unknown constraint.
    """
    cls = getattr(constraints, raw["class"], None)
    if not (isinstance(cls, type) and issubclass(cls, Constraint)):
        raise LoadError(message("saved run", f"the constraint {raw['class']!r}", "one of NumPyro's", "update NumPyro"))
    children = [decode_constraint(p) if isinstance(p, dict) else jnp.asarray(p) for p in raw["parts"]]
    unflatten: Any = cls.tree_unflatten  # type: ignore[attr-defined]
    return unflatten((tuple(raw["names"]), raw["aux"]), children)


def pack(tree: PyTree) -> dict[str, np.ndarray]:
    """Array leaves by path; random keys as their bits."""
    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_array)):
        name = jax.tree_util.keystr(path)
        raw = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        out[name] = np.array(raw, order="C")  # ascontiguousarray would turn scalars into vectors
    return out


def unpack(tree: PyTree, arrays: Mapping[str, np.ndarray], where: Path) -> PyTree:
    """Put saved arrays in the places of `tree`'s.

    Raises:
        LoadError: an array is missing or has another shape.
    """

    def take(path: Any, leaf: Any) -> Any:
        if not eqx.is_array(leaf):
            return leaf
        name = jax.tree_util.keystr(path)
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        expected = jax.random.key_data(leaf) if is_key else leaf
        found = arrays.get(name)
        if found is None or found.shape != expected.shape:
            what = "no such array" if found is None else f"shape {found.shape}"
            raise LoadError(
                message(
                    f"{where}: {name}",
                    what,
                    f"shape {expected.shape}",
                    "this run was saved for another model or family",
                )
            )
        value = jnp.asarray(found, expected.dtype)
        if is_key:
            return jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
        return jax.device_put(value, leaf.sharding)

    return jax.tree_util.tree_map_with_path(take, tree)


def write(folder: Path, name: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Write `name.safetensors` with its JSON inside, in one atomic replacement."""
    folder.mkdir(parents=True, exist_ok=True)
    target, temporary = folder / f"{name}.safetensors", folder / f".{name}.{os.getpid()}.tmp"
    save_file(dict(arrays), temporary, metadata={"hivi": json.dumps(meta)})
    with temporary.open("rb+") as handle:
        os.fsync(handle.fileno())
    temporary.chmod(
        0o600 | folder.stat().st_mode & 0o044
    )  # as readable as its folder; safetensors keeps it to the owner
    temporary.replace(target)


def read(folder: Path, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `write` wrote.

    Raises:
        LoadError: the file is missing or damaged.
    """
    from safetensors import safe_open

    path = folder / f"{name}.safetensors"
    try:
        with safe_open(path, framework="numpy") as handle:
            meta = json.loads(handle.metadata()["hivi"])
        return load_file(path), meta
    except FileNotFoundError:
        raise LoadError(
            message(str(folder), "no saved run", f"a file {path.name}", "check the folder's name")
        ) from None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise LoadError(
            message(str(path), f"a damaged file ({error})", "a file that hivi wrote", "fit again")
        ) from error


def write_program(folder: Path, name: str, fn: Callable[..., Any], example: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Store `vmap(fn)` of one dict as StableHLO, for any number of draws.

    The plain `jax.jit` only lowers here: options of the compiler count where the program is compiled, by its reader.
    """
    (count,) = jax.export.symbolic_shape("n")
    batched = {k: jax.ShapeDtypeStruct((count, *v.shape), v.dtype) for k, v in example.items()}
    exported = jax.export.export(jax.jit(jax.vmap(fn)), platforms=("cpu", "cuda"))(batched)
    (folder / f"{name}.stablehlo").write_bytes(exported.serialize())


def read_program(folder: Path, name: str) -> Callable[[Any], Any] | None:
    """The stored program, compiled like everything else (`compiled`), or None where there is none."""
    path = folder / f"{name}.stablehlo"
    if not path.exists():
        return None
    exported = jax.export.deserialize(bytearray(path.read_bytes()))

    def program(draws: Any) -> Any:
        return exported.call(draws)

    return compiled(program)


def fingerprint(*things: Any) -> str:
    """Digest of text and arrays: decides whether a checkpoint belongs to this configuration."""
    digest = hashlib.sha256()
    for thing in things:
        for leaf in jax.tree.leaves(thing):
            raw = jax.random.key_data(leaf) if _is_key(leaf) else leaf
            digest.update(f"{getattr(raw, 'shape', '')}{getattr(raw, 'dtype', '')};".encode())
            digest.update(
                np.asarray(raw).tobytes() if eqx.is_array(raw) or isinstance(raw, np.ndarray) else repr(raw).encode()
            )
    return digest.hexdigest()


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
