"""From a run folder's files to one HTML page with plots."""
