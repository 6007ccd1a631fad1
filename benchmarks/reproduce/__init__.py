"""The K-BFGS paper's comparison, run anew; see `__main__`."""
