"""Natural Instructions: task files, prompts, labels, metrics. Pure Python."""
