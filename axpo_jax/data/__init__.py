"""Questions in: records, readers, the miniature world and the input pipelines."""
