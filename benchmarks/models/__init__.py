"""python -m benchmarks --suite models: public models with their own code, before and after fastlstm.convert.

zoo.py builds the models, gate.py checks the converted ones, clock.py times their LSTMs, suite.py makes the rows.
"""
