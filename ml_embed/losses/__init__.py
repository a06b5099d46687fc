"""Contrastive and distillation losses over exits and nested dims, from vectors to scalars."""
