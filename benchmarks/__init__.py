"""Benchmarks of fastlstm against nn.LSTM and the machine's peak. Start at cases.py, then run.py.

python -m benchmarks --suite cpu          measure, and write benchmarks/results/<device>/cpu.csv
python -m benchmarks --suite models       public models before and after fastlstm.convert (models/)
python -m benchmarks.report               turn the CSVs into Markdown tables and plots
python -m benchmarks ab REV               time a revision and the working tree, interleaved (docs/measuring.md)

A case is defined once (cases.py, sweeps.py, gpu.py), gets its inputs (data.py), is wrapped for each implementation
(implementations.py, baselines.py), checked against the float64 reference (gate.py) and then timed (measure.py).
"""
