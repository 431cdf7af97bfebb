"""`nca-align inspect`: a data set before training."""
