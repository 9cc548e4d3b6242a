"""Samplers: K completions of the reference policy for a prompt. A file an engine; a plain function is one too."""
