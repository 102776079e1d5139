"""Six small, complete exercises around the LSTM: `python -m fastlstm.tutorials all`.

Each file is one exercise and reads on its own; `common.py` holds what they share (the two implementations, the training
trajectory comparison, the timing), `__main__.py` the command line.
"""
