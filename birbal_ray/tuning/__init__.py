"""The search for sampling ratios: what can be tried, in which order, and what was found."""
