"""What a layout costs before it runs: time, memory, communication."""
