"""This package holds what is not the method: folders, processes, flags, grading, pages.

It also holds fast twins of some definitions in the six files. A reader of TraceRL may skip all of it.
"""
