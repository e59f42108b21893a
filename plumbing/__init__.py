"""Nothing of the method: settings and commands, devices, files, checkpoints, and the bookkeeping of a training."""
