"""The engines that own parameters, gradients and optimizer, behind one protocol."""
