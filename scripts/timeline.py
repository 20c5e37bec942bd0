"""What each stage of a traced run did when: bubble and link wait in numbers, and a picture beside the simulated one."""

import sys

from llm_local.commands.timeline import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
