"""Programs that users of NumPyro really write: what the walker sees of a jaxpr, distributions whose claims are wrong,
models and guides that do not match, JAX's own modes."""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import lax, random
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.distributions import constraints
from numpyro.distributions.transforms import AffineTransform, ExpTransform, Transform
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from ppl_estimators import (
    ARMS,
    ControlVariate,
    DisARM,
    Enumerate,
    EstimatorError,
    EstimatorWarning,
    EvidenceLowerBound,
    ImportanceWeighted,
    LeaveOneOut,
    MovingAverage,
    Pathwise,
    Reinforce,
    StickingTheLanding,
)
from ppl_estimators.numpyro import EstimatorELBO, dependencies
from ppl_estimators.numpyro.dependencies import mark, scan_layout
from ppl_estimators.numpyro.distributions import reparameterised
from ppl_estimators.numpyro.gradients import plan_of
from ppl_estimators.testing import exact_gradient

# ---- the walker ----------------------------------------------------------------------------------------------------


class Flat:
    """A flat tree as JAX 0.11 has it: it knows its parts, and how many leaves each has."""

    def __init__(self, *parts: int | Flat):
        self.parts = parts

    def __len__(self) -> int:
        return sum(p if isinstance(p, int) else len(p) for p in self.parts)

    def unpack(self) -> tuple[Any, ...]:
        return tuple(Flat(p) if isinstance(p, int) else p for p in self.parts)


LAYOUTS = {
    "numbers": {"num_consts": 2, "num_carry": 1},
    "tuples": {"ft_in": ((None, (None,)), (None,), (None,)), "ft_out": ((None,), (None, None))},
    "flat trees": {"ft_in": Flat(2, 1, 1), "ft_out": Flat(1, 2)},
}
UNKNOWN = {
    "nothing": {},
    "no tree": {"ft_in": 3},
    "two parts": {"ft_in": ((None, None), (None,))},
    "more than goes in": {"num_consts": 7, "num_carry": 1},
    "names": {"num_consts": "two", "num_carry": "one"},
}


def equation(fn: Any, *args: Any) -> Any:
    """The last operation of a program."""
    return jax.make_jaxpr(fn)(*args).eqns[-1]


def a_scan(a: Any, b: Any, c: Any, x: Any) -> Any:
    """a moves the carry, b the second output, x the first one."""

    def body(c: Any, x: Any) -> Any:
        return c * a, (2.0 * x, b + mark(jnp.sin(a), "inside"))

    return jax.lax.scan(body, c, x)


def followed(eqn: Any, params: dict[str, Any]) -> list[frozenset[str]]:
    params = {k: v for k, v in eqn.params.items() if k not in ("num_consts", "num_carry", "ft_in", "ft_out")} | params
    return dependencies._Values().equation(eqn.replace(params=params), [frozenset([n]) for n in "abcx"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_scan_is_followed_whatever_way_its_equation_says_what_goes_where(layout):
    eqn = equation(a_scan, 1.0, 2.0, 3.0, jnp.arange(3.0))
    assert scan_layout(LAYOUTS[layout]) == (2, 1)
    expected = [{"a", "c"}, {"x"}, {"a", "b", "inside"}]
    assert followed(eqn, LAYOUTS[layout]) == expected
    assert dependencies._Values().equation(eqn, [frozenset([n]) for n in "abcx"]) == expected  # of this JAX


@pytest.mark.parametrize("layout", UNKNOWN)
def test_a_scan_of_unknown_layout_depends_on_all_that_goes_in_and_all_that_is_drawn_inside(layout):
    eqn = equation(a_scan, 1.0, 2.0, 3.0, jnp.arange(3.0))
    assert followed(eqn, UNKNOWN[layout]) == [frozenset(["a", "b", "c", "x", "inside"])] * 3


def test_loops_and_branches_of_unknown_layout_depend_on_all_that_goes_in():
    loop = equation(lambda a, b: jax.lax.while_loop(lambda c: c[0] < b, lambda c: (c[0] + 1, c[1]), (a, a)), 1.0, 2.0)
    branch = equation(lambda a, b: jax.lax.cond(a > 0, lambda: b, lambda: mark(2.0 * b, "inside")), 1.0, 2.0)
    seen = dependencies._Values()
    for eqn, spoiled in ((loop, {"cond_nconsts": None}), (loop, {"body_jaxpr": 1}), (branch, {"branches": ()})):
        inputs = [frozenset([i]) for i in range(len(eqn.invars))]
        everything = frozenset(range(len(eqn.invars)))
        lost = seen.equation(eqn.replace(params={**eqn.params, **spoiled}), inputs)
        assert all(everything <= out for out in lost)
        assert len(lost) == len(eqn.outvars)
    assert "inside" in seen.equation(branch, [frozenset()] * len(branch.invars))[0]


def program() -> dict[str, Any]:
    """Values that come out of everything JAX has for keeping one from being followed, and their way back."""
    a, b, c, d = (mark(jnp.asarray(0.3), n) for n in "abcd")
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    box = jax.new_ref(jnp.zeros(3))
    box[0] = a
    kept: list[Any] = []
    jax.experimental.io_callback(lambda x: kept.append(x), None, b, ordered=True)

    @jax.custom_vjp
    def solved(x: Any) -> Any:
        return jax.pure_callback(np.asarray, shape, x)

    solved.defvjp(lambda x: (solved(x), x), lambda x, g: (g,))
    return {
        "mutable": box[:],
        "kept outside": jax.experimental.io_callback(lambda: kept[-1], shape, ordered=True),
        "loop": jax.lax.while_loop(lambda s: s[0] < c, lambda s: (s[0] + 1, s[1] * a, s[2]), (0.0, 1.0, b)),
        "own derivative": solved(d),
        "simulator": jax.pure_callback(np.asarray, shape, jax.lax.stop_gradient(d) + a),
        "steps": jnp.floor(d) + (d > 0) + jax.lax.scan(lambda s, x: (s * x, None), 1.0, jnp.ones(3) * d)[0],
    }


def test_what_cannot_be_followed_depends_on_all_that_went_in():
    of = dependencies.dependencies(program).of
    assert of["mutable"] >= {"a"}
    assert of["kept outside"] >= {"b"}
    assert of["loop"] == ({"c"}, {"a", "c"}, {"b"})
    assert of["own derivative"] == {"d"}
    assert of["simulator"] == {"a", "d"}
    assert of["steps"] == {"d"}


def by_custom_rule(z: Any) -> Any:
    @jax.custom_vjp
    def square(x: Any) -> Any:
        return x**2

    square.defvjp(lambda x: (x**2, None), lambda _, slope: (0.0 * slope,))
    return square(z)


def by_custom_tangent(z: Any) -> Any:
    @jax.custom_jvp
    def sine(x: Any) -> Any:
        return jnp.sin(x)

    sine.defjvp(lambda x, t: (sine(*x), 0.0 * t[0]))
    return sine(z)


def by_late_carry(z: Any) -> Any:
    return lax.scan(lambda c, _: ((c[1], c[2], c[2]), c[0]), (0.0, 0.0, z), None, length=4)[1][3]


def by_custom_root(z: Any) -> Any:
    def newton(f: Any, start: Any) -> Any:
        return lax.fori_loop(0, 8, lambda _, x: x - f(x) / (3 * x**2 + 1), start)

    return lax.custom_root(lambda x: x**3 + x - z, 0.1, newton, lambda g, y: y / g(1.0))


def by_shards(z: Any) -> Any:
    mesh, everywhere = jax.make_mesh((1,), ("i",)), jax.sharding.PartitionSpec()
    return jax.shard_map(lambda x: lax.psum(x, "i"), mesh=mesh, in_specs=everywhere, out_specs=everywhere)(z)


def by_sums(z: Any) -> Any:
    return lax.associative_scan(jnp.add, z * jnp.arange(3.0))[2]


#: ways from a whole number 0 ... 3 to a cost
WAYS: dict[str, Callable[[Any], Any]] = {
    "test of a loop": lambda z: lax.while_loop(lambda s: s < z, lambda s: s + 0.7, 0.1),
    "body of a loop": lambda z: lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] + z), (0, 0.0))[1],
    "length of a loop": lambda z: lax.fori_loop(0, z.astype(int), lambda i, s: s + 0.3 * i + 1, 0.0),
    "fixed loop": lambda z: lax.fori_loop(0, 2, lambda i, s: s + z * i, 0.0),
    "loop in a map": lambda z: jax.vmap(lambda x: lax.while_loop(lambda s: s < x, lambda s: s + 1.0, 0.0))(z[None])[0],
    "carry of a later step": by_late_carry,
    "custom_vjp": by_custom_rule,
    "custom_jvp": by_custom_tangent,
    "pure_callback": lambda z: jax.pure_callback(
        np.square, jax.ShapeDtypeStruct((), jnp.float32), z.astype(jnp.float32), vmap_method="expand_dims"
    ),
    "checkpoint": jax.checkpoint(jnp.sin),
    "associative_scan": by_sums,
    "shard_map": by_shards,
    "custom_root": by_custom_root,
    "switch": lambda z: lax.switch(z.astype(int), [lambda v=v: v for v in (0.3, 1.7, -0.4, 2.2)]),
    "cond": lambda z: lax.cond(z > 1.5, lambda: 1.1, lambda: 0.2),
    "map": lambda z: lax.map(jnp.sin, z * jnp.arange(2.0))[1],
    "reduce": lambda z: lax.reduce(jnp.stack([z, z]), np.array(0.0, z.dtype), lambda a, b: a + b + a * b, (0,)),
    "sort": lambda z: jnp.sort(z * jnp.array([1.0, -2.0, 3.0]))[2],
    "place in an order": lambda z: jnp.argsort(jnp.array([1.2, 2.4]) - z * jnp.array([1.0, 2.0]))[0] * 1.0,
    "index written to": lambda z: jnp.zeros(4).at[z.astype(int)].set(2.0)[1],
    "slice": lambda z: lax.dynamic_slice(jnp.arange(5.0), (z.astype(int),), (2,)).sum(),
    "seed": lambda z: random.uniform(random.key(z.astype(int))),
    "bits": lambda z: (lax.bitcast_convert_type(z.astype(jnp.float32), jnp.int32) > 2**30) * 0.6,
    "solver": lambda z: jnp.linalg.solve(jnp.eye(2) * (1 + z), jnp.ones(2))[0],
    "derivative": lambda z: jax.hessian(lambda x: x**4)(z) / 9,
}


