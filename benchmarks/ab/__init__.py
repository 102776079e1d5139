"""A/B timing of two revisions of fastlstm: python -m benchmarks ab REV. docs/measuring.md explains it.

Two builds that register the same torch ops cannot share a process, so each revision runs in a worker process
(worker.py) that the parent starts (process.py) and gives turns (compare.py). trees.py builds a revision, paired.py
turns samples into ratios and decides which are outside noise, command.py is the command.
"""
