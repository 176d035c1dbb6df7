"""Rules that repair, cut or reject documents, and the step that applies them."""
