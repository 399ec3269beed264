"""What is not the method: folders, processes, flags, grading, pages. A reader
of TraceRL may skip all of it."""
