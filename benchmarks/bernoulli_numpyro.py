"""hivi against NumPyro on the Bernoulli table: the same hierarchical model, r as an extra site, in one run.

Run `python benchmarks/bernoulli_numpyro.py`; it writes `benchmarks/results/bernoulli_numpyro.md`. The table is
p = ((.1, .4), (.4, .1)). Both sides use a planar flow of length 8 for q(lambda), one of length 8 for r(lambda|z) over
a regression on z, 16 draws per step, and Adam at the same learning rate. NumPyro's guide is written by hand, with plates, and
fitted by `TraceGraph_ELBO`. KL(q||p) is exact for both (lambda integrated on the same grid).
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.distributions import constraints, transforms
from numpyro.infer import SVI, TraceGraph_ELBO

import hivi
from hivi._bounds import Elbo
from hivi._families.product import build_proposal
from hivi._fit.step import CHUNK, Plan, default_optimizer, initial_state, run_chunk

TABLE = np.array([[0.1, 0.4], [0.4, 0.1]])
LENGTH, SAMPLES, RATE, SEEDS, STEPS = 8, 16, 0.01, 5, 10_000


def planar(params: dict[str, Any], x: Any) -> tuple[Any, Any]:
    """A stack of planar layers on the last axis; value and log |det|."""
    log_det = jnp.zeros(x.shape[:-1])
    for k in range(LENGTH):
        w, raw, b = params["w"][k], params["u"][k], params["b"][k]
        inner = w @ raw
        u = raw + (jnp.log(1 + jax.nn.softplus(inner)) - 1 - inner) * w / (w @ w)
        act = jnp.tanh(x @ w + b)
        log_det = log_det + jnp.log(jnp.abs(1 + (1 - act**2) * (w @ u)))
        x = x + u * act[..., None]
    return x, log_det


def planar_start(key: Any) -> dict[str, Any]:
    """Near the identity, as hivi starts."""
    k1, k2, k3 = jax.random.split(key, 3)
    w = jax.random.normal(k1, (LENGTH, 2))
    w = w / jnp.linalg.norm(w, axis=-1, keepdims=True)
    u = 1.5132436 * w + 0.01 * jax.random.normal(k2, (LENGTH, 2))
    return {"w": w, "u": u, "b": jax.random.uniform(k3, (LENGTH,), minval=-1.0, maxval=1.0)}


class PlanarTransform(transforms.Transform):
    """The flow of the guide as a NumPyro transform; densities at its own draws use the cached base."""

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, params: dict[str, Any]):
        self.params = params

    def __call__(self, x: Any) -> Any:
        return planar(self.params, x)[0]

    def call_with_intermediates(self, x: Any) -> tuple[Any, Any]:
        y, log_det = planar(self.params, x)
        return y, log_det

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> Any:
        return planar(self.params, x)[1] if intermediates is None else intermediates

    def tree_flatten(self) -> Any:
        return (self.params,), (("params",), {})


class Auxiliary(dist.Distribution):
    """r(lambda | z): an inverse planar flow over a regression on z."""

    support = constraints.real_vector

    def __init__(self, flow: dict[str, Any], mean: Any, log_scale: Any):
        self.flow, self.centre, self.log_scale = flow, mean, log_scale
        super().__init__(event_shape=(2,))

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        return jnp.zeros((*sample_shape, 2))  # only its density is used

    def log_prob(self, value: Any) -> Any:
        base, log_det = planar(self.flow, value)
        return dist.Normal(self.centre, jnp.exp(self.log_scale)).log_prob(base).sum(-1) + log_det


def numpyro_pair(key: Any) -> tuple[Any, Any]:
    """The model (p times r) and the guide (q)."""
    k1, k2 = jax.random.split(key)
    start_q, start_r = planar_start(k1), planar_start(k2)
    log_table = jnp.log(jnp.asarray(TABLE, jnp.float32))

    def model() -> None:
        flow = {n: numpyro.param(f"r_{n}", v) for n, v in start_r.items()}
        mean = numpyro.param("r_mean", jnp.zeros((2, 2)))
        log_scale = numpyro.param("r_log_scale", jnp.zeros((2, 2)))
        with numpyro.plate("i", 2):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.factor("table", log_table[z[0], z[1]] - 2 * jnp.log(0.5))
        rows = jnp.arange(2)
        numpyro.sample("lam", Auxiliary(flow, mean[rows, z], log_scale[rows, z]))

    def guide() -> None:
        flow = {n: numpyro.param(f"q_{n}", v) for n, v in start_q.items()}
        base = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
        lam = numpyro.sample("lam", dist.TransformedDistribution(base, PlanarTransform(flow)))
        with numpyro.plate("i", 2):
            numpyro.sample("z", dist.Bernoulli(logits=lam))

    return model, guide


def exact_kl(prior_map: Any) -> float:
    """KL(q||p) with q(z) integrated over the base noise on a fine grid, in float64."""
    u = np.linspace(-7, 7, 800)
    grid = np.stack(np.meshgrid(u, u, indexing="ij"), -1).reshape(-1, 2)
    lam = np.asarray(jax.jit(prior_map)(jnp.asarray(grid, jnp.float32)), float)
    weight = np.exp(-0.5 * (grid**2).sum(-1)) / (2 * np.pi) * (u[1] - u[0]) ** 2
    p = 0.5 * (1 + np.tanh(lam / 2))
    p = np.stack([1 - p, p], -1)
    q = np.einsum("n,na,nb->ab", weight, p[:, 0], p[:, 1])
    return float((q * np.log(q / TABLE)).sum())


def run_numpyro(seed: int, *, decay: bool = False) -> dict[str, Any]:
    """Compile time, time per step, and the KL at the end; with Adam as it comes, or with a cosine decay like hivi's."""
    model, guide = numpyro_pair(jax.random.key(seed))
    cosine = optax.join_schedules(
        [optax.constant_schedule(RATE), optax.cosine_decay_schedule(RATE, int(0.4 * STEPS), 0.03)], [int(0.6 * STEPS)]
    )
    optimizer = optax.adam(cosine if decay else RATE)
    svi = SVI(model, guide, optimizer, TraceGraph_ELBO(num_particles=SAMPLES))
    state = svi.init(jax.random.key(seed + 100))

    @jax.jit
    def chunk(s: Any) -> Any:
        return jax.lax.scan(lambda c, _: (svi.update(c)[0], None), s, None, length=CHUNK)[0]

    return measure(lambda s: chunk(s), state, lambda s: _numpyro_kl(svi, s))


