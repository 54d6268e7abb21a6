"""Scans in the steps of NumPyro's scan, exactly: the gradient at every draw, or at every noise, integrated, is the sum
over all paths of a Python loop over the same steps, whichever way both scans run."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from injected import cells, columns, grid, moments
from numpyro.contrib.control_flow import cond, scan
from test_exact_scans import ChosenJax

from ppl_estimators import Constant, DisARM, Enumerate, EstimatorError, MovingAverage, Reinforce
from ppl_estimators.core.credit import Graph
from ppl_estimators.numpyro import EstimatorELBO, with_estimators
from ppl_estimators.numpyro.run import Keys, Program
from ppl_estimators.numpyro.survey import survey
from ppl_estimators.testing import exact_gradient

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]

STEPS = 2, 2
DATA = np.array([[0.3, -1.0], [1.4, 0.2]])
START = {"a": np.array([[0.5, -0.3], [0.2, 0.6]]), "b": np.array(0.6), "c": np.array([0.4, -0.7])}
PLAIN = (False, False)
MARK = {"enumerate": "parallel"}


def program(
    *, loop=False, guide_reversed=PLAIN, model_reversed=PLAIN, above=True, branch=False, summed="", remembers=True
):
    """z in the steps of a scan inside the steps of another, and w before each of these, if it is ``above``; what comes
    out of the inner scan is used, and what both end with. ``branch``: are they drawn in a branch of a cond there?
    ``remembers``: does a bit of the guide depend on that before? ``summed``: a state goes from each outer step to the
    next, summed "out" in the model or enumerated in the "guide". The same in a Python ``loop``."""

    def along(step, carry, xs, reverse, length):
        if not loop:
            return scan(step, carry, xs, reverse=reverse)
        outs = [None] * length
        for i in range(length)[:: -1 if reverse else 1]:
            carry, outs[i] = step(carry, jax.tree.map(lambda x: x[i], xs), i)  # noqa: B023
        return carry, jnp.stack(outs)

    def named(name, *at):
        return name + "".join(f"_{i}" for i in at) if loop else name

    def bit(name, logits, *at):
        def draw(logits):
            return 1.0 * numpyro.sample(named(name, *at), dist.Bernoulli(logits=logits))

        return cond(logits > 0.1, draw, draw, logits) if branch and not loop else draw(logits)

    def state(logits, i, infer):
        return numpyro.sample(named("s", i), dist.Bernoulli(logits=logits), infer=infer)

    def model():
        def outer(before, xs, i=0):
            old, s = before
            w = bit("w", 0.5 * old - 0.1, i) if above else 0.3
            if summed:
                s = state(0.4 * s - 0.3, i, {} if summed == "guide" else MARK)

            def inner(carry, x, j=0):
                z = bit("z", 0.7 * carry - 0.2 + 0.4 * w + 0.6 * s, i, j)
                numpyro.sample(named("x", i, j), dist.Normal(1.5 * z + 0.3 * carry + w * (0.5 - s), 1.3), obs=x)
                return z + 0.1 * carry, z

            end, path = along(inner, 0.5 * old, xs, model_reversed[1], STEPS[1])
            numpyro.sample(named("y", i), dist.Normal(path[0] - 0.7 * path[1] + end + s, 1.0), obs=0.4)
            return (end, s), end

        (end, _), _ = along(outer, (0.0, 0), jnp.asarray(DATA), model_reversed[0], STEPS[0])
        numpyro.sample("end", dist.Normal(end, 1.0), obs=0.8)

    def guide():
        a, b, c = (numpyro.param(n, jnp.asarray(START[n])) for n in "abc")

        def outer(before, xs, i=0):
            old, s = before
            w = bit("w", xs[1] + 0.3 * old, i) if above else 0.3
            if summed == "guide":
                s = state(xs[1] * (0.5 + s), i, MARK)

            def inner(carry, a, j=0):
                z = bit("z", a + b * carry + 0.5 * w, i, j)
                return z if remembers else carry, z

            end, path = along(inner, old, xs[0], guide_reversed[1], STEPS[1])
            return (end if remembers else old, s), path[0]

        along(outer, (0.0, 0), (a, c), guide_reversed[0], STEPS[0])

    return model, guide


class Given:
    """Draws as they are given."""

    def value(self, name, fn, key, step=None):
        name, *at = name.split("_")
        at = tuple(map(int, at)) if at or step is None else step
        return self.values[name][at].astype(int), []

    def uniform(self, key, shape, like):
        return jnp.full(shape, 0.4, like.dtype)


SLOW = pytest.mark.slow  # the others see the same mistakes
WAYS = [
    {"guide_reversed": (True, False), "branch": True},
    {"summed": "guide"},
    pytest.param({}, marks=SLOW),
    pytest.param({"guide_reversed": (False, True), "model_reversed": (True, False)}, marks=SLOW),
    pytest.param({"guide_reversed": (True, False), "model_reversed": (True, True), "branch": True}, marks=SLOW),
    pytest.param({"model_reversed": (False, True)}, marks=SLOW),
    pytest.param({"summed": "out"}, marks=SLOW),
]


@pytest.mark.parametrize("ways", WAYS)
def test_at_every_draw(ways):
    model, guide = program(**ways)
    twin, of_steps = program(**{**ways, "loop": True, "branch": False})
    # NumPyro holds the value of a step of a reversed model against the law of another, which no loop does
    exact = exact_gradient(*((model, guide) if "model_reversed" in ways else (twin, of_steps)), params=START)
    z, w = (np.array(list(itertools.product((0, 1), repeat=n))) for n in (4, 2))
    z, w = np.repeat(z, 4, 0).reshape(-1, *STEPS), np.tile(w, (16, 1))
    elbo = EstimatorELBO(Reinforce(Constant(0.7)))
    elbo.randomness = Given()

    def one(z, w):
        names = {**{f"z_{i}_{j}": z[i, j] for i, j in np.ndindex(STEPS)}, **{f"w_{i}": w[i] for i in range(2)}}
        drawn = numpyro.handlers.condition(numpyro.handlers.substitute(of_steps, data=START), data=names)
        trace = numpyro.handlers.trace(numpyro.handlers.seed(drawn, 0)).get_trace()
        chance = jnp.exp(sum(trace[n]["fn"].log_prob(trace[n]["value"]) for n in names))
        elbo.randomness.values = {"z": z, "w": w}
        loss, gradient = jax.value_and_grad(lambda p: elbo.loss(jax.random.key(0), p, model, guide))(point)
        return jax.tree.map(lambda x: chance * x, (jnp.ones(()), loss, gradient))

    point = jax.tree.map(jnp.asarray, START)
    found = jax.jit(lambda z, w: jax.tree.map(lambda x: x.sum(0), jax.vmap(one)(z, w)))(z, w)
    assert float(found[0]) == pytest.approx(1, rel=1e-12)
    assert float(found[1]) == pytest.approx(exact.value, rel=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found[2], dict(exact.gradient))


@pytest.mark.parametrize(
    ("guide_reversed", "remembers"),
    [((False, False), True), pytest.param((True, True), True, marks=SLOW), pytest.param(PLAIN, False, marks=SLOW)],
)
def test_at_every_noise(guide_reversed, remembers):
    """Estimators of other values: one step takes another, later steps of both scans are drawn again."""
    ways = {"above": False, "guide_reversed": guide_reversed, "remembers": remembers}
    model, guide = program(**ways)
    exact = exact_gradient(*program(**ways, loop=True), params=START).gradient
    logits = [[a + 0.15 + START["b"] * c for c in (0.0, 1.0)[: 1 + remembers]] for a in START["a"].ravel()]
    points, weights = grid(*(cells(*(1 / (1 + np.exp(s * x)) for x in xs for s in (1, -1))) for xs in logits))
    tables = jnp.repeat(jnp.asarray(columns(points, 1, *STEPS, 1)), 16, -1)
    elbos = [EstimatorELBO({"z": e}) for e in (DisARM(), Enumerate())]

    @jax.jit
    def gradients(tables):
        def one(table):
            def loss(p, elbo):
                elbo.randomness = ChosenJax()
                elbo.randomness.row, elbo.randomness.table = 0, {"z": {"uniform": table}}
                return elbo.loss(jax.random.key(0), p, model, guide)

            return [jax.grad(loss)({n: jnp.asarray(START[n]) for n in "abc"}, elbo) for elbo in elbos]

        return jax.lax.map(one, tables, batch_size=125)

    variances = []
    for found in gradients(tables):
        mean, variance = moments(
            np.concatenate([np.asarray(found["a"]).reshape(-1, 4), np.asarray(found["b"])[:, None]], 1), weights
        )
        np.testing.assert_allclose(mean, np.append(exact["a"], exact["b"]), atol=1e-12)
        variances.append(variance.sum())
    assert sorted(variances, reverse=True) == variances  # each of them looks at more values


@pytest.mark.parametrize("summed", ["out", "guide"])
def test_the_posterior_of_what_is_summed_above_an_inner_scan(summed):
    elbo, at = EstimatorELBO(), {"z": jnp.array([[0, 1], [1, 1]]), "w": jnp.array([1, 0])}
    elbo.randomness = Given()
    elbo.randomness.values = at
    point = jax.tree.map(jnp.asarray, START)

    def found(loop):
        return elbo.posterior(jax.random.key(0), point, *program(summed=summed, loop=loop), num_samples=1)

    scanned, looped = jax.jit(lambda: (found(False), found(True)))()
    each = jnp.stack([looped.marginals[f"s_{i}"] for i in range(2)], axis=1)
    np.testing.assert_allclose(scanned.marginals["s"], each, rtol=1e-10)
    assert float(jnp.ptp(each)) > 0.1
    assert {n: x.shape for n, x in scanned.samples.items()} == {"z": (1, 2, 2), "w": (1, 2), "s": (1, 2)}
    np.testing.assert_array_equal(scanned.samples["z"][0], at["z"])


def test_in_a_cond():
    """A scan in a branch, and a cond in a branch."""

    def program(branches):
        def steps(logits):
            def step(old, x):
                z = 1.0 * numpyro.sample("z", dist.Bernoulli(logits=logits + 0.4 * old + x))
                return z, z

            return scan(step, 0.0, jnp.array([0.2, -0.5]))[1]

        def model():
            w = numpyro.sample("w", dist.Bernoulli(logits=0.2))
            path = branches(w, steps, 0.3)
            v = branches(
                w, lambda x: branches(1 - w, lambda x: 1.0 * numpyro.sample("v", dist.Bernoulli(logits=x)), x), 0.1
            )
            numpyro.sample("x", dist.Normal(path[0] - path[1] + w + v, 1.0), obs=0.6)

        def guide():
            b = numpyro.param("b", 0.3)
            w = numpyro.sample("w", dist.Bernoulli(logits=b))
            path = branches(w, steps, b)
            branches(
                w, lambda x: branches(1 - w, lambda x: numpyro.sample("v", dist.Bernoulli(logits=x)), x), b * path[1]
            )

        return model, guide

    def cond_(w, f, x):
        return cond(w > 0, lambda x: f(x + 1.0), f, x)

    model, guide = program(cond_)
    point = {"b": jnp.asarray(0.3)}
    exact = exact_gradient(*program(lambda w, f, x: f(x + w)), params=point)
    elbo = EstimatorELBO(Reinforce(Constant(0.7)))
    elbo.randomness = Given()

    def one(values):
        elbo.randomness.values = dict(zip("wzv", (values[0], values[1:3], values[3]), strict=True))
        w, z, _ = elbo.randomness.values.values()
        old = jnp.array([0.0, z[0]])
        logits = jnp.stack([0.3, *(0.3 + w + 0.4 * old + jnp.array([0.2, -0.5])), 0.3 * z[1] + 1.0])
        chance = jnp.exp(dist.Bernoulli(logits=logits).log_prob(values).sum())
        found = jax.value_and_grad(lambda p: elbo.loss(jax.random.key(0), p, model, guide))(point)
        return jax.tree.map(lambda x: chance * x, found)

    values = jnp.array(list(itertools.product((0, 1), repeat=4)))
    loss, gradient = jax.jit(lambda: jax.tree.map(lambda x: x.sum(0), jax.vmap(one)(values)))()
    assert float(loss) == pytest.approx(exact.value, rel=1e-12)
    assert float(gradient["b"]) == pytest.approx(float(exact.gradient["b"]), rel=1e-10)
    with pytest.raises(EstimatorError, match=r"site 'z': DisARM takes the steps of a scan.*in a cond.*Use Reinforce"):
        EstimatorELBO({"z": DisARM()}).loss(jax.random.key(0), point, model, guide)


@pytest.mark.filterwarnings("ignore:shape requires ndarray")  # NumPyro's `SVI.init` replays kept state into a scan
def test_each_step_of_both_scans_has_its_own_average():
    model, guide = program()
    hooked = with_estimators(guide, {"z": Reinforce(MovingAverage())})
    svi = numpyro.infer.SVI(model, hooked, numpyro.optim.Adam(0.01), EstimatorELBO())
    mean = svi.run(jax.random.key(0), 5, progress_bar=False).state.mutable_state["z$state"]["mean"]
    assert mean.shape == STEPS
    assert mean[0, 0] < mean[0, 1] < mean[1, 0] < mean[1, 1]  # of fewer costs


def test_the_steps_that_an_inner_step_moves():
    model, guide = program(guide_reversed=(False, True))
    params = jax.tree.map(jnp.asarray, START)
    run = Program(model, guide, (), {}, params, jax.random.key(1))
    found = survey(run, Keys(jax.random.key(0)), lambda: None).structure
    graph = Graph(found.ancestors, {s.name: s.plates for s in found.sites}, found.steps)
    windows = {t.side[0] + t.site: graph.window("z", t) for t in found.terms if "z" in t.depends_on}
    inf = float("inf")
    both = {n: (*w[:2], w.inner and tuple(w.inner[:2])) for n, w in windows.items() if w is not None}
    assert both == {
        "gz": (0, inf, (-inf, 0)), "gw": (1, inf, None), "mz": (0, inf, (-inf, inf)), "mx": (0, inf, (-inf, inf)),
        "mw": (1, inf, None), "my": (0, inf, None),
    }  # fmt: skip


def test_what_nested_scans_refuse():
    """The fixes as typed."""

    def program(of_guide=True, **infer):
        def steps(*_):
            return 0.0, scan(lambda *_: (0.0, numpyro.sample("z", dist.Bernoulli(0.3), infer=infer)), 0.0, None, 2)[1]

        return (lambda: scan(steps, 0.0, None, 3)) if of_guide else lambda: None

    def loss(guide, estimators=None, model=program()):  # noqa: B008
        elbo = EstimatorELBO(estimators)
        return jax.eval_shape(lambda: elbo.loss(jax.random.key(0), {}, model, guide)).shape

    for told in ({}, {"estimators": {"z": Enumerate()}}, {"model": program(**MARK)}):
        with pytest.raises(EstimatorError, match=r"'z': a latent site .* the guide does not draw. Add a") as refused:
            loss(program(of_guide=False), **told)
        assert "Enumerate" not in str(refused.value)  # nor does it help
        assert loss(program(), **told) == ()
    with pytest.raises(EstimatorError, match=r"site 'z': marked .* inside a scan .* inside another .* Remove the mark"):
        loss(program(**MARK))
