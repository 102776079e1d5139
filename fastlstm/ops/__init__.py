"""The contract (`schema`) and its registration with PyTorch (`register`)."""
