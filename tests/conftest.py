"""Hypothesis without its deadline: a shared machine may be slow, and that is no bug of the code under test."""

from hypothesis import settings

settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")
