"""One study: what is tried, in what order, and how it is recorded."""
