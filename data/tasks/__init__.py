"""A generated data set of seven task families whose answers can be checked exactly."""
