"""The benchmarks: every case is checked against float64, then timed beside its peers and the ceilings of the machine.

``python benchmarks/ops.py`` and ``python benchmarks/model.py`` in a checkout, ``clara-fast bench`` where installed.
"""
