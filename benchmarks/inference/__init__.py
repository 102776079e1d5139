"""python -m benchmarks --suite inference: layers with fixed weights on a CPU, and the runtimes that people deploy on.

engines.py builds a layer in each engine, onnx_model.py the ONNX model that two of them load, gate.py checks results,
suite.py makes the rows of whole calls, streaming.py those of single steps.
"""
