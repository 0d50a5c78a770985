"""What the parts of a step are called in a trace. Imports no torch: a trace is read without it."""

STEP = "train step"
REGION = "region "
COLLECTIVES = "collectives"
BETWEEN = "between regions"
