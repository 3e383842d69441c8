"""From a config to the parts of a run, over arrays or over shapes."""
