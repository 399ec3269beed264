"""python -m plumbing.grading --grade FILE --out FILE: grades JSON lines with gold answers and responses."""

import argparse

from plumbing.grading.verdicts import grade_file


def main(argv=None):
    """Grades a file, by the flags."""
    parser = argparse.ArgumentParser(prog="python -m plumbing.grading", allow_abbrev=False,
                                     description="Grade a JSON Lines file with gold answers and responses.")
    parser.add_argument("--grade", required=True, metavar="FILE",
                        help="JSON Lines file to grade: each line holds the texts gold and response")
    parser.add_argument("--out", required=True, metavar="FILE", help="file for the verdicts, a line each")
    args = parser.parse_args(argv)
    try:
        grade_file(args.grade, args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
