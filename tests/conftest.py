"""Hypothesis without its deadline: a shared machine may be slow, and that is no bug of the code under test."""

import os

# Tiny models on two threads of a busy machine are many times slower than on one; read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# A test that does not say how many examples it tries has these.
settings.register_profile("patient", settings(), deadline=None, max_examples=40)
settings.register_profile("thorough", settings(), deadline=None, max_examples=400)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "patient"))
