"""Run by `test_several_devices.py` in a process of its own, where the host is eight devices."""

from __future__ import annotations

import json
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpyro.infer import SVI

from ppl_estimators import Enumerate, MovingAverage, Reinforce
from ppl_estimators.numpyro import EstimatorELBO, with_estimators

SIZE = 16
SPLIT, WHOLE = PartitionSpec("devices"), PartitionSpec()


def model(x: Any) -> None:
    b = numpyro.param("b", jnp.array(0.5))
    with numpyro.plate("data", SIZE, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(z * b, 1.0), obs=x)


def guide(x: Any) -> None:
    a = numpyro.param("a", jnp.array([0.4, 0.1]))
    with numpyro.plate("data", SIZE, subsample_size=len(x)):
        numpyro.sample("z", dist.Bernoulli(logits=a[0] + a[1] * x))


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    params = {"a": jnp.array([0.4, 0.1]), "b": jnp.array(0.5)}
    x = jnp.asarray(np.random.default_rng(0).normal(size=SIZE))
    key = jax.random.key(3)

    def spread(f: Any, keys: Any) -> Any:
        return jax.vmap(f)(jax.lax.with_sharding_constraint(keys, NamedSharding(mesh, SPLIT)))

    def evaluated(elbo: EstimatorELBO, x: Any, which: Any = guide) -> Any:
        def loss(p: Any) -> Any:
            found = elbo.loss_with_mutable_state(key, p, model, which, x)
            return found["loss"], found["mutable_state"]

        (value, state), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return value, gradient, state

    def apart(a: Any, b: Any) -> float:
        return max(float(jnp.abs(u - v).max()) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    found: dict[str, float] = {"devices": len(jax.devices())}
    there = jax.device_put(x, NamedSharding(mesh, SPLIT))
    one = evaluated(EstimatorELBO(num_particles=8), x)  # each the others' baseline
    found["data"] = apart(one, evaluated(EstimatorELBO(num_particles=8), there))
    found["particles"] = apart(one, evaluated(EstimatorELBO(num_particles=8, vectorize_particles=spread), x))
    kept = with_estimators(guide, {"z": Reinforce(MovingAverage())})
    found["state, data"] = apart(evaluated(EstimatorELBO(), x, kept), evaluated(EstimatorELBO(), there, kept))

    exact = EstimatorELBO(Enumerate(), average_model=True)  # so that what each device draws does not matter

    def local(p: Any, x: Any) -> Any:
        return jax.lax.pmean(exact.loss(key, p, model, guide, x), "devices")

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(WHOLE, SPLIT), out_specs=WHOLE)
    found["shard_map"] = apart(evaluated(exact, x)[1], jax.jit(jax.grad(sharded))(params, x))

    # a checkpoint of eight devices goes on on one
    svi = SVI(model, kept, numpyro.optim.Adam(0.05), EstimatorELBO())
    update = jax.jit(svi.update)
    state, _ = update(svi.init(jax.random.key(0), there), there)
    saved = pickle.dumps(jax.tree.map(np.asarray, state._replace(rng_key=jax.random.key_data(state.rng_key))))
    alone = jax.tree.map(jnp.asarray, pickle.loads(saved))
    alone, _ = update(alone._replace(rng_key=jax.random.wrap_key_data(alone.rng_key)), x)
    state, _ = update(state, there)
    found["checkpoint"] = max(apart(svi.get_params(state), svi.get_params(alone)),
                              apart(state.mutable_state, alone.mutable_state))  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
