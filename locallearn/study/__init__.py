"""Runs and studies: one run, a comparison of several, a benchmark of their speed."""
