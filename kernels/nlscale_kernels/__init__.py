"""Mathematics on local tensors, one folder an operator: reference.py is the truth, and the path on a CPU."""