def test_whatever_way_a_value_takes_to_a_cost_the_cost_counts(double_precision: None) -> None:
    """The gradient over every value is that of their sum, from one draw; and no cost counts for a site beside it."""

    def model() -> None:
        numpyro.sample("beside", dist.Bernoulli(0.3))
        z = numpyro.sample("z", dist.Categorical(jnp.array([0.1, 0.2, 0.3, 0.4]))).astype(float)
        for name, way in WAYS.items():
            numpyro.sample(name, dist.Normal(way(z).astype(float), 1.0), obs=0.4)

    def guide() -> None:
        numpyro.sample("beside", dist.Bernoulli(0.6))
        numpyro.sample("z", dist.Categorical(logits=numpyro.param("a", jnp.zeros(4))))

    def exact(a: Any) -> Any:
        log_q = jax.nn.log_softmax(a)
        return jnp.exp(log_q) @ (log_q - jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])) + costs)

    values = jnp.arange(4.0)
    of_ways = np.asarray(jax.jit(jax.vmap(lambda z: jnp.stack([way(z) for way in WAYS.values()])))(values))  # [4, ways]
    assert (np.ptp(of_ways, 0) > 0).all()
    costs = 0.5 * ((of_ways - 0.4) ** 2).sum(1)
    a, elbo = jnp.array([0.4, -0.3, 0.8, 0.1]), EstimatorELBO({"z": Enumerate()})
    found = jax.jit(jax.grad(lambda a: elbo.loss(random.key(0), {"a": a}, model, guide)))(a)
    np.testing.assert_allclose(found, jax.jit(jax.grad(exact))(a), rtol=1e-9)
    depends_on = plan_of(elbo, {"a": a}, model, guide, (), {}).depends_on
    assert {name: depends_on["model", name] for name in WAYS} == dict.fromkeys(WAYS, frozenset("z"))


def test_operations_without_a_derivative_are_found_on_the_way_to_a_drawn_value():
    stuck = dependencies.dependencies(lambda: {k: v for k, v in program().items() if k != "kept outside"}).stuck
    assert stuck.pop("b") == "io_callback"
    assert re.fullmatch("pure_callback|while loop", stuck.pop("a"))
    assert not stuck  # neither c, which only decides how often, nor d, whose way has a derivative or carries none


# ---- distributions that a user writes ------------------------------------------------------------------------------


class Written(dist.Distribution):
    """A distribution of one parameter that declares no arg_constraints, so that NumPyro takes it to be
    reparameterised."""

    support = constraints.real

    def __init__(self, a: Any):
        self.a = a
        super().__init__(jnp.shape(a), ())

    def log_prob(self, value: Any) -> Any:
        return dist.Normal(self.a, 1.0).log_prob(value)


class Shifted(Written):
    """Has the derivative that it claims, beside a comparison that changes nothing."""

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        noise = random.normal(key, (*sample_shape, *self.batch_shape))
        return jnp.where(noise > self.a, noise + self.a, self.a + noise)


