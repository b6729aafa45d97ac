"""Distributed batch jobs on Ray that choose training data by what a base model gets wrong."""

__version__ = "0.2.0"
