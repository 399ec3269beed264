"""plumbing/grading - is this answer equal to that one? See README.md in this folder.

The package needs nothing else of the project.
"""

from plumbing.grading.extract import extract_answer
from plumbing.grading.verdicts import grade, grade_file, is_copied, is_correct, read_json_rows, verdict
from plumbing.grading.workers import WORKERS, Workers

__all__ = ["WORKERS", "Workers", "extract_answer", "grade", "grade_file", "is_copied", "is_correct",
           "read_json_rows", "verdict"]
