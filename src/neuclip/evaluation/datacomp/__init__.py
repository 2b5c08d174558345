"""DataComp's 38 tasks."""
