"""What a layout costs, by arithmetic: bytes held, bytes sent, and time waited."""
