"""Rollouts of the reference policy: where their prompts come from, how they are kept, and the work on them."""
