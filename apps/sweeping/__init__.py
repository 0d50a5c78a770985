"""The parts of `apps/sweep.py`: a grid of settings, a run for each of its points, and what they came to."""
