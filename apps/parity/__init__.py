"""The same model on several backends, side by side: the parts of apps/compare_backends.py."""
