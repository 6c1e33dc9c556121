"""Models as files: our folders, and everything the released system writes."""
