"""How good a model is: its metrics, its place among the published teams."""
