"""The demo: its data, its twin programs, and a short run of the whole."""

import json

import jax.numpy as jnp
import numpy as np
import numpyro
import pyro
import pytest
import torch
from numpyro.infer.util import log_density

from ppl_estimators import cli
from ppl_estimators.demo.experiment import ROWS, read
from ppl_estimators.demo.network import DOTS, LOW, PIXELS, STYLE, TOP, initial_parameters, load, program


@pytest.fixture(scope="module")
def digits():
    return load(seed=0)


def test_the_split_keeps_every_image_as_counts(digits):
    images = np.concatenate([digits.train, digits.held_out])
    assert images.shape == (1797, PIXELS)
    assert set(np.unique(images)) == set(range(DOTS + 1))
    np.testing.assert_array_equal(np.bincount(digits.held_out_labels) > 30, True)


def test_minibatches_are_epochs(digits):
    batches = digits.minibatches(steps=30, size=100, seed=0)
    assert batches.shape == (30, 100)
    assert len(set(batches[:14].flat)) == 1400  # one epoch repeats no image
    assert set(batches[:14].flat) != set(batches[14:28].flat)


def test_one_of_each_shows_ten_digits(digits):
    assert digits.one_of_each().shape == (10, PIXELS)


def test_the_programs_are_twins(digits):
    """The same log densities of model and guide at the same values, with the same parameters."""
    initial = initial_parameters(digits.train, seed=0)
    images = digits.train[:5]
    rng = np.random.default_rng(0)
    latents = {
        "top": rng.integers(0, 2, (5, TOP)).astype(np.float32),
        "low": rng.integers(0, 2, (5, LOW)).astype(np.float32),
        "style": rng.normal(size=(5, STYLE)).astype(np.float32),
    }

    pyro.clear_param_store()
    in_torch = {name: torch.tensor(value) for name, value in latents.items()}
    in_jax = {name: jnp.asarray(value) for name, value in latents.items()}
    programs = zip(program("pyro", initial), program("numpyro", initial), strict=True)
    for pyro_side, numpyro_side in programs:
        conditioned = pyro.condition(pyro_side, in_torch)
        expected = pyro.poutine.trace(conditioned).get_trace(torch.tensor(images)).log_prob_sum().item()
        seeded = numpyro.handlers.seed(numpyro_side, 0)
        found, trace = log_density(seeded, (jnp.asarray(images),), {}, in_jax)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert {name for name, site in trace.items() if site["type"] == "param"} <= set(initial)
    assert set(pyro.get_param_store()) == set(initial)


@pytest.mark.slow
def test_smoke_run_writes_what_it_promises(capsys, tmp_path):
    assert cli.main(["demo", "--smoke", "--out", str(tmp_path / "with a space")]) == 0
    shown = capsys.readouterr().out
    document = json.loads((tmp_path / "with a space" / "results.json").read_text(encoding="utf-8"))
    expected = [(backend, row.label) for backend, rows in ROWS.items() for row in rows]
    assert [(row["backend"], row["label"]) for row in document["results"]] == expected
    for row in document["results"]:
        assert row["label"] in shown
        assert row["curve"][-1]["held_out_elbo"] > row["curve"][0]["held_out_elbo"]
        assert row["gradient_variance"] > 0
        assert row["milliseconds_per_step"] > 0
    again = read(tmp_path / "with a space" / "results.json")
    assert json.loads(again.to_json()) == document
    assert again.originals.shape == (10, PIXELS)
    assert again.results[0].curve[-1][1] == document["results"][0]["held_out_elbo"]
    figure = (tmp_path / "with a space" / "figure.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) > 50_000
