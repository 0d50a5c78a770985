"""The compile/run split: capture a train step part by part, lower it, store it in one file, run it.

Reading order: `spec` (what a step is compiled for), `stages` (how a model is seen), `schedule` (its parts, traced),
`lowering` (machine code), `artifact` (the file), `program` (the step that runs).
"""
