"""One command's work: options in, a document out."""
