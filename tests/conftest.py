"""Hypothesis without its deadline: a shared machine may be slow, and that is no bug of the code under test."""

import os

# Tiny models on two threads of a busy machine are many times slower than on one; read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")
