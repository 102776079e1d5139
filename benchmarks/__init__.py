"""How fast fastlstm is, next to nn.LSTM and to the machine's own limit. Start at cases.py, then run.py.

python -m benchmarks --suite cpu          measure, and write benchmarks/results/<device>/cpu.csv
python -m benchmarks --suite models       public models before and after fastlstm.convert (models/)
python -m benchmarks.report               turn the CSVs into Markdown tables and plots
python -m benchmarks ab REV               time a revision and the working tree, interleaved (docs/benchmarks.md)

A case is stated once (cases.py, sweeps.py, gpu.py), given its inputs once (data.py), wrapped per implementation
(peers.py, rivals.py), checked against the float64 reference (gate.py) and only then timed (measure.py).
"""
