"""Files and folders that appear complete or not at all, and names that stay inside them."""
