"""What both adapters share: the estimator contract, plates, credit assignment, the assembly of the surrogate.

Nothing in here imports torch, jax, pyro or numpyro. Arrays are handled through an `ops` namespace: the array API
standard plus the handful of operations listed in `core/ops.py`.
"""
