"""The train step as MLIR modules: imported by torch-mlir, compiled and run by whoever takes them.

Only this room imports `torch_mlir` and `iree`, inside functions: without the extra [mlir] everything else works.
"""
