"""From scored rows and outside datasets to a training set whose every row says why it is there."""
