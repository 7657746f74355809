"""The parts of `benchmarks/on_gpu.py`.

`parts` runs them one after another, each in a process of its own; `speed`, `equality` and `training` are what they
measure, `variants` the ways in which a step is computed, `page` shows what came of them, `weights` takes a trained
model along, and `carry` makes what a bare machine is given.
"""
