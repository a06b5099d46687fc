"""Several processes: collectives with gradients, noticing dead machines, DeepSpeed's ZeRO-2."""
