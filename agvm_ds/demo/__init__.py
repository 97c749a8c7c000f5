"""The built-in data set and the configuration of its small detector: a whole training with nothing to download."""
