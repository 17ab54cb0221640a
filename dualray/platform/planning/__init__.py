"""What training a model on a cluster would cost, from hardware constants and kernel speeds."""
