"""Datasets: sources → tokenizer → packing → the HDF5 folder on the disk → batches of rows.

prepare.py tells the story of making a dataset; storage.py opens one and loader.py reads batches from it.
"""
