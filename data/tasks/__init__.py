"""A generated data set of six task families whose answers can be checked exactly."""
