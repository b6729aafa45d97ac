"""The steps of the recipe, one module each."""
