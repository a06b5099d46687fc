"""Several processes: collectives with gradients, engines, noticing dead machines."""
