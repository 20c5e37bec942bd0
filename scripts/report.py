"""Makes a page of one run, or of several side by side: RUN/report.html."""

import sys

from llm_local.commands.report import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
