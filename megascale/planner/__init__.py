"""What a layout costs, by arithmetic: bytes that are held and bytes that are sent."""
