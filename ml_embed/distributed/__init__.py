"""Several processes: collectives that carry gradients, noticing dead machines, DeepSpeed's
ZeRO-2."""
