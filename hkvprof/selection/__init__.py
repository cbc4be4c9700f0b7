"""Which tokens stay: static scores, indexes, sparsity; what calibration and runtime share."""