class StraightThrough(Written):
    """A derivative made up for draws of a discrete support."""

    support = constraints.nonnegative_integer

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        soft = random.normal(key, (*sample_shape, *self.batch_shape)) + self.a
        return soft + jax.lax.stop_gradient(jnp.round(jnp.abs(soft)) - soft)


TABLE = jnp.linspace(-2.0, 2.0, 9)


class ByTable(Written):
    """Data decides, the parameter moves."""

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        noise = random.normal(key, (*sample_shape, *self.batch_shape))
        return jnp.searchsorted(TABLE, noise) + self.a


class Stopped(Written):
    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        return random.normal(key, (*sample_shape, *self.batch_shape)) + jax.lax.stop_gradient(self.a)


class Rejected(Written):
    """Tries until the draw lies above -1: the number of tries depends on a, and has no derivative."""

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        def again(state: Any) -> Any:
            key, _ = state
            key, use = random.split(key)
            return key, random.normal(use) + self.a

        return jax.lax.while_loop(lambda s: s[1] < -1.0, again, (key, jnp.asarray(-2.0)))[1]


class Simulated(Written):
    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(lambda a, u: np.float32(a + u), shape, self.a, random.normal(key))


class Mixed(Written):
    """Two bumps at -loc and +loc: a derivative in ``loc``, none in the weight."""

    def __init__(self, a: Any, loc: Any):
        self.loc = loc
        super().__init__(a)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        side = jnp.where(random.bernoulli(key, jax.nn.sigmoid(self.a)), 1.0, -1.0)
        return self.loc * side + random.normal(key)


class Ranks(Written):
    """Integers 0 ... 3 with probabilities in proportion to exp(-a k)."""

    support = constraints.nonnegative_integer

    def log_probs(self) -> Any:
        return jax.nn.log_softmax(-jnp.asarray(self.a)[..., None] * jnp.arange(4.0), -1)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        return random.categorical(key, self.log_probs(), shape=(*sample_shape, *self.batch_shape))

    def log_prob(self, value: Any) -> Any:
        return jnp.take_along_axis(self.log_probs(), jnp.asarray(value)[..., None].astype(int), -1)[..., 0]


class FloatRanks(Ranks):
    """The same as floating-point numbers, on a support that says nothing of it."""

    support = constraints.real

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        return super().sample(key, sample_shape).astype(float)


class Rounded(Transform):
    domain = codomain = constraints.real

    def __call__(self, x: Any) -> Any:
        return jnp.round(x)

    def _inverse(self, y: Any) -> Any:
        return y

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> Any:
        return jnp.zeros_like(x)

    def tree_flatten(self) -> Any:
        return (), ((), {})


def rounded(a: Any) -> dist.Distribution:
    return dist.TransformedDistribution(dist.Normal(a, 1.0), [AffineTransform(a, 1.0), Rounded()])


CLAIMS: dict[str, tuple[Callable[[Any], dist.Distribution], bool]] = {
    "shifted": (Shifted, True),
    "shifted in a plate": (lambda a: Shifted(a).expand([3]).to_event(1), True),
    "stopped": (Stopped, False),
    "straight through": (StraightThrough, False),
    "rejected": (Rejected, False),
    "simulated": (Simulated, False),
    "mixed": (lambda a: Mixed(0.5, a), True),
    "mixed, each its own": (lambda a: Mixed(jnp.sin(a), jnp.cos(a)), False),
    "integers": (Ranks, False),
    "integers as floats": (FloatRanks, False),
    "rounded": (rounded, False),
    "Normal": (lambda a: dist.Normal(a, 1.0), True),
    "Gamma": (lambda a: dist.Gamma(jnp.exp(a), 1.0), True),
    "log-normal by hand": (lambda a: dist.TransformedDistribution(dist.Normal(a, 1.0), ExpTransform()), True),
    "point": (lambda a: dist.Delta(a), True),
    "point of integers": (lambda a: dist.Delta(jnp.asarray(3)), True),
    "Poisson": (lambda a: dist.Poisson(jnp.exp(a)), False),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_what_a_distribution_claims_of_its_draws_is_checked(name):
    make, right = CLAIMS[name]
    found = []
    jax.make_jaxpr(lambda a: found.append(reparameterised(make(a))))(0.4)
    assert found == [right]
    assert reparameterised(make(jnp.asarray(0.4))) is right  # outside of any trace as well


def test_data_that_a_sampler_looks_up_needs_no_derivative():
    found = []
    jax.make_jaxpr(lambda a: found.append(reparameterised(ByTable(a))))(0.4)
    assert found == [True]


def loss(model: Any, guide: Any, params: Any = None, **kwargs: Any) -> Any:
    """An update is planned and traced, and nothing computed."""
    elbo = EstimatorELBO(**kwargs)
    return jax.eval_shape(jax.value_and_grad(lambda p: elbo.loss(random.key(0), p, model, guide)), params or {})[0]


def of_one_site(law: Callable[[Any], dist.Distribution]) -> tuple[Callable[[], None], Callable[[], None]]:
    def model() -> None:
        z = numpyro.sample("z", law(jnp.asarray(1.0)))
        numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=2.0)

    def guide() -> None:
        numpyro.sample("z", law(numpyro.param("a", jnp.asarray(0.4))))

    return model, guide


def gradient(elbo: Any, model: Any, guide: Any, params: dict[str, Any], keys: int) -> dict[str, Any]:
    """Its mean over as many keys."""

    def loss(p: dict[str, Any], key: Any) -> Any:
        return elbo.loss(key, p, model, guide)

    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, random.split(random.key(3), keys))
    return jax.tree.map(lambda x: (x.mean(0), x.std(0) / keys**0.5), each)


@pytest.mark.parametrize("law", [Ranks, FloatRanks])
def test_a_users_discrete_distribution_gets_its_gradient_by_default(law):
    def exact(a: Any) -> Any:
        k = jnp.arange(4)
        log_q, log_p = law(a[None]).log_prob(k), law(jnp.ones(1)).log_prob(k) + dist.Normal(2.0 * k, 1.0).log_prob(2.0)
        return -jnp.sum(jnp.exp(log_q) * (log_p - log_q))

    a = jnp.asarray(0.4)
    mean, error = gradient(EstimatorELBO(num_particles=8), *of_one_site(law), {"a": a}, 4000)["a"]
    right = jax.grad(exact)(a)
    assert abs(mean - right) < 5 * error
    assert error < 0.02 * abs(right)


@pytest.mark.parametrize("law", [Ranks, Stopped, rounded])
def test_pathwise_asked_for_without_a_derivative_is_refused(law):
    model, guide = of_one_site(law)
    with pytest.raises(EstimatorError, match=r"site 'z': Pathwise needs a reparameterisable .*Reinforce\(LeaveOneOut"):
        EstimatorELBO({"z": Pathwise()}).loss(random.key(0), {"a": jnp.asarray(0.4)}, model, guide)


