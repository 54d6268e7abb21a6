"""Baselines for the score-function estimator."""
