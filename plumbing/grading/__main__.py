"""python -m plumbing.grading --grade FILE --out FILE: grades JSON lines of gold and response."""

import argparse

from plumbing.grading.verdicts import grade_file


def main(argv=None):
    """Grades a file."""
    parser = argparse.ArgumentParser(prog="python -m plumbing.grading", allow_abbrev=False,
                                     description="Grade a JSON Lines file of gold and response.")
    parser.add_argument("--grade", required=True, metavar="FILE", help="rows of gold and response")
    parser.add_argument("--out", required=True, metavar="FILE", help="where the verdicts go")
    args = parser.parse_args(argv)
    try:
        grade_file(args.grade, args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