class Unsaid(Written):
    """Declares the real line, and has a density on (0, width)."""

    support = constraints.real

    def __init__(self, power: Any, width: Any):
        self.power, self.width = power, width
        super().__init__(width)

    def sample(self, key: Any, sample_shape: Any = ()) -> Any:
        return jax.lax.stop_gradient(self.width * random.uniform(key, sample_shape))

    def log_prob(self, value: Any) -> Any:
        x = value / self.width
        density = jnp.log1p(self.power) + self.power * jnp.log(jnp.where((x > 0) & (x < 1), x, 1.0))
        return jnp.where((x > 0) & (x < 1), density - jnp.log(self.width), -jnp.inf)


def test_an_end_that_no_support_declares():
    with pytest.raises(EstimatorError, match=r"site 'z': the support of Unsaid moves .* Draw it in fixed bounds"):
        loss_of(lambda a: Unsaid(1.0, a))
    assert loss_of(lambda a: Unsaid(a, 1.0)).shape == ()


MOVING: dict[str, Callable[[Any], dist.Distribution]] = {
    "Uniform": lambda a: dist.Uniform(0.0, a),
    "in a plate": lambda a: dist.Uniform(-1.0, a).expand([2]).to_event(1),
    "Pareto": lambda a: dist.Pareto(a, 2.0),
    "truncated": lambda a: dist.TruncatedNormal(0.0, 1.0, low=-a),
    "shifted": lambda a: dist.TransformedDistribution(dist.Exponential(1.0), AffineTransform(a, 1.0)),
    "stretched": lambda a: dist.TransformedDistribution(dist.Uniform(0.0, 1.0), AffineTransform(0.0, a)),
    "inside": lambda a: dist.TransformedDistribution(dist.Uniform(0.0, a), ExpTransform()),
    "shifted log-normal": lambda a: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), [ExpTransform(), AffineTransform(a, 1.0)]
    ),
}
STANDING: dict[str, Callable[[Any], dist.Distribution]] = {
    "bounds of arrays": lambda a: dist.Uniform(jnp.zeros(2), jnp.ones(2)).to_event(1),
    "truncated": lambda a: dist.TruncatedNormal(a, 1.0, low=-1.0, high=jnp.asarray(2.0)),
    "Pareto": lambda a: dist.Pareto(1.0, a),
    "stretched": lambda a: dist.TransformedDistribution(dist.Exponential(1.0), AffineTransform(0.0, a)),
    "log-normal": lambda a: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), [AffineTransform(a, a), ExpTransform()]
    ),
    "affine": lambda a: dist.TransformedDistribution(dist.Normal(0.0, 1.0), AffineTransform(a, a)),
    "Binomial": lambda a: dist.Binomial(3, jax.nn.sigmoid(a)),
}
SCORES = [Reinforce(MovingAverage()), Reinforce(LeaveOneOut()), ControlVariate(jnp.sin, lambda d: d.mean, 1.0)]
LEFT_OUT = StickingTheLanding()  # its part of -log q has the mean that the score would have


def loss_of(law: Any, estimators: Any = None) -> Any:
    def model() -> None:
        numpyro.sample("z", law(jnp.asarray(0.4)))

    def guide() -> None:
        numpyro.sample("z", law(numpyro.param("a", 0.4)))

    return loss(model, guide, {"a": 0.4}, estimators=estimators, num_particles=2)


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("estimator", [*SCORES, LEFT_OUT], ids=repr)
def test_a_support_that_moves_has_no_score_function(name, estimator):
    with pytest.raises(EstimatorError, match=r"site 'z': the support of \w+ moves .* Use Pathwise\(\) here"):
        loss_of(MOVING[name], {"z": estimator})
    assert loss_of(MOVING[name]).shape == ()  # the fix


@pytest.mark.parametrize("name", STANDING)
def test_a_support_that_stands_has_one(name):
    assert loss_of(STANDING[name], {"z": Reinforce(LeaveOneOut())}).shape == ()


@pytest.mark.parametrize("upstream", [Pathwise(), Reinforce(LeaveOneOut())], ids=repr)
def test_a_support_that_a_continuous_draw_moves(upstream):
    """Whether the draw upstream is differentiated is decided later, so that both are refused; a bit never is."""

    def program(law: Callable[[], dist.Distribution]) -> Callable[[], None]:
        def both() -> None:
            w = numpyro.sample("w", law())
            numpyro.sample("z", dist.Uniform(0.0, 1.0 + w**2))

        return both

    score = Reinforce(LeaveOneOut())
    continuous, bit = program(lambda: dist.Normal(0.0, 1.0)), program(lambda: dist.Bernoulli(0.3))
    with pytest.raises(EstimatorError, match="site 'z': the support of Uniform moves"):
        loss(continuous, continuous, estimators={"w": upstream, "z": score}, num_particles=2)
    assert loss(bit, bit, estimators={"w": Enumerate(), "z": score}, num_particles=2).shape == ()


def test_autonormal_where_the_constraint_changes_the_shape():
    """Over simplexes in a plate and outside, and numbers that sum to zero: the loss of Trace_ELBO."""

    def model() -> None:
        p = numpyro.sample("p", dist.Dirichlet(jnp.ones(4)))
        s = numpyro.sample("s", dist.ZeroSumNormal(1.0, (3,)))
        with numpyro.plate("rows", 5):
            r = numpyro.sample("r", dist.Dirichlet(jnp.ones(2)))
        numpyro.sample("x", dist.Normal(p.max() + s.max() + r[:, 0].sum(), 1.0), obs=0.2)

    guide = AutoNormal(model)
    svi = SVI(model, guide, optax.adam(0.01), EstimatorELBO())
    params = svi.get_params(svi.init(random.key(0)))

    def losses(elbo: Any) -> Any:
        each = jax.vmap(lambda key: elbo.loss(key, params, model, guide))
        return jax.jit(each)(random.split(random.key(1), 500))

    stock, ours = losses(Trace_ELBO()), losses(EstimatorELBO())
    assert abs(stock.mean() - ours.mean()) < 5 * math.hypot(stock.std(), ours.std()) / 500**0.5


# ---- model and guide that do not match -----------------------------------------------------------------------------


def normal(name: str, *shape: int, plates: dict[str, tuple[int, ...]] | None = None, event: int = 0) -> Any:
    """A program with one Normal site inside ``plates`` {name: (size, dim or None, subsample or None)}."""

    def program() -> None:
        opened = [numpyro.plate(n, size, sub, dim=dim) for n, (size, dim, sub) in (plates or {}).items()]
        with handlers.scale(scale=1.0):
            for p in opened:
                p.__enter__()
            numpyro.sample(name, dist.Normal(jnp.zeros(shape), 1.0).to_event(event))
            for p in reversed(opened):
                p.__exit__(None, None, None)

    return program


