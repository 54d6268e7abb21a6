"""A deep belief network of digits, trained in both libraries by every kind of estimator.

One model mixes a continuous latent (pathwise) with two layers of binary latents (score function). The same network, the
same starting point and the same minibatches go to the unmodified `SVI` of Pyro and of NumPyro, with the library's own
ELBO and with ours. The two trainers are twins, to be read side by side: `pyro_trainer.py` and `numpyro_trainer.py`.
"""
