"""Documents into text and HTML; nothing is computed."""