SQUARE = {"a": (3, -2, None), "b": (3, -1, None)}
DISAGREE = {
    "shapes": (normal("u"), normal("u", 3), r"site 'u': shape \(3,\) in the guide, \(\) in the model"),
    "event dimensions": (normal("u", 3), normal("u", 3, event=1), r"site 'u': 1 event dimensions in the guide, 0 in"),
    "dims of plates": (
        normal("u", plates=SQUARE),
        normal("u", plates={"a": (3, -1, None), "b": (3, -2, None)}),
        r"site 'u': plate '[ab]' is dimension -\d in the guide, -\d in the model",
    ),
    "subsampled plates": (
        normal("u", plates={"rows": (6, None, 3)}),
        normal("u", plates={"lines": (6, None, 3)}),
        r"site 'u': plate 'lines' of the guide and plate 'rows' of the model subsample different",
    ),
    "sizes of plates": (
        normal("u", plates={"rows": (6, None, 3)}),
        normal("u", plates={"rows": (3, None, None)}),
        r"plate 'rows': 3 of 3 elements in the guide, 3 of 6 elements in the model",
    ),
}


@pytest.mark.parametrize("name", DISAGREE)
def test_model_and_guide_that_disagree_on_a_latent_site(name):
    model, guide, message = DISAGREE[name]
    with pytest.raises(EstimatorError, match=message):
        loss(model, guide)


def test_a_shape_that_disagrees_is_named_before_the_model_fails_on_it():
    def model() -> None:
        u = numpyro.sample("u", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(jnp.eye(2) @ u, 1.0).to_event(1), obs=jnp.zeros(2))

    with pytest.raises(EstimatorError, match=r"site 'u': shape \(3,\) in the guide, \(2,\) in the model"):
        loss(model, normal("u", 3, event=1))


def test_auxiliary_sites_that_the_model_has_and_others_that_it_lacks():
    def marked() -> None:
        numpyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})

    with pytest.warns(EstimatorWarning, match="site 'u': marked infer=.* but in the model too. Remove the mark"):
        loss(normal("u"), marked)
    with pytest.warns(EstimatorWarning, match="site 'u': in the guide but not in the model"):
        loss(normal("w"), lambda: (normal("w")(), normal("u")()))
    observed = handlers.condition(normal("u"), {"u": jnp.asarray(0.1)})
    with pytest.warns(EstimatorWarning, match="site 'u': in the guide but not in the model"):
        loss(observed, normal("u"))  # a latent of the guide has no value to take there
    assert loss(normal("w"), lambda: (normal("w")(), marked())).shape == ()


def test_what_model_and_guide_may_differ_in():
    plated, bare = normal("u", plates={"rows": (3, None, None)}), normal("u", 3)
    assert loss(plated, bare).shape == ()
    assert loss(bare, plated).shape == ()
    assert loss(normal("u", plates={"lines": (3, None, None)}), plated).shape == ()
    assert loss(normal("u", 3), normal("u", 1, 3)).shape == ()
    subsampled = normal("u", plates={"rows": (6, None, 3)})
    assert loss(subsampled, subsampled).shape == ()
    assert loss(subsampled, handlers.scale(bare, scale=2.0)).shape == ()  # scaled by hand
    density = dist.Delta(jnp.zeros(3), log_density=2.0 * jnp.ones(3))  # the same, as AutoSemiDAIS has it
    assert loss(subsampled, lambda: numpyro.sample("u", density)).shape == ()
    with pytest.warns(EstimatorWarning, match="site 'u': plate 'rows' subsamples it in the model but not in the guide"):
        assert loss(subsampled, bare).shape == ()


def test_a_parameter_and_a_site_of_one_name():
    def site() -> None:
        numpyro.sample("u", dist.Normal(0.0, 1.0))

    def both() -> None:
        numpyro.sample("u", dist.Normal(numpyro.param("m", 0.0), 1.0))
        numpyro.param("u", 2.0)

    for model, guide in ((site, both), (both, site)):
        with pytest.raises(EstimatorError, match="site 'u': a parameter has the same name") as caught:
            loss(model, guide, {"m": 0.0, "u": 2.0})
        assert isinstance(caught.value, AssertionError)  # as NumPyro's own


def test_names_used_twice_raise_what_numpyro_raises():
    def twice() -> None:
        numpyro.sample("u", dist.Normal(0.0, 1.0))
        numpyro.sample("u", dist.Normal(0.0, 1.0))

    def plate_too() -> None:
        numpyro.sample("u", dist.Normal(0.0, 1.0))
        with numpyro.plate("u", 2):
            numpyro.sample("v", dist.Normal(0.0, 1.0))

    def deterministic_too() -> None:
        numpyro.deterministic("u", 1.0)
        numpyro.sample("u", dist.Normal(0.0, 1.0))

    for program in (twice, plate_too, deterministic_too):
        with pytest.raises(AssertionError, match="site 'u': the name is used twice"):
            loss(program, program)


def hidden(inside: str, infer: dict[str, Any]) -> Any:
    """A coin in a scan or a branch of the model."""

    def coin(carry: Any, _: Any = None) -> Any:
        z = numpyro.sample("z", dist.Bernoulli(0.3), infer=infer)
        return carry + z, None

    def model() -> None:
        p = numpyro.sample("p", dist.Normal(0.0, 1.0))
        if inside == "scan":
            total, _ = scan(coin, p, None, length=3)
        else:
            total, _ = cond(p > 0, coin, coin, p)
        numpyro.sample("x", dist.Normal(total, 1.0), obs=0.3)

    return model


@pytest.mark.parametrize("inside", ["scan", "cond"])
@pytest.mark.parametrize("infer", [{}, {"enumerate": "parallel"}], ids=["plain", "marked"])
def test_a_latent_in_the_models_control_flow_is_never_drawn_from_the_prior(inside, infer):
    with pytest.raises(EstimatorError, match=r"site 'z': .*(the guide does not draw|2 steps before)"):
        loss(hidden(inside, infer), normal("p"))


