"""Many images through a scorer: decoding beside computing, tables in and out, and the journal of a run."""