def _numpyro_kl(svi: SVI, state: Any) -> float:
    params = svi.get_params(state)
    flow = {n: params[f"q_{n}"] for n in ("w", "u", "b")}
    return exact_kl(lambda x: planar(flow, x)[0])


def run_hivi(seed: int) -> dict[str, Any]:
    """The same for hivi."""
    log_table = jnp.log(jnp.asarray(TABLE, jnp.float32))
    target = hivi.from_log_joint(
        lambda z: log_table[z["z"][0], z["z"][1]], latents={"z": hivi.Latent((2,), constraints.boolean)}
    )
    family = hivi.Hierarchical(prior=hivi.Flow(LENGTH), auxiliary=hivi.InverseFlow(LENGTH))
    proposal = build_proposal(family, target.sites, jax.random.key(seed))
    strategies = tuple(hivi.Auto().resolve(target, proposal, Elbo()).items())
    plan = Plan(strategies, Elbo(), SAMPLES, default_optimizer(RATE), True, None)
    state = initial_state(proposal, target, plan, jax.random.key(seed + 100), STEPS)

    def kl(s: Any) -> float:
        prior: Any = s.average.prior
        return exact_kl(jax.vmap(lambda e: prior.from_coordinates(e)[0]["lam"]))

    return measure(lambda s: run_chunk.at("full")(s, target, plan, jnp.array(STEPS, jnp.int32))[0], state, kl)


def measure(chunk: Any, state: Any, kl: Any) -> dict[str, Any]:
    """First chunk = compilation; then `STEPS` steps, with the median time per step."""
    began = time.perf_counter()
    jax.block_until_ready(eqx.filter(chunk(state), eqx.is_array))
    first = time.perf_counter() - began
    times = []
    for _ in range(STEPS // CHUNK):
        began = time.perf_counter()
        state = chunk(state)
        jax.block_until_ready(eqx.filter(state, eqx.is_array))
        times.append(time.perf_counter() - began)
    step = statistics.median(times) / CHUNK
    return {"compile": first - statistics.median(times), "step": step, "wall": sum(times), "kl": kl(state)}


def main() -> None:
    """Alternate the two, five seeds each; write medians and ratios."""
    jax.clear_caches()
    sides = {
        "hivi": run_hivi,
        "NumPyro": run_numpyro,
        "NumPyro, cosine decay": functools.partial(run_numpyro, decay=True),
    }
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for seed in range(SEEDS):
        for name, run in sides.items():
            jax.clear_caches()  # every seed compiles anew, on both sides
            rows[name].append(run(seed))
            print(name, seed, rows[name][-1], file=sys.stderr, flush=True)
    medians = {n: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for n, rs in rows.items()}
    h, n = medians["hivi"], medians["NumPyro"]
    lines = [
        "# Bernoulli table: hivi against NumPyro `TraceGraph_ELBO`",
        "",
        f"Command: `python benchmarks/bernoulli_numpyro.py`. Medians of {SEEDS} seeds, one run, CPU,",
        f"{STEPS} steps of {SAMPLES} draws;",
        f"hivi {hivi.__version__}, NumPyro {numpyro.__version__}, JAX {jax.__version__}.",
        "",
        "| | compile, s | ms per step | seconds for all steps | exact KL(q‖p), nats |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {m['compile']:.2f} | {1e3 * m['step']:.3f} | {m['wall']:.1f} | {m['kl']:.2e} |"
            for name, m in medians.items()
        ),
        f"| ratio hivi / NumPyro | {h['compile'] / n['compile']:.2f} | {h['step'] / n['step']:.2f} | {h['wall'] / n['wall']:.2f} "
        f"| {h['kl'] / n['kl']:.3f} |",
        "",
        "KL of each seed: "
        + "; ".join(f"{name} {', '.join(format(r['kl'], '.1e') for r in rs)}" for name, rs in rows.items())
        + ".",
    ]
    out = Path(__file__).parent / "results" / "bernoulli_numpyro.md"
    out.parent.mkdir(exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
