"""Starting programs and keeping them running; knows nothing of the sale."""
