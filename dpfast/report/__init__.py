"""Reports for people: one that may be released, one that must not."""