@pytest.mark.parametrize(
    "spec", [None, {"c": DisARM(), "x": DisARM()}, {"x": Reinforce(LeaveOneOut())}, {"x": ARMS(3)}], ids=repr
)
def test_latents_in_branches_of_guide_and_model(spec: Any, double_precision: None) -> None:
    """Which the model's branches take from the guide, and its later sites too; against the sum over both bits."""

    def model() -> None:
        c = numpyro.sample("c", dist.Bernoulli(0.4))
        coins = [lambda _, p=p: numpyro.sample("x", dist.Bernoulli(p)) for p in (0.7, 0.2)]
        x = cond(c > 0, *coins, None)
        numpyro.deterministic("twice", 2.0 * x)
        numpyro.sample("y", dist.Normal(2.0 * x + c, 1.0), obs=1.3)

    def guide() -> None:
        a, b = numpyro.param("a", jnp.array(0.3)), numpyro.param("b", jnp.array([0.5, -0.4]))
        c = numpyro.sample("c", dist.Bernoulli(logits=a))
        cond(c > 0, *[lambda _, i=i: numpyro.sample("x", dist.Bernoulli(logits=b[i])) for i in (1, 0)], None)

    def exact(p: Any) -> Any:
        total = 0.0
        for c, x in product((0, 1), (0, 1)):
            log_q = dist.Bernoulli(logits=p["a"]).log_prob(c) + dist.Bernoulli(logits=p["b"][c]).log_prob(x)
            log_p = dist.Bernoulli(0.4).log_prob(c) + dist.Bernoulli(0.7 if c else 0.2).log_prob(x)
            total += jnp.exp(log_q) * (log_q - log_p - dist.Normal(2.0 * x + c, 1.0).log_prob(1.3))
        return total

    params = {"a": jnp.array(0.3), "b": jnp.array([0.5, -0.4])}
    elbo = EstimatorELBO(spec, num_particles=2)
    draws = jax.jit(jax.vmap(lambda k: jax.grad(lambda p: elbo.loss(k, p, model, guide))(params)))(
        jax.random.split(jax.random.key(0), 20_000)
    )
    for name, right in jax.grad(exact)(params).items():
        error = draws[name].std(0) / len(draws[name]) ** 0.5
        assert (jnp.abs(draws[name].mean(0) - right) < 4 * error).all()
        assert (error < 0.05).all()


def test_branches_without_jit_and_branches_that_do_not_agree():
    def branching(k: Any, loc: Any, **infers: Any) -> Any:
        infer = [infers.get(n, {}) for n in ("yes", "no")]
        branches = [lambda _, i=i: numpyro.sample("z", dist.Normal(loc + i, 1.0), infer=infer[i]) for i in (0, 1)]
        return cond(numpyro.sample("k", k) > 0, *branches, None)

    def model() -> None:
        numpyro.sample("x", dist.Normal(branching(dist.Bernoulli(0.4), 0.2), 1.0), obs=1.1)

    def guide(**infers: Any) -> None:
        branching(dist.Bernoulli(logits=numpyro.param("a", 0.3)), numpyro.param("b", 0.1), **infers)

    elbo, params = EstimatorELBO(num_particles=2), {"a": 0.3, "b": 0.1}
    step = jax.value_and_grad(lambda p: elbo.loss(random.key(0), p, model, guide))
    with jax.disable_jit():
        concrete = step(params)
    np.testing.assert_allclose(*map(np.hstack, map(jax.tree.leaves, (jax.jit(step)(params), concrete))), rtol=1e-5)
    with pytest.raises(TypeError, match="pytree structure") as raised:
        loss(model, lambda: guide(yes={"estimator": Pathwise()}), params)
    assert any("Name a site's estimator once, in EstimatorELBO({...})" in note for note in raised.value.__notes__)


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("flow", ["scan", "cond"])
def test_a_minibatch_in_control_flow_is_that_of_the_guide(flow: str, bound: bool, double_precision: None) -> None:
    """Guide and model see the same elements inside; else the posterior of one datum is held against another's. The
    weights of a bound are those of a datum, and N/B stands before their logarithm."""
    x = jnp.arange(6.0)

    def program(site: Callable[[Any], None]) -> Callable[[], None]:
        def inside(carry: Any = None, _: Any = None) -> Any:
            with numpyro.plate("data", len(x), subsample_size=2) as i:
                site(i)
            return carry, None

        def run() -> None:
            if flow == "scan":
                scan(inside, jnp.array(0), None, length=2)
            else:
                cond(jnp.array(True), inside, inside, jnp.array(0))

        return run

    def latent(i: Any) -> None:
        numpyro.sample("o", dist.Normal(1.0 * numpyro.sample("z", dist.Bernoulli(0.3)), 1.0), obs=x[i])

    def guide() -> None:
        b = numpyro.param("b", jnp.array([0.5, -0.4]))
        program(lambda i: numpyro.sample("z", dist.Bernoulli(logits=b[0] * x[i] / 5 + b[1])))()

    def exact(b: Any) -> Any:
        """The sum over what the steps draw, for two particles."""
        a, steps = b[0] * x / 5 + b[1], 2 if flow == "scan" else 1
        one = [(jax.nn.log_sigmoid(s * a), jnp.log(p) + dist.Normal(z, 1.0).log_prob(x))
               for s, p, z in ((1, 0.3, 1.0), (-1, 0.7, 0.0))]  # fmt: skip
        particle = [[sum(part) for part in zip(*steps, strict=True)] for steps in product(one, repeat=steps)]
        value = jnp.array(0.0)
        for (q, p), (r, s) in product(particle, repeat=2):
            weights = jnp.stack([p - q, s - r])
            loss = jax.nn.logsumexp(weights, 0) - jnp.log(2) if bound else weights.mean(0)
            value -= jnp.sum(jnp.exp(q + r) * loss)
        return value

    objective = ImportanceWeighted() if bound else EvidenceLowerBound()
    b = jnp.array([0.5, -0.4])
    elbo = EstimatorELBO({"z": Reinforce(LeaveOneOut())}, num_particles=2, objective=objective)
    draws = jax.jit(jax.vmap(lambda k: jax.grad(lambda b: elbo.loss(k, {"b": b}, program(latent), guide))(b)))(
        jax.random.split(jax.random.key(0), 20_000)
    )
    right, error = jax.grad(exact)(b), draws.std(0) / len(draws) ** 0.5
    assert (jnp.abs(draws.mean(0) - right) < 4 * error).all()
    assert (error < 0.03 * jnp.abs(right)).all()

    with pytest.raises(EstimatorError, match="plate 'data': it subsamples inside a scan or a cond"):
        exact_gradient(program(latent), guide)  # which can't list these minibatches


@pytest.mark.parametrize("flows", ["scan scan", "cond scan cond", "scan cond scan", "scan scan scan", "cond cond"])
def test_a_latent_in_control_flow_inside_another(flows: str) -> None:
    """Every step of the model has the guide's own value: the two log probabilities are one."""

    def within(flow: str, body: Callable[[Any], Any]) -> Callable[[Any], Any]:
        if flow == "scan":
            return lambda carry: scan(lambda c, _: (body(c), None), carry, None, length=2)[0]
        return lambda carry: cond(carry > 0, body, body, carry)

    def program() -> None:
        body = lambda carry: numpyro.sample("z", dist.Normal(carry, 1.0))  # noqa: E731
        for flow in reversed(flows.split()):
            body = within(flow, body)
        body(jnp.array(0.5))

    assert abs(jax.jit(lambda: EstimatorELBO().loss(random.key(0), {}, program, program))()) < 1e-6


