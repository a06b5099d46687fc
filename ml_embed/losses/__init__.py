"""Contrastive and distillation losses over exits and nested dims, as functions of tensors."""
