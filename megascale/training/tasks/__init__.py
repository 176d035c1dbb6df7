"""What is trained: a task supplies model, head, loss and data; the trainer knows none by name."""