def test_the_refusal_of_a_mark_gives_advice_that_works():
    def program(law: dist.Distribution, **infer: Any) -> Callable[[], None]:
        return lambda: numpyro.sample("z", law, infer=infer)

    coin, count = dist.Bernoulli(0.3), dist.Poisson(2.0)
    with pytest.raises(EstimatorError, match=r"site 'z': .* no finite number of them\. Remove"):
        loss(program(count, enumerate="parallel"), program(count, enumerate="parallel"))
    with pytest.raises(EstimatorError, match=r"site 'z': .*EstimatorELBO\({\"z\": Enumerate\(\)}\)"):
        loss(program(coin), normal("u"))
    assert loss(program(coin), lambda: None, estimators={"z": Enumerate()}).shape == ()
    assert loss(program(coin, enumerate="parallel"), lambda: None).shape == ()


def test_a_log_probability_that_fails_is_named_and_shows_the_shapes():
    def model() -> None:
        w = numpyro.sample("w", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(w, 1.0), obs=jnp.zeros(4))

    def guide() -> None:
        numpyro.sample("w", dist.Normal(jnp.zeros(3), 1.0).to_event(1))

    with pytest.raises(
        EstimatorError, match=r"site 'x': its log probability in the model fails .*incompatible"
    ) as caught:
        loss(model, guide)
    table = str(caught.value).split("Shapes of the model:")[1]
    assert re.search(r"w dist\s+\|\s+3\s+value\s+\|\s+3\s+x dist\s+3\s+\|\s+value\s+4\s+\|", table)


# ---- JAX's own modes -----------------------------------------------------------------------------------------------


def mixed_model(y: Any) -> None:
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with numpyro.plate("n", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        k = numpyro.sample("k", Ranks(jnp.ones(len(y))))
        numpyro.sample("y", dist.Normal(w + 2 * z + k, 1.0), obs=y)


def mixed_guide(y: Any) -> None:
    m = numpyro.param("m", 0.0)
    numpyro.sample("w", dist.Normal(m, 0.5))
    with numpyro.plate("n", len(y)):
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("l", jnp.zeros(len(y)))))
        numpyro.sample("k", Ranks(jnp.full(len(y), jnp.exp(m))))


def test_no_tracer_outlives_the_survey():
    y = jnp.array([0.2, 1.9, -0.4, 2.2])
    elbo = EstimatorELBO(num_particles=2)

    def step(params: Any, key: Any) -> Any:
        return elbo.loss(key, params, mixed_model, mixed_guide, y)

    gc.freeze()  # JAX looks through all objects that are not
    with jax.checking_leaks():
        value = jax.jit(jax.grad(step))({"m": 0.1, "l": jnp.zeros(4)}, random.key(0))
    gc.unfreeze()
    assert jnp.isfinite(value["m"])


def test_ranks_that_may_not_meet_in_guide_and_model_meet_in_the_engine():
    def careless(y: Any) -> None:
        mixed_model(y)
        numpyro.factor("f", jnp.sum(jnp.ones(3) + jnp.ones((2, 3))))

    y, params = jnp.array([0.2, 1.9, -0.4, 2.2]), {"m": 0.1, "l": jnp.zeros(4)}
    with jax.numpy_rank_promotion("raise"):
        for options in ({}, {"num_particles": 2}, {"estimators": {"z": DisARM(), "w": StickingTheLanding()}}):
            assert loss(lambda: mixed_model(y), lambda: mixed_guide(y), params, **options).shape == ()
        with pytest.raises(ValueError, match="jax_numpy_rank_promotion") as raised:
            loss(lambda: careless(y), lambda: mixed_guide(y), params)
    assert any(note.startswith("Raised in the model, after 'y'.") for note in raised.value.__notes__)


@pytest.mark.filterwarnings("ignore:site 'w'.*no derivative")
@pytest.mark.parametrize(
    ("estimator", "particles"),
    [pytest.param(Enumerate(), 1, marks=pytest.mark.slow), (Enumerate(), 2), (ARMS(4), 1)],
)
def test_values_are_concrete_without_jit(estimator, particles):
    """`if w > 0.3` works, as with the stock ELBOs, also in several particles and alternatives, and the gradient is that
    of the program whose decision is traced."""

    def model(decide: Any) -> None:
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(decide(w > 0.3, w, -w) + decide(z > 0.5, 1.0, 0.0), 1.0), obs=0.3)

    def guide(decide: Any) -> None:
        w = numpyro.sample("w", dist.Normal(numpyro.param("m", 0.0), 0.5))
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("l", 0.2) + decide(w > 0.0, 0.5, -0.5)))

    elbo = EstimatorELBO({"z": estimator}, num_particles=particles)

    def value(decide: Any, key: Any, run: Any = lambda f: f) -> Any:
        step = jax.value_and_grad(lambda p: elbo.loss(key, p, model, guide, decide))
        return run(step)({"m": 0.1, "l": 0.2})

    def python(test: Any, yes: Any, no: Any) -> Any:
        return yes if test else no

    with pytest.raises(jax.errors.TracerBoolConversionError) as raised:
        value(python, random.key(0))
    where, remedy = (note for note in raised.value.__notes__ if "JAX_TRACEBACK" not in note)
    assert where.startswith("Raised in the guide, after 'w'.\nShapes of the guide:")
    assert "jnp.where or jax.lax.cond; or run under `with jax.disable_jit():`" in remedy
    traced = value(jnp.where, random.key(0), jax.jit)
    with jax.disable_jit():
        averaging = EstimatorELBO({"z": estimator}, average_model=True)
        with pytest.raises(EstimatorError, match=r"average_model=True\) under jax.disable_jit\(\)"):
            averaging.loss(random.key(0), {"m": 0.1, "l": 0.2}, model, guide, jnp.where)
        concrete = value(python, random.key(0))
    np.testing.assert_allclose(*map(np.hstack, map(jax.tree.leaves, (traced, concrete))), rtol=1e-5)


@pytest.mark.parametrize(
    "asked", [bool, float, np.sin, lambda z: [0.3, 0.7][z]], ids=["bool", "float", "numpy", "list"]
)
def test_a_number_that_python_asks_for_is_refused_with_a_remedy_that_works(asked):
    model, guide = of_one_site(lambda a: dist.Bernoulli(logits=a))

    def asking() -> None:
        model()
        asked(numpyro.sample("w", dist.Bernoulli(0.3)))

    def answering() -> None:
        guide()
        numpyro.sample("w", dist.Bernoulli(0.3))

    with pytest.raises(TypeError) as raised:
        loss(asking, answering)
    assert any("run under `with jax.disable_jit():`" in note for note in raised.value.__notes__)
    with jax.disable_jit():
        assert EstimatorELBO(num_particles=2).loss(random.key(0), {}, asking, answering).shape == ()


