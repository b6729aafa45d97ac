"""The `birbal` command."""
