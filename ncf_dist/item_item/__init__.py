"""Item-to-item matrices: what follows what, and what is had together. NumPy and torch, no Spark.

- `rows`: a sparse item→item matrix, and its tensors.
- `counts`: from what prepare counted, how much likelier an item is after another.
- `gram`: EASE and item k-nearest-neighbours, from the Gram matrix; `memory`: what that takes.
- `part`: such a matrix as a part of a model's scores.
"""
