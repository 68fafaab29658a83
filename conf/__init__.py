"""Hydra configuration: YAML only; ``locallearn.cli`` is its only reader."""
