"""The parts of apps/compress_llm.py."""
