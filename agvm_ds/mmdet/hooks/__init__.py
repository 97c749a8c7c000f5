"""mmcv hooks that know the engine: checkpoints, evaluation, averaged weights, the log and the clock."""
