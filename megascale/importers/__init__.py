"""Checkpoints of neighbouring programs: DeepSpeed's and Megatron-LM's files into our format."""