def simulated(through: Callable[[Any], Any]) -> tuple[Any, Any]:
    def model() -> None:
        t = numpyro.sample("t", dist.Normal(0.0, 1.0))
        u = numpyro.sample("u", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(through(t) + u, 0.5), obs=1.1)

    def guide() -> None:
        m = numpyro.param("m", 0.2)
        numpyro.sample("t", dist.Normal(m, 0.6))
        numpyro.sample("u", dist.Normal(m, 0.6))

    return model, guide


def by_callback(t: Any) -> Any:
    return jax.pure_callback(
        lambda t: np.float32(t), jax.ShapeDtypeStruct((), jnp.float32), t, vmap_method="expand_dims"
    )


def by_loop(t: Any) -> Any:
    return jax.lax.while_loop(lambda s: s < 3.0, lambda s: s + 0.5, t)


@pytest.mark.parametrize("through", [by_callback, by_loop])
def test_an_operation_without_a_derivative_is_named_before_jax_fails(through):
    model, guide = simulated(through)
    for estimators in (None, {"t": Pathwise()}):
        with pytest.raises(EstimatorError, match=r"site 't': Pathwise differ.* passes through a (pure_callb|while l)"):
            loss(model, guide, {"m": 0.2}, estimators=estimators)
    remedy = {"t": Reinforce(LeaveOneOut())}
    assert loss(model, guide, {"m": 0.2}, estimators=remedy, num_particles=2).shape == ()
    model, guide = simulated(lambda t: through(jax.lax.stop_gradient(t)))
    with pytest.warns(UserWarning, match="site 't': log p of 'y' moves with 't'"):
        assert loss(model, guide, {"m": 0.2}).shape == ()


def test_a_loop_has_a_derivative_in_forward_mode():
    elbo, (model, guide) = EstimatorELBO(), simulated(by_loop)
    unrolled, _ = simulated(lambda t: t + 0.5 * jnp.ceil(2 * (3.0 - t)))  # as often as it takes to pass 3

    def slope(model: Any) -> Any:
        return jax.jacfwd(lambda m: elbo.loss(random.key(0), {"m": m}, model, guide))(0.2)

    np.testing.assert_allclose(slope(model), slope(unrolled), rtol=1e-5)


DRAWN = np.random.default_rng(0)
COUNT = iter(range(1000))
ROWS = jnp.linspace(-1.0, 1.0, 50)

#: data that a guide fetches by itself: another at every tracing
FETCHED = {
    "a number": lambda: DRAWN.normal(),
    "an array": lambda: jnp.asarray(DRAWN.normal(size=3)).sum(),
    "rows of a constant": lambda: ROWS[DRAWN.integers(50, size=4)].sum(),
    "a slice at a number": lambda: ROWS[int(DRAWN.integers(40)) :][:3].sum(),
    "inside a jit": lambda: jax.jit(lambda y: y * DRAWN.normal())(1.0),
    "inside a scan": lambda: jax.lax.scan(lambda c, _: (c + DRAWN.normal(), None), 0.0, None, length=2)[0],
    "a number of operations": lambda: sum(ROWS[0] for _ in range(1 + next(COUNT) % 2)),
}


@pytest.mark.parametrize("fetch", FETCHED.values(), ids=FETCHED)
def test_a_program_that_is_another_when_traced_again(fetch):
    def model() -> None:
        numpyro.sample("x", dist.Normal(2.0 * numpyro.sample("z", dist.Bernoulli(0.3)), 1.0), obs=0.7)

    def guide() -> None:
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("m", 0.2) * fetch()))

    with pytest.raises(EstimatorError, match="site 'z': its cost is another when the program is run again"):
        loss(model, guide, {"m": 0.2})
    assert loss(model, guide, {"m": 0.2}, estimators=Reinforce(LeaveOneOut()), num_particles=2).shape == ()


def test_a_program_that_is_the_same_when_traced_again():
    key, starts = random.key(3), np.random.default_rng(0)

    def model(x: Any) -> None:
        numpyro.param(
            "unused", jnp.exp(starts.normal(size=3)), constraint=constraints.positive
        )  # another at each tracing
        with numpyro.plate("data", 50, subsample_size=5) as i:
            z = numpyro.sample("z", dist.Bernoulli(0.3 * jnp.ones(5)))
            loc = jax.lax.fori_loop(0, 3, lambda _, s: s + z, jnp.asarray([0.1] * 5))
            numpyro.sample("x", dist.Normal(loc + jnp.asarray(np.linspace(0, 1, 5)), 1.0), obs=x[i])

    def guide(x: Any) -> None:
        m = numpyro.param("m", 0.2)
        drop = random.bernoulli(random.fold_in(key, 1), 0.5) * random.bernoulli(numpyro.prng_key(), 0.5)
        with numpyro.plate("data", 50, subsample_size=5) as i:
            numpyro.sample("z", dist.Bernoulli(logits=jax.jit(jnp.tanh)(m * x[i]) * drop))

    elbo = EstimatorELBO(DisARM())
    step = jax.jit(jax.value_and_grad(lambda p, x: elbo.loss(random.key(0), p, model, guide, x)))
    assert jnp.isfinite(step({"m": 0.2, "unused": jnp.ones(3)}, ROWS)[1]["m"])


def test_what_an_intervention_cuts_off():
    """The site that `do` has put another value in the place of is none of the cost, if the guide lacks it."""

    def model(z=None):
        with numpyro.plate("data", 2):
            z = numpyro.sample("z", dist.Bernoulli(0.5)) if z is None else z
            k = numpyro.sample("k", dist.Bernoulli(0.2 + 0.5 * z))
            numpyro.sample("x", dist.Normal(k + z, 1.0), obs=jnp.array([1.2, 0.3]))

    def guide(z=None):
        with numpyro.plate("data", 2):
            numpyro.sample("k", dist.Bernoulli(logits=numpyro.param("a", jnp.array([0.3, -0.4]))))

    elbo, ones = EstimatorELBO({"k": Enumerate()}), jnp.ones(2)

    def loss(a, model, *args):
        return elbo.loss(jax.random.key(0), {"a": a}, model, guide, *args)

    programs = ((numpyro.handlers.do(model, data={"z": ones}), ()), (model, (ones,)))
    found = [jax.value_and_grad(loss)(jnp.array([0.3, -0.4]), program, *args) for program, args in programs]
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5)
