"""Few-shot inference over task files, as Ray Data pipelines around vLLM."""
