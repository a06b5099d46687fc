"""Contrastive and distillation losses over exits and nested dims: functions of tensors."""
